package gguf

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestRefused(t *testing.T) {
	t.Parallel()
	for _, h := range hostileFiles() {
		t.Run(h.name, func(t *testing.T) {
			_, err := parseBytes(h.data)
			fe, ok := errors.AsType[*FormatError](err)
			if !ok {
				t.Fatalf("got %v, want a FormatError", err)
			}
			if h.is != nil && !errors.Is(err, h.is) {
				t.Errorf("got %v, want one that matches %v", err, h.is)
			}
			if fe.Path != "x.gguf" || fe.Offset != h.offset || fe.Tensor != h.tensor || fe.Field != h.field {
				t.Errorf("got %+v\n%v\nwant offset %#x, tensor %q, field %q", *fe, fe, h.offset, h.tensor, h.field)
			}
			if !strings.Contains(err.Error(), h.rule) {
				t.Errorf("got %q, want it to say %q", err, h.rule)
			}
		})
	}
}

func TestAccepted(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name       string
		data       []byte
		dataOffset int64
		offsets    []int64 // of the tensors, in the order of the result
	}{
		{name: "no keys, no tensors", data: raw{}.bytes(), dataOffset: 24},
		{name: "no tensors, header not padded", data: withKey(key("k", KindUint8, uint8(1))), dataOffset: second + 14},
		{
			name: "header ends aligned", data: withTensors(info("abcdefgh1234567890123456", F32, 0, 2, 4)),
			dataOffset: 128, offsets: []int64{128},
		},
		{
			name: "alignment 64", data: raw{
				keys: [][]byte{key(alignmentKey, KindUint32, uint32(64))}, align: 64,
				infos: [][]byte{info("a", F32, 0, 8), info("b", F32, 64, 8)}, data: 96,
			}.bytes(),
			dataOffset: 128, offsets: []int64{128, 192},
		},
		{
			name: "alignment 1", data: raw{
				keys: [][]byte{key(alignmentKey, KindUint32, uint32(1))}, align: 1,
				infos: [][]byte{info("a", I8, 0, 3), info("b", I8, 3, 1)}, data: 4,
			}.bytes(),
			dataOffset: 123, offsets: []int64{123, 126},
		},
		{
			name: "no padding after the last tensor", data: withTensors(info("a", I8, 0, 32), info("b", I8, 32, 1))[:193],
			dataOffset: 160, offsets: []int64{160, 192},
		},
		{
			name: "decreasing offsets", data: withTensors(info("a", F32, 32, 8), info("b", F32, 0, 8)), dataOffset: 160,
			offsets: []int64{160, 192},
		},
		{name: "a gap", data: withTensors(info("a", F32, 32, 8)), dataOffset: 128, offsets: []int64{160}},
		{
			name: "an empty tensor before another", data: withTensors(info("b", F32, 0, 8), info("a", F32, 0, 0)),
			dataOffset: 160, offsets: []int64{160, 160},
		},
		{
			name: "an empty tensor at the end", data: withTensors(info("a", F32, 64, 0)), dataOffset: 128,
			offsets: []int64{192},
		},
		{name: "empty arrays", data: withKey(key("k", KindArray, uint32(KindArray), uint64(2),
			uint32(KindString), uint64(0), uint32(KindFloat64), uint64(0))), dataOffset: second + 49},
		{
			name: "arrays nested as deep as allowed", data: withKey(key("k", KindArray, nested(maxDepth))),
			dataOffset: second + 13 + 12*maxDepth,
		},
		{
			name:       "empty text, text that is not UTF-8",
			data:       raw{keys: [][]byte{key("a", KindString, ""), key("b", KindString, "\xff\x00")}}.bytes(),
			dataOffset: 24 + 21 + 23,
		},
		{name: "a scalar", data: withTensors(info("a", F32, 0)), dataOffset: 96, offsets: []int64{96}},
		{
			name: "5 and 8 dimensions", data: withTensors(info("a", I8, 0, 1, 2, 1, 2, 3), info("b", I8, 32, 2, 1, 1, 1, 1, 1, 1,
				2)),
			dataOffset: 224, offsets: []int64{224, 256},
		},
		{
			name: "a first and a last dimension of 0", data: withTensors(info("a", F32, 0, 0, 8), info("b", Q4_K, 0, 256, 0)),
			dataOffset: 160, offsets: []int64{160, 160},
		},
		{
			name: "a name of 1024 bytes", data: withTensors(info(strings.Repeat("n", maxName), F32, 0, 8)), dataOffset: 1120,
			offsets: []int64{1120},
		},
		{
			name: "unknown types, also at the same place", data: withTensors(info("a", 43, 0, 8), info("b", F32, 0, 8), info("c",
				1<<32-1, 32, 1)),
			dataOffset: 192, offsets: []int64{192, 192, 224},
		},
		{
			name: "bytes after the data", data: append(withTensors(info("a", F32, 0, 8)), "trailer"...), dataOffset: 128,
			offsets: []int64{128},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, err := parseBytes(tt.data)
			if err == nil {
				err = walk(p)
			}
			if err != nil {
				t.Fatal(err)
			}
			var offsets []int64
			for _, tensor := range p.tensors {
				offsets = append(offsets, tensor.Offset)
			}
			if p.DataOffset != tt.dataOffset || fmt.Sprint(offsets) != fmt.Sprint(tt.offsets) {
				t.Errorf("data at %d, tensors at %v; want %d, %v", p.DataOffset, offsets, tt.dataOffset, tt.offsets)
			}
		})
	}
}

func TestTruncatedAnywhere(t *testing.T) {
	t.Parallel()
	data := readFile(t, tinyLlama)
	p, err := parseBytes(data)
	if err != nil {
		t.Fatal(err)
	}
	for n := range int(p.DataOffset) + 1 {
		want := ErrTruncated
		if 0 < n && n < 4 { // not even the magic
			want = ErrNotGGUF
		}
		if _, err := parseBytes(data[:n]); !errors.Is(err, want) {
			t.Errorf("the first %d bytes: got %v, want %v", n, err, want)
		}
	}
	last := p.tensors[len(p.tensors)-1]
	if _, err := parseBytes(data[:last.Offset+last.Size-1]); !errors.Is(err, ErrTruncated) {
		t.Errorf("without the last byte of the last tensor: got %v, want %v", err, ErrTruncated)
	}
	if _, err := parseBytes(data[:last.Offset+last.Size]); err != nil {
		t.Errorf("without the last padding: %v", err)
	}
}

// TestErrorText pins the form of messages, and that a hostile name cannot drive a terminal.
func TestErrorText(t *testing.T) {
	t.Parallel()
	rule := errors.New("is wrong")
	tests := []struct {
		err  FormatError
		want string
	}{
		{
			FormatError{Path: "m.gguf", Offset: 0x1a40, Tensor: "blk.0", Field: "dims", Err: rule},
			`m.gguf: offset 0x1a40, tensor "blk.0", dims: is wrong`,
		},
		{FormatError{Path: "m.gguf", Offset: -1, Err: rule}, "m.gguf: is wrong"},
		{FormatError{Path: "m.gguf", Offset: 0, Field: "a\x1b[2J", Err: rule}, `m.gguf: offset 0x0, "a\x1b[2J": is wrong`},
		{
			FormatError{Path: "m.gguf", Offset: -1, Field: string(bytes.Repeat([]byte("k"), 101)), Err: rule},
			"m.gguf: " + strings.Repeat("k", 100) + "…: is wrong",
		},
	}
	for _, tt := range tests {
		if got := tt.err.Error(); got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}
