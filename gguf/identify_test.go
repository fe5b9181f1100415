package gguf

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

// TestIdentify: files of other kinds that people give are called what they are, by their beginnings as their own
// programs write them.
func TestIdentify(t *testing.T) {
	t.Parallel()
	tar := append(bytes.Repeat([]byte("a"), 257), "ustar\x0000"...)
	for _, tt := range []struct{ begins, want string }{
		{"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a Git LFS pointer"},
		{"PK\x03\x04\x14\x00", "a zip archive, perhaps a PyTorch checkpoint"},
		{"\x1f\x8b\x08\x08", "a gzip archive"},
		{"\x28\xb5\x2f\xfd\x04", "a zstd archive"},
		{"\xfd7zXZ\x00\x00\x04", "an xz archive"},
		{"BZh91AY&SY", "a bzip2 archive"},
		{"\x04\x22\x4d\x18\x64", "an lz4 archive"},
		{"7z\xbc\xaf\x27\x1c\x00\x04", "a 7-Zip archive"},
		{"Rar!\x1a\x07\x01\x00", "a RAR archive"},
		{"\x89HDF\r\n\x1a\n", "an HDF5 file"},
		{string(tar), "a tar archive"},
		{"tjgg\x03\x00\x00\x00", "from before GGUF"},
		{"\xef\xbb\xbf<!DOCTYPE html>", "an HTML or XML page"},
		{"hello", `it begins with "hell"`},
	} {
		data := append([]byte(tt.begins), make([]byte, 400)...)
		err := identify(data, uint64(len(data)))
		if !errors.Is(err, ErrNotGGUF) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.12q: %v, want %q", tt.begins, err, tt.want)
		}
	}
	if err := identify(append([]byte("GGUF"), make([]byte, 400)...), 404); err != nil {
		t.Error(err)
	}
}
