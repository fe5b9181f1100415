package readback

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// memory is a file in memory.
type memory struct {
	mu   sync.Mutex
	b    []byte
	fail error // of the writes after the first
	n    int   // writes
}

func (m *memory) WriteAt(b []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.n++; m.fail != nil && m.n > 1 {
		return 0, m.fail
	}
	if need := off + int64(len(b)); need > int64(len(m.b)) {
		m.b = append(m.b, make([]byte, need-int64(len(m.b)))...)
	}
	return copy(m.b[off:], b), nil
}

// file is a safetensors file that was decoded.
type file struct {
	metadata map[string]string
	tensors  map[string]safetensorsEntry
	data     []byte
}

func decode(t *testing.T, b []byte) (f file) {
	t.Helper()
	n := binary.LittleEndian.Uint64(b)
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(b[8:8+n], &raw); err != nil {
		t.Fatal(err)
	}
	f = file{tensors: make(map[string]safetensorsEntry), data: b[8+n:]}
	for name, text := range raw {
		var e safetensorsEntry
		into := any(&e)
		if name == "__metadata__" {
			into = &f.metadata
		}
		if err := json.Unmarshal(text, into); err != nil {
			t.Fatal(name, err)
		}
		if name != "__metadata__" {
			f.tensors[name] = e
		}
	}
	return f
}

func (f *file) bytes(name string) []byte {
	e := f.tensors[name]
	return f.data[e.Offsets[0]:e.Offsets[1]]
}

// TestExports: the file is the same from one device, from several, and from copies, and has the bytes of the model.
func TestExports(t *testing.T) {
	t.Parallel()
	f := open(t, sample)
	for _, policy := range plan.Policies() {
		var first []byte
		for _, x := range []struct {
			devices int
			split   plan.Split
		}{{1, plan.Split{}}, {3, plan.Split{}}, {6, plan.Split{}}, {2, plan.Split{By: plan.SplitNone}}} {
			m := load(t, f, plan.Spec{Policy: policy, Split: x.split}, devices(t, x.devices)...)
			out := new(memory)
			if err := WriteSafetensors(t.Context(), m, out); err != nil {
				t.Fatal(err)
			}
			if first == nil {
				first = out.b
				d := decode(t, first)
				for _, x := range m.Plan().Tensors() {
					b, err := Tensor(t.Context(), m, x.Name)
					if err != nil || !bytes.Equal(d.bytes(x.Name), b) {
						t.Errorf("%v: %s has other bytes in the file: %v", policy, x.Name, err)
					}
				}
				if len(d.tensors) != 40 || !maps.Equal(d.metadata, map[string]string{"format": "pt"}) {
					t.Errorf("%d tensors, metadata %v", len(d.tensors), d.metadata)
				}
			}
			if !bytes.Equal(out.b, first) {
				t.Errorf("%v: the file from %d devices is another (%+v)", policy, x.devices, x.split)
			}
		}
	}
}

// TestExportsOfSlices: what the ranks export says which part of the model it is.
func TestExportsOfSlices(t *testing.T) {
	t.Parallel()
	f := sliced(t, false)
	seen := make(map[string]int)
	for rank, number := range []string{"0", "1"} {
		shard := plan.Shard{By: plan.ShardTensors, Rank: rank, World: 2}
		m := load(t, f, plan.Spec{Policy: plan.F32, Shard: shard}, devices(t, 2)...)
		out := new(memory)
		if err := WriteSafetensors(t.Context(), m, out); err != nil {
			t.Fatal(err)
		}
		d := decode(t, out.b)
		if d.metadata["shard"] != "tensor" || d.metadata["rank"] != number || d.metadata["world"] != "2" {
			t.Errorf("metadata %v", d.metadata)
		}
		var parts map[string]safetensorsSlice
		if err := json.Unmarshal([]byte(d.metadata["slices"]), &parts); err != nil {
			t.Fatal(err)
		}
		for name, part := range parts {
			seen[name]++
			x, _ := f.Tensor(name)
			whole := slices.Clone(x.Shape)
			slices.Reverse(whole)
			n := uint64(0)
			for _, r := range part.Ranges {
				n += r[1] - r[0]
			}
			e := d.tensors[name]
			if !slices.Equal(part.Shape, whole) || e.Shape[part.Dim] != n || part.Type != "F32" || e.DType != "F32" {
				t.Errorf("%s: %+v of %v is %+v", name, part, whole, e)
			}
		}
		if _, ok := parts["blk.0.attn_norm.weight"]; ok || len(d.tensors) != 8 {
			t.Errorf("%d tensors, slices %v", len(d.tensors), parts)
		}
	}
	if len(seen) != 6 || seen["blk.0.attn_output.weight"] != 2 {
		t.Errorf("slices of %v", seen)
	}
}

// TestFailedExports: what cannot be written ends the export.
func TestFailedExports(t *testing.T) {
	t.Parallel()
	full := errors.New("no space left")
	f := open(t, sample)
	m := load(t, f, plan.Spec{}, devices(t, 2)...)
	if err := WriteSafetensors(t.Context(), m, &memory{fail: full}); !errors.Is(err, full) {
		t.Errorf("a disk that is full: %v", err)
	}
	reserved := write(t, nil, []made{{"__metadata__", gguf.F32, []uint64{1}, nil}})
	m = load(t, reserved, plan.Spec{}, devices(t, 1)...)
	out := new(memory)
	err := WriteSafetensors(t.Context(), m, out)
	if err == nil || !strings.Contains(err.Error(), "reserves that name") || out.n != 0 {
		t.Errorf("a tensor of the reserved name: %v, %d writes", err, out.n)
	}
}

// FuzzSafetensors makes headers for tensors of any names, types and shapes, and reads them back with the strictness of
// the format's own readers: unique names, offsets without gaps or overlaps, sizes that fit dtype and shape, aligned
// data.
func FuzzSafetensors(f *testing.F) {
	f.Add("token_embd.weight\nblk.0.attn_q.weight\noutput.weight", []byte{1, 0, 12, 3, 14, 7, 2, 1, 0})
	f.Add("a\n\"\n\\\n<&>\n\u2028\n\x00\n\t\n键\n🚀", []byte{24, 25, 26, 27, 28, 30})
	f.Add("__metadata__\nx", []byte{0})
	f.Add("", []byte{})
	f.Fuzz(func(t *testing.T, names string, shapes []byte) {
		seen := make(map[string]bool)
		next := func() uint64 { // a small number from shapes
			if len(shapes) == 0 {
				return 1
			}
			n := shapes[0]
			shapes = shapes[1:]
			return uint64(n)
		}
		var all []*plan.Tensor
		types := gguf.Types()
		for name := range strings.SplitSeq(names, "\n") {
			if name == "" || len(name) >= 64 || !utf8.ValidString(name) || seen[name] || len(seen) == 200 {
				continue // what the reader of GGUF files refuses does not come here
			}
			seen[name] = true
			typ := types[next()%uint64(len(types))]
			shape := []uint64{uint64(typ.BlockElems()) * (1 + next()), 1 + next()}
			x := &gguf.Tensor{Name: name, Type: typ, Shape: shape}
			target := plan.Policies()[next()%4].Target(typ)
			size, ok := target.Bytes(x.Elems())
			if !ok {
				t.Fatalf("%d elements of %v have no size", x.Elems(), target)
			}
			all = append(all, &plan.Tensor{Tensor: x, Target: target, Bytes: size})
		}
		entries, err := Export{}.tensors(all)
		if seen["__metadata__"] {
			if err == nil {
				t.Fatal("a tensor with the reserved name: no error")
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		header, starts, err := safetensorsHeader(plan.Shard{}, entries)
		if err != nil {
			t.Fatal(err)
		}
		if n := binary.LittleEndian.Uint64(header); n != uint64(len(header)-8) || n%8 != 0 {
			t.Fatalf("a header of %d bytes says that it has %d", len(header)-8, n)
		}
		checkHeader(t, header[8:], all, starts)
	})
}

// checkHeader checks a header, entry by entry in the order of the file.
func checkHeader(t *testing.T, header []byte, all []*plan.Tensor, starts map[*plan.Tensor]int64) {
	t.Helper()
	sizes := map[string]uint64{
		"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
	}
	d := json.NewDecoder(bytes.NewReader(header))
	token := func() any {
		x, err := d.Token()
		if err != nil && err != io.EOF {
			t.Fatal(err)
		}
		return x
	}
	if token() != json.Delim('{') || token() != "__metadata__" {
		t.Fatal("the header does not begin with its metadata")
	}
	var meta map[string]string
	if err := d.Decode(&meta); err != nil {
		t.Fatal(err)
	}
	var at uint64
	for i, x := range all {
		if name := token(); name != x.Name {
			t.Fatalf("entry %d is %q, want %q", i, name, x.Name)
		}
		var e safetensorsEntry
		if err := d.Decode(&e); err != nil {
			t.Fatal(err)
		}
		elems := uint64(1)
		for _, n := range e.Shape {
			elems *= n
		}
		switch size := sizes[e.DType]; {
		case e.Offsets != [2]uint64{at, at + x.Bytes} || starts[x] != int64(at) || size == 0 || elems*size != x.Bytes:
			t.Fatalf("%q: %+v, starts at %d; want %d bytes at %d", x.Name, e, starts[x], x.Bytes, at)
		}
		at += x.Bytes
	}
	if token() != json.Delim('}') || token() != nil {
		t.Fatal("something follows the last entry")
	}
}
