package main

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// TestParseExpectation reads what --expect may name.
func TestParseExpectation(t *testing.T) {
	t.Parallel()
	a, b := sha256.Sum256([]byte("a")), sha256.Sum256([]byte("b"))
	long := sha512.Sum512([]byte("a"))
	ofA, ofB := remote.Expected{Digest: fmt.Sprintf("sha256:%x", a)}, remote.Expected{Digest: fmt.Sprintf("sha256:%x", b)}
	ofLong := remote.Expected{Digest: fmt.Sprintf("sha512:%x", long)}
	pointer := fmt.Sprintf("version https://git-lfs.github.com/spec/v1\noid sha256:%x\nsize 12345\n", a)
	for name, tt := range map[string]struct {
		text    string
		with    loader.HashAlgorithm
		tensors manifest
		named   map[string]remote.Expected
		one     remote.Expected
		err     string
	}{
		"tensors":            {text: fmt.Sprintf("%x  x.weight\n%x  y\n", a, b), tensors: manifest{"x.weight": a, "y": b}},
		"tensors, BLAKE3":    {text: fmt.Sprintf("BLAKE3 (x (y) = z) = %x\n", a), with: loader.BLAKE3, tensors: manifest{"x (y) = z": a}},
		"tensors, escaped":   {text: fmt.Sprintf("\\blake3 (x\\ny) = %x\n", a), with: loader.BLAKE3, tensors: manifest{"x\ny": a}},
		"tensors, tagged":    {text: fmt.Sprintf("SHA2-256 (x) = %x\n", a), err: "line 1: the hash of a tensor"},
		"tensors, SHA-256":   {text: fmt.Sprintf("SHA256 (x) = %x\n%x  y\n", a, b), tensors: manifest{"x": a, "y": b}},
		"tensors, SHA-512":   {text: fmt.Sprintf("%x  x\n", long), err: "line 1: the hash of a tensor"},
		"two algorithms":     {text: fmt.Sprintf("%x  x\nBLAKE3 (y) = %x\n", a, b), err: "line 2 has a blake3"},
		"twice":              {text: fmt.Sprintf("%x  x\n%x  x\n", a, a), err: `tensor "x" occurs twice`},
		"nothing":            {tensors: manifest{}},
		"files":              {text: fmt.Sprintf("%x  m.GGUF\n%x *d/n\n", a, b), named: map[string]remote.Expected{"m.GGUF": ofA, "n": ofB}},
		"files of Windows":   {text: fmt.Sprintf("%x *d\\m.gguf\r\n", a), named: map[string]remote.Expected{"m.gguf": ofA}},
		"file of this name":  {text: fmt.Sprintf("%x  model.bin\n", a), named: map[string]remote.Expected{"model.bin": ofA}},
		"files, SHA-512":     {text: fmt.Sprintf("%x  m.gguf\nSHA256 (n) = %x\n", long, b), named: map[string]remote.Expected{"m.gguf": ofLong, "n": ofB}},
		"file twice":         {text: fmt.Sprintf("%x  a/m.gguf\n%x  b/m.gguf\n", a, b), err: "with different digests"},
		"file twice, alike":  {text: fmt.Sprintf("%x  a/m.gguf\n%x  b/m.gguf\n", a, a), named: map[string]remote.Expected{"m.gguf": ofA}},
		"file, BLAKE3":       {text: fmt.Sprintf("BLAKE3 (m.gguf) = %x\n", a), err: "must be a SHA-256 or a SHA-512"},
		"file, wrong tag":    {text: fmt.Sprintf("SHA512 (m.gguf) = %x\n", a), err: "must be a SHA-256 or a SHA-512"},
		"a digest alone":     {text: fmt.Sprintf("# of the model\n\n%X\n", a), one: ofA},
		"two digests alone":  {text: fmt.Sprintf("%x\n%x\n", a, b), err: "line 1 is not of the form"},
		"alone, and a name":  {text: fmt.Sprintf("%x  x\n%x\n", a, b), err: "line 2 is not of the form"},
		"a pointer":          {text: pointer, one: remote.Expected{Digest: ofA.Digest, Size: 12345}},
		"pointer of Windows": {text: strings.ReplaceAll(pointer, "\n", "\r\n"), one: remote.Expected{Digest: ofA.Digest, Size: 12345}},
		"pointer, no size":   {text: strings.Replace(pointer, "size", "sise", 1), err: "without oid or size"},
		"pointer, bad size":  {text: strings.Replace(pointer, "12345", "-5", 1), err: `size is "-5"`},
		"pointer, bad oid":   {text: strings.Replace(pointer, "sha256:", "sha1:", 1), err: "is no digest"},
		"one space":          {text: fmt.Sprintf("%x x\n", a), err: "line 1 is not of the form"},
		"MD5":                {text: "d41d8cd98f00b204e9800998ecf8427e  m.gguf\n", err: "line 1 is not of the form"},
		"no list":            {text: "GGUF\x03\x00\x00\x00", err: "line 1 is not of the form"},
	} {
		e, err := parseExpectation("list", "dir/model.bin", []byte(tt.text))
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: error %v, want %q", name, err, tt.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if e.files == nil {
			e.files = new(expectedFiles)
		}
		diff := cmp.Diff(tt.tensors, e.tensors) + cmp.Diff(tt.named, e.files.named) + cmp.Diff(tt.one, e.files.one)
		if diff != "" || e.with != tt.with {
			t.Errorf("%s: %v, want %v; -want +got:\n%s", name, e.with, tt.with, diff)
		}
	}
}

// TestHashTarget takes values of --hash apart.
func TestHashTarget(t *testing.T) {
	t.Parallel()
	for value, want := range map[string]struct {
		with loader.HashAlgorithm
		path string
	}{
		"":                {loader.SHA256, ""},
		"-":               {loader.SHA256, "-"},
		"sums":            {loader.SHA256, "sums"},
		"sha256":          {loader.SHA256, "-"},
		"sha256:sums":     {loader.SHA256, "sums"},
		"blake3":          {loader.BLAKE3, "-"},
		"BLAKE3:":         {loader.BLAKE3, "-"},
		"blake3:-":        {loader.BLAKE3, "-"},
		"blake3:a:b":      {loader.BLAKE3, "a:b"},
		"./blake3":        {loader.SHA256, "./blake3"},
		`C:\sums`:         {loader.SHA256, `C:\sums`},
		"blake3.txt":      {loader.SHA256, "blake3.txt"},
		"sums:blake3":     {loader.SHA256, "sums:blake3"},
		"sha256:{rank}.t": {loader.SHA256, "{rank}.t"},
	} {
		if with, path := hashTarget(value); with != want.with || path != want.path {
			t.Errorf("%q: %v to %q, want %v to %q", value, with, path, want.with, want.path)
		}
	}
}

// TestExpectSplit compares the parts of a split model: a list has all, and one digest alone is not enough.
func TestExpectSplit(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var first, list, wrong string
	for name, b := range fake.Split("m", 2, 100_000) {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
		list += fmt.Sprintf("%x  %s\n", sha256.Sum256(b), name)
		wrong += fmt.Sprintf("%x  %s\n", sha256.Sum256(nil), name)
		if strings.Contains(name, "00001-of") {
			first = fmt.Sprintf("sha256:%x", sha256.Sum256(b))
		}
	}
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	half, _, _ := strings.Cut(list, "\n")
	for expect, want := range map[string]struct {
		code exitCode
		says string
	}{
		write("list", list):      {exitOK, "2 files have the right digest"},
		write("half", half+"\n"): {exitMismatch, "does not list"},
		write("wrong", wrong):    {exitMismatch, "wrong digest"},
		first:                    {exitUsage, "the model has several"},
	} {
		var stdout, stderr bytes.Buffer
		args := []string{"load", filepath.Join(dir, "m-00001-of-00002.gguf"), "--device=soft", "--progress=none", "--expect", expect}
		code := Main(t.Context(), args, nil, &stdout, &stderr)
		if text := stdout.String() + stderr.String(); code != want.code || !strings.Contains(text, want.says) {
			t.Errorf("--expect %s: exit code %d, want %d and %q:\n%s", filepath.Base(expect), code, want.code, want.says, text)
		}
	}
}

// FuzzParseExpectation reads arbitrary files. What is taken for a list of tensors can be written and read again.
func FuzzParseExpectation(f *testing.F) {
	sum := sha256.Sum256(nil)
	for _, text := range []string{
		fmt.Sprintf("%x  x.weight\n\\%x  y\\nz\n", sum, sum), fmt.Sprintf("BLAKE3 (x) = %x\n", sum),
		fmt.Sprintf("%x *m.gguf\r\n", sum), fmt.Sprintf("%x\n", sum),
		fmt.Sprintf("version https://git-lfs.github.com/spec/v1\noid sha256:%x\nsize 5\n", sum),
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		e, err := parseExpectation("list", "model.bin", text)
		if err != nil || e.tensors == nil {
			return
		}
		var hashes []loader.TensorHash
		for name, sum := range e.tensors {
			hashes = append(hashes, loader.TensorHash{Name: name, Sum: sum})
		}
		var again bytes.Buffer
		if err := writeManifest(&again, e.with, hashes); err != nil {
			t.Fatal(err)
		}
		with, m, err := readManifest(&again)
		if err != nil || len(hashes) > 0 && with != e.with || cmp.Diff(e.tensors, m) != "" {
			t.Errorf("%q became %v, %q, %v", text, with, m, err)
		}
	})
}
