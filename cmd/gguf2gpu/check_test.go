package main

import (
	"bytes"
	"crypto/sha256"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
)

// readManifest reads a list of tensors.
func readManifest(r io.Reader) (with loader.HashAlgorithm, m manifest, err error) {
	list, err := readList(r)
	if err != nil {
		return with, nil, err
	}
	return list.tensors()
}

// TestManifest writes hashes of tensors with difficult names and reads them back.
func TestManifest(t *testing.T) {
	t.Parallel()
	want := manifest{}
	var hashes []loader.TensorHash
	names := []string{
		"blk.0.attn_q.weight", "", "two  spaces", " ", `back\slash`, `\n`, "line\nbreak", "return\r", `\\`, "ключ",
		"\x1b[31m\u202e", `\x1b`, "\xff",
	}
	for _, name := range names {
		h := loader.TensorHash{Name: name, Sum: sha256.Sum256([]byte(name))}
		hashes, want[name] = append(hashes, h), h.Sum
	}
	var text bytes.Buffer
	if err := writeManifest(&text, loader.SHA256, hashes); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(text.String(), "\n"); n != len(hashes) {
		t.Errorf("%d lines, want %d:\n%s", n, len(hashes), &text)
	}
	for line := range strings.Lines(text.String()) {
		isHarmless(t, line)
	}
	with, got, err := readManifest(&text)
	if err != nil {
		t.Fatal(err)
	}
	if with != loader.SHA256 {
		t.Errorf("read back as %v", with)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("read back (-want +got):\n%s", diff)
	}
	all := func(string) bool { return true }
	if err := got.compare(loader.SHA256, hashes, all); err != nil {
		t.Error(err)
	}
	if err := got.compare(loader.SHA256, hashes[:2], all); err != nil {
		t.Errorf("two of the tensors: %v", err)
	}
	err = got.compare(loader.SHA256, hashes, func(name string) bool { return name != "line\nbreak" })
	if err == nil || !strings.Contains(err.Error(), `tensor "line\nbreak" is listed and not there`) {
		t.Errorf("a tensor that the file lacks: %v", err)
	}
	hashes[3].Sum[31] ^= 1
	if err := got.compare(loader.SHA256, hashes, all); err == nil || !strings.Contains(err.Error(), `tensor " " has SHA-256`) {
		t.Errorf("one bit differs: %v", err)
	}
}

// TestBadValue loads a model with a scale that is NaN.
func TestBadValue(t *testing.T) {
	t.Parallel()
	sample := filepath.Join("..", "..", "testdata", "tiny-llama.gguf")
	data, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	m, err := gguf.Open(sample)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	var name string
	for _, x := range m.Tensors() {
		if x.Type == gguf.Q4_K {
			name = x.Name
			copy(data[x.Offset:], []byte{0, 0x7e})
			break
		}
	}
	path := filepath.Join(t.TempDir(), "nan.gguf")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"load"}, {"load", "--sync", "--dtype=raw"}, {"verify", "--dtype=f32"}} {
		args = append(args, path, "--device=soft", "--progress=none")
		var stdout, stderr bytes.Buffer
		if got := Main(t.Context(), args, nil, &stdout, &stderr); got != exitOK {
			t.Errorf("%v: exit code %d: %s", args, got, &stderr)
		}
		args = append(args, "--check")
		stdout.Reset()
		got := Main(t.Context(), args, nil, &stdout, &stderr)
		text := stderr.String()
		if got != exitBadModel || !strings.Contains(text, name) || !strings.Contains(text, "is NaN") || stdout.Len() > 0 {
			t.Errorf("%v: exit code %d, want %d, and the tensor: %s", args, got, exitBadModel, text)
		}
	}
}
