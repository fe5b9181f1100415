package gguf

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// foreign lists other kinds of files that end up under a .gguf name, with how they begin.
var foreign = []struct{ magic, what string }{
	{"version https://git-lfs", "a Git LFS pointer, not the model itself; fetch that with git lfs pull"},
	{"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint"},
	{"\x1f\x8b", "a gzip archive; decompress it first"},
	{"\x28\xb5\x2f\xfd", "a zstd archive; decompress it first"},
	{"\xfd7zXZ\x00", "an xz archive; decompress it first"},
	{"BZh", "a bzip2 archive; decompress it first"},
	{"\x04\x22\x4d\x18", "an lz4 archive; decompress it first"},
	{"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it first"},
	{"Rar!", "a RAR archive; unpack it first"},
	{"\x89HDF", "an HDF5 file, perhaps of Keras"},
	{"gguf", "its magic is the lower-case gguf"},
	// The formats before GGUF wrote their magic as a little-endian number, which swaps the letters.
	{"GGML", legacy},
	{"GGMF", legacy},
	{"GGJT", legacy},
	{"GGLA", legacy},
	{"ggml", legacy},
	{"ggmf", legacy},
	{"ggjt", legacy},
	{"ggla", legacy},
	{"lmgg", legacy},
	{"fmgg", legacy},
	{"tjgg", legacy},
	{"algg", legacy},
	{"\x00\x00\x00\x00", "it begins with zeros, as an unfinished download does"},
}

const legacy = "a ggml file from before GGUF; convert the original model anew"

// identify returns nil for a GGUF file. data are the first bytes of a file of size bytes. For any other file the error
// names what it is, as far as that can be seen.
func identify(data []byte, size uint64) error {
	begins := func(s string) bool { return bytes.HasPrefix(data, []byte(s)) }
	switch {
	case len(data) == 0:
		return fmt.Errorf("%w: it is empty", ErrTruncated)
	case begins("GGUF"):
		if len(data) < headerSize {
			return fmt.Errorf("%w: %d bytes, less than the %d of a header", ErrTruncated, len(data), headerSize)
		}
		return nil
	case begins("FUGG"):
		return ErrBigEndian
	case safetensors(data, size):
		return fmt.Errorf("%w: a safetensors file", ErrNotGGUF)
	}
	if len(data) >= 262 && string(data[257:262]) == "ustar" {
		return fmt.Errorf("%w: a tar archive; unpack it first", ErrNotGGUF)
	}
	for _, f := range foreign {
		if begins(f.magic) {
			return fmt.Errorf("%w: %s", ErrNotGGUF, f.what)
		}
	}
	text := bytes.TrimPrefix(data[:min(len(data), 512)], []byte("\xef\xbb\xbf")) // a byte order mark
	text = bytes.ToLower(bytes.TrimSpace(text))
	for _, tag := range []string{"<!doctype", "<html", "<?xml", "<head"} {
		if bytes.HasPrefix(text, []byte(tag)) {
			return fmt.Errorf("%w: an HTML or XML page, perhaps a server's error message", ErrNotGGUF)
		}
	}
	if len(data) < headerSize {
		return fmt.Errorf("%w: %d bytes, less than the %d of a header", ErrNotGGUF, len(data), headerSize)
	}
	return fmt.Errorf("%w: it begins with %q, not with GGUF", ErrNotGGUF, data[:4])
}

// safetensors reports whether a file of size bytes is a safetensors file: the length of a JSON object, then that
// object.
func safetensors(data []byte, size uint64) bool {
	if len(data) < 10 || data[8] != '{' {
		return false
	}
	n := binary.LittleEndian.Uint64(data)
	return n >= 2 && n <= size-8
}
