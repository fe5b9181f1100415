package gguf

import (
	"fmt"
	"slices"
	"strings"
)

// hostile is a file that must be refused, and how.
type hostile struct {
	name   string
	data   []byte
	is     error  // sentinel, or nil
	offset int64  // -1: no place
	tensor string // of the FormatError
	field  string
	rule   string // part of the message
}

var arch = key("general.architecture", KindString, "") // 40 bytes: the second key starts at 64

const second, afterArch = 64, 64 // where the second key, or without one the first tensor, starts

// withKey is a file whose second key is given.
func withKey(k []byte) []byte { return raw{keys: [][]byte{arch, k}}.bytes() }

// withTensors is a file with 64 bytes of data.
func withTensors(infos ...[]byte) []byte {
	return raw{keys: [][]byte{arch}, infos: infos, data: 64}.bytes()
}

// nested is an array of depth levels, of which the last is empty.
func nested(depth int) []byte {
	var b []byte
	for range depth - 1 {
		b = append(b, encode(uint32(KindArray), uint64(1))...)
	}
	return append(b, encode(uint32(KindUint8), uint64(0))...)
}

func hostileFiles() []hostile {
	return slices.Concat(hostileHeaders(), hostileKeys(), hostileTensors())
}

func hostileHeaders() []hostile {
	valid := raw{keys: [][]byte{arch}}.bytes()
	text := func(s string) []byte { return []byte(s + strings.Repeat(" ", 64)) }
	list := []hostile{
		{name: "empty", data: nil, is: ErrTruncated, rule: "empty"},
		{name: "magic only", data: []byte("GGUF"), is: ErrTruncated, rule: "4 bytes"},
		{name: "23 bytes", data: valid[:23], is: ErrTruncated, rule: "23 bytes"},
		{name: "short and not GGUF", data: []byte("hello"), is: ErrNotGGUF, rule: "5 bytes"},
		{name: "magic ABCD", data: raw{magic: "ABCD"}.bytes(), is: ErrNotGGUF, rule: `"ABCD"`},
		{name: "magic gguf", data: raw{magic: "gguf"}.bytes(), is: ErrNotGGUF, rule: "lower-case"},
		{name: "big-endian magic", data: raw{magic: "FUGG"}.bytes(), is: ErrBigEndian},
		{
			name: "byte-swapped version 3", data: raw{version: 3 << 24}.bytes(), is: ErrBigEndian, offset: 4,
			field: "version",
		},
		{
			name: "byte-swapped version 2", data: raw{version: 2 << 24}.bytes(), is: ErrBigEndian, offset: 4,
			field: "version",
		},
		{
			name: "version 0", data: encode([]byte("GGUF"), uint32(0), uint64(0), uint64(0)), is: ErrUnsupported,
			offset: 4, field: "version",
		},
		{
			name: "version 1", data: raw{version: 1}.bytes(), is: ErrUnsupported, offset: 4, field: "version",
			rule: "version 1",
		},
		{
			name: "version 4", data: raw{version: 4}.bytes(), is: ErrUnsupported, offset: 4, field: "version",
			rule: "version 4",
		},
		{name: "version 99", data: raw{version: 99}.bytes(), is: ErrUnsupported, offset: 4, field: "version"},
		{name: "tensor count 2^63", data: raw{ninfos: uint64(1) << 63}.bytes(), offset: 8, field: "tensor count"},
		{name: "tensor count -1", data: raw{ninfos: int64(-1)}.bytes(), offset: 8, field: "tensor count"},
		{
			name: "tensor count beyond the file", data: raw{ninfos: uint64(3), keys: [][]byte{arch}}.bytes(),
			is:     ErrTruncated,
			offset: 8, field: "tensor count",
		},
		{name: "key count 2^63", data: raw{nkeys: uint64(1) << 63}.bytes(), offset: 16, field: "key count"},
		{
			name: "key count beyond the file", data: raw{nkeys: uint64(4), keys: [][]byte{arch}}.bytes(), is: ErrTruncated,
			offset: 16, field: "key count",
		},
		{
			name: "one key too few", data: raw{nkeys: uint64(2), keys: [][]byte{arch}}.bytes(), is: ErrTruncated,
			offset: 64, field: "key",
		},
		{
			name: "lfs pointer", data: text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
			is: ErrNotGGUF, rule: "Git LFS",
		},
		{name: "html", data: text("\n  <!DOCTYPE html><html>"), is: ErrNotGGUF, rule: "HTML"},
		{name: "html without doctype", data: text("<HTML><body>404"), is: ErrNotGGUF, rule: "HTML"},
		{name: "xml", data: text(`<?xml version="1.0"?><Error>`), is: ErrNotGGUF, rule: "XML"},
		{
			name: "safetensors", data: encode(uint64(2), []byte("{}"), make([]byte, 32)), is: ErrNotGGUF,
			rule: "safetensors",
		},
		{name: "zip", data: text("PK\x03\x04"), is: ErrNotGGUF, rule: "zip"},
		{name: "gzip", data: text("\x1f\x8b"), is: ErrNotGGUF, rule: "gzip"},
		{name: "zeros", data: make([]byte, 64), is: ErrNotGGUF, rule: "download"},
	}
	for _, magic := range []string{"GGML", "GGJT", "GGMF", "lmgg", "tjgg", "fmgg", "ggml", "ggjt", "algg"} {
		list = append(list, hostile{name: "magic " + magic, data: text(magic), is: ErrNotGGUF, rule: "before GGUF"})
	}
	return list
}

func hostileKeys() []hostile {
	long := strings.Repeat("k", maxKey+1)
	at := func(k string) int64 { return second + 8 + int64(len(k)) } // of the kind of the second key
	list := []hostile{
		{name: "empty key", data: withKey(key("", KindUint8, uint8(1))), offset: second, field: "key", rule: "empty"},
		{name: "long key", data: withKey(key(long, KindUint8, uint8(1))), offset: second, field: "key", rule: "limit 65535"},
		{
			name: "key not UTF-8", data: withKey(key("a\xff", KindUint8, uint8(1))), offset: second, field: "key",
			rule: "UTF-8",
		},
		{name: "key with NUL", data: withKey(key("a\x00b", KindUint8, uint8(1))), offset: second, field: "key", rule: "NUL"},
		{
			name: "key beyond the file", data: withKey(encode(uint64(60000), make([]byte, 20))), is: ErrTruncated,
			offset: second, field: "key",
		},
		{name: "duplicate key", data: withKey(arch), offset: second, field: "general.architecture", rule: "twice"},
		{
			name: "value type 13", data: withKey(key("k", 13, uint64(0))), offset: at("k"), field: "k",
			rule: "value type 13",
		},
		{name: "value type 2^32-1", data: withKey(key("k", 1<<32-1, uint64(0))), offset: at("k"), field: "k"},
		{
			name: "value cut off", data: withKey(key("key", KindUint64, uint32(0))), is: ErrTruncated, offset: at("key") + 4,
			field: "key",
		},
		{
			name: "string of 2^63 bytes", data: withKey(key("k", KindString, uint64(1)<<63)), offset: at("k") + 4,
			field: "k", rule: "limit",
		},
		{
			name: "string of 2^64-1 bytes", data: withKey(key("k", KindString, huge)), offset: at("k") + 4, field: "k",
			rule: "limit",
		},
		{
			name: "string beyond the file", data: withKey(key("k", KindString, uint64(9), uint64(0))), is: ErrTruncated,
			offset: at("k") + 4, field: "k",
		},
		{name: "bool 2", data: withKey(key("k", KindBool, uint8(2))), offset: at("k") + 4, field: "k", rule: "bool is 2"},
		{
			name: "bool 255 in an array", data: withKey(key("k", KindArray, uint32(KindBool), uint64(2), uint8(1), uint8(255))),
			offset: at("k") + 17, field: "k", rule: "bool is 255",
		},
		{
			name: "element type 13", data: withKey(key("k", KindArray, uint32(13), uint64(0))), offset: at("k") + 4, field: "k",
			rule: "array elements",
		},
		{
			name: "string in an array beyond the file", data: withKey(key("k", KindArray, uint32(KindString), uint64(1),
				uint64(1))),
			is: ErrTruncated, offset: at("k") + 16, field: "k",
		},
		{
			name: "array nested too deep", data: withKey(key("k", KindArray, nested(maxDepth+1))), field: "k",
			offset: at("k") + 4 + 12*maxDepth, rule: "nest more than 16 deep",
		},
		{
			name: "array nested 100000 deep", data: withKey(key("k", KindArray, nested(100_000))), field: "k",
			offset: at("k") + 4 + 12*maxDepth, rule: "nest",
		},
		{
			name: "alignment 0", data: withKey(key(alignmentKey, KindUint32, uint32(0))), offset: second,
			field: alignmentKey, rule: "power of two",
		},
		{
			name: "alignment 3", data: withKey(key(alignmentKey, KindUint32, uint32(3))), offset: second,
			field: alignmentKey, rule: "power of two",
		},
		{
			name: "alignment 2^31", data: withKey(key(alignmentKey, KindUint32, uint32(1)<<31)), offset: second,
			field: alignmentKey,
		},
		{
			name: "alignment as string", data: withKey(key(alignmentKey, KindString, "32")), offset: second,
			field: alignmentKey, rule: "string",
		},
		{
			name: "alignment as uint64", data: withKey(key(alignmentKey, KindUint64, uint64(32))), offset: second,
			field: alignmentKey, rule: "uint64",
		},
		{
			name: "alignment as int32", data: withKey(key(alignmentKey, KindInt32, int32(32))), offset: second,
			field: alignmentKey, rule: "int32",
		},
		{
			name: "alignment twice", data: raw{keys: [][]byte{
				key(alignmentKey, KindUint32, uint32(32)), key(alignmentKey, KindUint32, uint32(64)),
			}}.bytes(),
			offset: headerSize + 33, field: alignmentKey, rule: "twice",
		},
	}
	for _, elem := range []ValueKind{KindUint8, KindUint64, KindString, KindArray, KindBool} {
		for _, n := range []uint64{5, 1 << 30, 1<<30 + 1, 1 << 40, 1 << 60, 1<<61 + 1, 1 << 62, 1 << 63, huge} {
			name := fmt.Sprintf("array of %d %v", n, elem)
			data := withKey(key("k", KindArray, uint32(elem), n, uint32(0)))
			list = append(list, hostile{name: name, data: data, offset: at("k") + 8, field: "k"})
		}
	}
	return list
}

func hostileTensors() []hostile {
	name63, tooLong := strings.Repeat("n", 63), strings.Repeat("n", maxName+1)
	// Of a first tensor with a one-letter name and one dimension.
	const dimsAt, offsetAt = afterArch + 9, afterArch + 25
	ok := info("a", F32, 0, 8)
	list := []hostile{
		{
			name: "tensor name empty", data: withTensors(info("", F32, 0, 8)), offset: afterArch, field: "tensor name",
			rule: "empty",
		},
		{
			name: "tensor name of 1025 bytes", data: withTensors(info(tooLong, F32, 0, 8)), offset: afterArch,
			field: "tensor name", rule: "limit 1024",
		},
		{
			name: "tensor name not UTF-8", data: withTensors(info("a\xc0", F32, 0, 8)), offset: afterArch,
			field: "tensor name", rule: "UTF-8",
		},
		{
			name: "tensor name with NUL", data: withTensors(info("a\x00", F32, 0, 8)), offset: afterArch,
			field: "tensor name", rule: "NUL",
		},
		{
			name: "tensor name of 2^64-1 bytes", data: withTensors(encode(huge, make([]byte, 32))), offset: afterArch,
			field: "tensor name",
		},
		{
			name: "tensor twice", data: withTensors(ok, info("a", F32, 32, 8)), offset: afterArch + 33, tensor: "a",
			field: "name", rule: "twice",
		},
		{
			name: "9 dimensions", data: withTensors(info("a", F32, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1)), offset: dimsAt, tensor: "a",
			field: "dims", rule: "9 dimensions",
		},
		{
			name: "2^32-1 dimensions", data: withTensors(encode("a", uint32(1<<32-1), make([]byte, 64))), offset: dimsAt,
			tensor: "a", field: "dims",
		},
		{
			name: "overflow beside a 0", data: withTensors(info("a", F32, 0, 1<<62, 4, 0)), offset: dimsAt, tensor: "a",
			field: "dims", rule: "2^63",
		},
		{
			name: "a scalar of Q4_K", data: withTensors(info("a", Q4_K, 0)), offset: dimsAt, tensor: "a", field: "dims",
			rule: "rows of 1",
		},
		{
			name: "unknown type past the end", data: withTensors(info("a", 43, 96, 8)), is: ErrTruncated, offset: offsetAt,
			tensor: "a", field: "offset",
		},
		{
			name: "dimension 2^63", data: withTensors(info("a", F32, 0, 1<<63)), offset: dimsAt, tensor: "a",
			field: "dims", rule: "dimension 0",
		},
		{name: "dimension -1", data: withTensors(info("a", I8, 0, huge)), offset: dimsAt, tensor: "a", field: "dims"},
		{
			name: "elements 2^32 * 2^32", data: withTensors(info("a", F32, 0, 1<<32, 1<<32)), offset: dimsAt,
			tensor: "a", field: "dims", rule: "2^63",
		},
		{
			name: "elements wrap to 0", data: withTensors(info("a", I8, 0, 1<<62, 4)), offset: dimsAt, tensor: "a",
			field: "dims", rule: "2^63",
		},
		{
			name: "elements wrap to 0 in four", data: withTensors(info("a", I8, 0, 1<<16, 1<<16, 1<<16, 1<<16)),
			offset: dimsAt, tensor: "a", field: "dims",
		},
		{
			name: "elements wrap to a small number", data: withTensors(info("a", I8, 0, 1<<62+1, 8)), offset: dimsAt,
			tensor: "a", field: "dims",
		},
		{
			name: "elements wrap negative", data: withTensors(info("a", I8, 0, 1<<62, 2)), offset: dimsAt, tensor: "a",
			field: "dims", rule: "2^63 elements",
		},
		{
			name: "bytes wrap to 0", data: withTensors(info("a", F32, 0, 1<<62)), offset: dimsAt, tensor: "a",
			field: "dims", rule: "bytes",
		},
		{
			name: "bytes wrap negative", data: withTensors(info("a", F64, 0, 1<<60)), offset: dimsAt, tensor: "a",
			field: "dims", rule: "bytes",
		},
		{
			name: "padded bytes overflow", data: withTensors(info("a", I8, 0, 1<<63-1)), is: ErrTruncated,
			offset: offsetAt, tensor: "a", field: "offset",
		},
		{
			name: "sum of sizes overflows", data: withTensors(info("a", I8, 0, 1<<62), info("b", I8, 1<<62, 1<<62)),
			is:     ErrTruncated,
			offset: offsetAt, tensor: "a", field: "offset",
		},
		{
			name: "Q4_K rows of 100", data: withTensors(info("a", Q4_K, 0, 100)), offset: dimsAt, tensor: "a",
			field: "dims", rule: "whole blocks of 256",
		},
		{
			name: "Q8_0 rows of 16, whole in all", data: withTensors(info("a", Q8_0, 0, 16, 2)), offset: dimsAt,
			tensor: "a", field: "dims",
		},
		{
			name: "offset 1", data: withTensors(info("a", F32, 1, 8)), offset: offsetAt, tensor: "a", field: "offset",
			rule: "alignment",
		},
		{
			name: "offset 16", data: withTensors(info("a", F32, 16, 8)), offset: offsetAt, tensor: "a", field: "offset",
			rule: "alignment",
		},
		{
			name: "offset past the end", data: withTensors(info("a", F32, 96, 8)), is: ErrTruncated, offset: offsetAt,
			tensor: "a", field: "offset",
		},
		{
			name: "offset + size past the end", data: withTensors(info("a", F32, 32, 9)), is: ErrTruncated,
			offset: offsetAt, tensor: "a", field: "offset",
		},
		{
			name: "offset + size overflows", data: withTensors(info("a", F32, huge-31, 8)), is: ErrTruncated,
			offset: offsetAt, tensor: "a", field: "offset",
		},
		{
			name: "offset 2^63", data: withTensors(info("a", F32, 1<<63, 8)), is: ErrTruncated, offset: offsetAt,
			tensor: "a", field: "offset",
		},
		{
			name: "empty tensor past the end", data: withTensors(info("a", F32, 96, 0)), is: ErrTruncated,
			offset: offsetAt, tensor: "a", field: "offset",
		},
		{
			name: "same data twice", data: withTensors(ok, info("b", F32, 0, 8)), offset: 160, tensor: "b",
			field: "offset", rule: "overlaps",
		},
		{
			name: "overlap", data: withTensors(info("a", F32, 0, 16), info("b", F32, 32, 8)), offset: 192, tensor: "b",
			field: "offset", rule: "overlaps",
		},
		{
			name: "overlap in reverse order", data: withTensors(info("b", F32, 32, 8), info("a", F32, 0, 16)),
			offset: 192, tensor: "b",
			field: "offset", rule: "overlaps",
		},
		{
			name: "data section past the end", data: withTensors(ok)[:afterArch+33], is: ErrTruncated,
			offset: afterArch + 33, rule: "data section",
		},
		{
			name: "last tensor cut off", data: withTensors(info("a", F32, 0, 16))[:159], is: ErrTruncated,
			offset: offsetAt, tensor: "a", field: "offset",
		},
		{
			name: "tensor record cut off", data: withTensors(info(name63, F32, 0, 8))[:afterArch+90], is: ErrTruncated,
			offset: afterArch + 87, tensor: name63, field: "offset",
		},
	}
	return list
}
