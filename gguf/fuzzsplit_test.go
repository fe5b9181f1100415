package gguf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// FuzzOpenSplit opens a model of three files that may be anything; an empty one is missing. What is refused is refused
// with a FormatError or, of a file that is missing, a PathError; of what is accepted, every tensor can be had.
func FuzzOpenSplit(f *testing.F) {
	add := func(open uint8, parts []*testPart) {
		var data [3][]byte
		for i, p := range parts {
			data[i] = p.bytes(f)
		}
		f.Add(open, data[0], data[1], data[2])
	}
	for open := range uint8(3) {
		add(open, threeParts())
	}
	add(0, threeParts()[:2]) // one is missing
	for _, alter := range []func(p []*testPart){
		func(p []*testPart) { p[2] = p[0] },
		func(p []*testPart) { p[2].tensors = []string{"a"} },
		func(p []*testPart) { p[2].options.Version = 2 },
		func(p []*testPart) { p[0].options.Alignment = 64 },
		func(p []*testPart) { p[1].keys[splitCountKey] = uint64(1) << 63 },
		func(p []*testPart) { p[1].keys[splitTensorsKey] = int32(-1) },
		func(p []*testPart) { p[0].keys, p[0].tensors = map[string]any{"general.uuid": "x"}, nil },
	} {
		parts := threeParts()
		alter(parts)
		add(1, parts)
	}
	var headers [3][]byte
	for i := range headers {
		headers[i] = readFile(f, filepath.Join(goldenDir, fmt.Sprintf("tiny-llama-%05d-of-00003.header", i+1)))
	}
	f.Add(uint8(2), headers[0], headers[1], headers[2])

	dir := f.TempDir() // one for all: making and removing directories takes longer than all the rest
	f.Fuzz(func(t *testing.T, open uint8, a, b, c []byte) {
		size := 0
		for i, data := range [][]byte{a, b, c} {
			path := filepath.Join(dir, threeParts()[i].name)
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			if len(data) > 0 {
				writeFile(t, path, data)
			}
			size += len(data)
		}
		if err := trySplit(filepath.Join(dir, threeParts()[open%3].name), size); err != nil {
			t.Error(err)
		}
	})
}

// trySplit opens a model whose files have size bytes.
func trySplit(path string, size int) error {
	// As for a single file, and some more for the calls of the operating system.
	limit := 256<<10 + 40*uint64(size)
	before := allocated()
	m, err := Open(path)
	if n := allocated() - before; n > limit {
		return fmt.Errorf("%d bytes allocated for files of %d", n, size)
	}
	if err != nil {
		_, isFormat := errors.AsType[*FormatError](err)
		_, isPath := errors.AsType[*fs.PathError](err)
		if m != nil || !isFormat && !isPath {
			return fmt.Errorf("got a model: %t, and the error %w", m != nil, err)
		}
		return nil
	}
	return errors.Join(walkFile(m), m.Close())
}

// walkFile reports a tensor that cannot be had under its name, or not in full.
func walkFile(m *File) error {
	for i := range m.Tensors() {
		t := &m.Tensors()[i]
		if same, ok := m.Tensor(t.Name); !ok || same != t {
			return fmt.Errorf("tensor %q is not found by its name", t.Name)
		}
		if n := int64(len(m.Data(t))); n != max(t.Size, 0) || t.Offset < m.Parts()[t.Part].DataOffset {
			return fmt.Errorf("tensor %+v: %d bytes of data", t, n)
		}
	}
	for _, p := range m.Parts() {
		if err := walk(p); err != nil {
			return err
		}
	}
	return nil
}
