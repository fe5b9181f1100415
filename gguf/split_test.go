package gguf

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// testPart is a part of a split model with tensors of 4 bytes, each named.
type testPart struct {
	name    string
	options WriterOptions
	keys    map[string]any
	tensors []string
}

// threeParts is a sound model, for tests to break.
func threeParts() []*testPart {
	var parts []*testPart
	for i, tensors := range [][]string{{"a", "b"}, {"c"}, {"d"}} {
		parts = append(parts, &testPart{
			name:    fmt.Sprintf("m-%05d-of-00003.gguf", i+1),
			keys:    map[string]any{splitNoKey: uint16(i), splitCountKey: uint16(3), splitTensorsKey: int32(4)},
			tensors: tensors,
		})
	}
	return parts
}

// bytes is the part as a file.
func (p *testPart) bytes(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w := NewWriter(&b, p.options)
	for k, v := range p.keys {
		w.Set(k, v)
	}
	for _, name := range p.tensors {
		w.AddTensor(name, I32, 1)
	}
	w.WriteHeader()
	for _, name := range p.tensors {
		w.WriteTensor(name, []byte(strings.Repeat(name, 4))[:4])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// merged makes one whole file called name of the parts, as a merging program does: the count is 0 or 1, and the other
// keys of the split are those of some part.
func merged(name string, count uint16) func([]*testPart) []*testPart {
	return func([]*testPart) []*testPart {
		keys := map[string]any{splitNoKey: uint16(2), splitCountKey: count, splitTensorsKey: int32(99)}
		return []*testPart{{name: name, keys: keys, tensors: []string{"a", "b", "c", "d"}}}
	}
}

func writeParts(t *testing.T, dir string, parts []*testPart) {
	t.Helper()
	for _, p := range parts {
		writeFile(t, filepath.Join(dir, p.name), p.bytes(t))
	}
}

func TestSplitAccepted(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		alter func(p []*testPart) []*testPart
		open  string
		parts int
	}{
		{name: "plain", parts: 3},
		{name: "count as uint64", parts: 3, alter: func(p []*testPart) []*testPart {
			p[2].keys[splitCountKey] = uint64(3)
			return p
		}},
		{name: "no tensor count", parts: 3, alter: func(p []*testPart) []*testPart {
			delete(p[1].keys, splitTensorsKey)
			return p
		}},
		{name: "first part without tensors", parts: 3, alter: func(p []*testPart) []*testPart {
			p[0].tensors, p[1].tensors = nil, []string{"a", "b", "c"}
			return p
		}},
		{name: "alignment only in the first part", parts: 3, alter: func(p []*testPart) []*testPart {
			p[0].options.Alignment = 64
			return p
		}},
		{name: "one part", open: "one.gguf", parts: 1, alter: func(p []*testPart) []*testPart {
			keys := map[string]any{splitNoKey: uint16(0), splitCountKey: uint16(1)}
			return []*testPart{{name: "one.gguf", keys: keys, tensors: []string{"d"}}}
		}},
		{name: "merged, count 0 and the other keys left behind", open: "merged.gguf", parts: 1, alter: merged("merged.gguf",
			uint16(0))},
		{name: "merged, count 1 and the other keys left behind", open: "merged.gguf", parts: 1, alter: merged("merged.gguf",
			uint16(1))},
		{
			name: "merged, and named as a part", open: "m-00001-of-00003.gguf", parts: 1,
			alter: merged("m-00001-of-00003.gguf", uint16(0)),
		},
		{name: "name alone", open: "m-00001-of-00001.gguf", parts: 1, alter: func(p []*testPart) []*testPart {
			return []*testPart{{name: "m-00001-of-00001.gguf", tensors: []string{"d"}}}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			parts := threeParts()
			if tt.alter != nil {
				parts = tt.alter(parts)
			}
			if tt.open == "" {
				tt.open = parts[1].name
			}
			dir := t.TempDir()
			writeParts(t, dir, parts)
			m := openFile(t, filepath.Join(dir, tt.open))
			if len(m.Parts()) != tt.parts {
				t.Fatalf("%d parts, want %d", len(m.Parts()), tt.parts)
			}
			d, ok := m.Tensor("d")
			if !ok || d.Part != tt.parts-1 || string(m.Data(d)) != "dddd" {
				t.Errorf("tensor d: %+v, %v", d, ok)
			}
		})
	}
}

func TestSplitRefused(t *testing.T) {
	t.Parallel()
	set := func(part int, key string, value any) func(p []*testPart) {
		return func(p []*testPart) { p[part].keys[key] = value }
	}
	drop := func(part int, key string) func(p []*testPart) {
		return func(p []*testPart) { delete(p[part].keys, key) }
	}
	tests := []struct {
		name  string
		alter func(p []*testPart)
		path  string // of the error; default: the second part, which is opened
		is    error  // default: ErrSplit
		field string
		rule  string
	}{
		{name: "split.no = split.count", alter: set(1, splitNoKey, uint16(3)), field: splitNoKey, rule: "3 of 3"},
		{name: "split.no of another part", alter: set(1, splitNoKey, uint16(0)), field: splitNoKey, rule: "part 1"},
		{name: "split.no missing", alter: drop(1, splitNoKey), field: splitNoKey, rule: "missing"},
		{name: "split.no negative", alter: set(1, splitNoKey, int32(-1)), field: splitNoKey, rule: "-1 (int32)"},
		{name: "split.no as string", alter: set(1, splitNoKey, "1"), field: splitNoKey, rule: "string"},
		{
			name: "split.count 0 in another part", alter: set(2, splitCountKey, uint16(0)), path: "m-00003-of-00003.gguf",
			field: splitNoKey, rule: "part 1 of 1 where 3 of 3",
		},
		{name: "split.count 2 of 3 files", alter: set(1, splitCountKey, uint16(2)), field: splitCountKey, rule: "says 3"},
		{name: "split.count 2^63", alter: set(1, splitCountKey, uint64(1)<<63), field: splitCountKey, rule: "no count"},
		{name: "split.count missing", alter: drop(1, splitCountKey), field: splitCountKey, rule: "missing"},
		{
			name: "split.count differs in another part", alter: set(2, splitCountKey, uint16(4)),
			path: "m-00003-of-00003.gguf", field: splitCountKey, rule: "4",
		},
		{
			name: "split.tensors.count too large", alter: set(1, splitTensorsKey, int32(5)),
			field: splitTensorsKey, rule: "hold 4",
		},
		{
			name: "split.tensors.count negative", alter: set(0, splitTensorsKey, int32(-1)), path: "m-00001-of-00003.gguf",
			field: splitTensorsKey, rule: "-1",
		},
		{
			name: "same part twice", alter: func(p []*testPart) { *p[2] = *p[0]; p[2].name = "m-00003-of-00003.gguf" },
			path: "m-00003-of-00003.gguf", field: splitNoKey, rule: "part 1",
		},
		{
			name: "a part is missing", alter: func(p []*testPart) { p[2].name = "elsewhere.gguf" },
			path: "m-00003-of-00003.gguf", rule: "part 3 of the 3",
		},
		{
			name: "part with another name", alter: func(p []*testPart) { p[1].name = "m.gguf" }, path: "m.gguf",
			field: splitCountKey, rule: "NAME-00002-of-00003.gguf",
		},
		{
			name: "alignments differ", alter: func(p []*testPart) { p[2].options.Alignment = 64 },
			path: "m-00003-of-00003.gguf", field: alignmentKey, rule: "64, but 32",
		},
		{
			name: "versions differ", alter: func(p []*testPart) { p[2].options.Version = 2 },
			path: "m-00003-of-00003.gguf", field: "version", rule: "version 2, but 3",
		},
		{name: "uuids differ", alter: func(p []*testPart) {
			p[0].keys["general.uuid"], p[2].keys["general.uuid"] = "x", "y"
		}, path: "m-00003-of-00003.gguf", field: "general.uuid", rule: `"y", but "x"`},
		{
			name: "tensor in two parts", alter: func(p []*testPart) { p[2].tensors = []string{"a"} },
			path: "m-00003-of-00003.gguf", is: errDuplicateTensor, field: "name",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			parts := threeParts()
			tt.alter(parts)
			dir := t.TempDir()
			writeParts(t, dir, parts)
			if tt.is == nil {
				tt.is = ErrSplit
			}
			if tt.path == "" {
				tt.path = parts[1].name
			}
			m, err := Open(filepath.Join(dir, parts[1].name))
			fe, ok := errors.AsType[*FormatError](err)
			if m != nil || !ok || !errors.Is(err, tt.is) {
				t.Fatalf("got %v, %v; want a FormatError that matches %v", m, err, tt.is)
			}
			if filepath.Base(fe.Path) != tt.path || fe.Field != tt.field || !strings.Contains(err.Error(), tt.rule) {
				t.Errorf("got %v\nwant path %s, field %q, %q", err, tt.path, tt.field, tt.rule)
			}
		})
	}
}

func TestSplitBigEndianPart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeParts(t, dir, threeParts())
	writeFile(t, filepath.Join(dir, "m-00003-of-00003.gguf"), raw{version: 3 << 24}.bytes())
	if _, err := Open(filepath.Join(dir, "m-00001-of-00003.gguf")); !errors.Is(err, ErrBigEndian) {
		t.Errorf("got %v, want %v", err, ErrBigEndian)
	}
}

func TestSplitMissingPartMatchesNotExist(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeParts(t, dir, threeParts()[:1])
	if _, err := Open(filepath.Join(dir, "m-00001-of-00003.gguf")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want %v", err, fs.ErrNotExist)
	}
}

// TestSplitStaysInDirectory: whatever the path looks like, the other parts are looked for beside the one that was
// named.
func TestSplitStaysInDirectory(t *testing.T) {
	outer := t.TempDir()
	inner := filepath.Join(outer, "..-00001-of-00003.gguf") // a directory whose name looks like a part, with dots in front
	if err := os.Mkdir(inner, 0o700); err != nil {
		t.Fatal(err)
	}
	parts := threeParts()
	for i, p := range parts {
		p.name = fmt.Sprintf("..-%05d-of-00003.gguf", i+1)
	}
	writeParts(t, inner, parts)
	t.Chdir(inner)
	for _, path := range []string{
		parts[0].name,
		"." + string(filepath.Separator) + parts[1].name,
		filepath.Join("..", filepath.Base(inner), parts[2].name),
	} {
		m := openFile(t, path)
		for _, p := range m.Parts() {
			if filepath.Dir(p.Path) != filepath.Dir(path) || !strings.HasPrefix(filepath.Base(p.Path), "..-0000") {
				t.Errorf("Open(%q) opened %q", path, p.Path)
			}
		}
	}
}
