package loader

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// FuzzSafetensors makes headers for tensors of any names, types and shapes, and reads them back with the strictness of the
// format's own readers: unique names, offsets without gaps or overlaps, sizes that fit dtype and shape, aligned data.
func FuzzSafetensors(f *testing.F) {
	f.Add("token_embd.weight\nblk.0.attn_q.weight\noutput.weight", []byte{1, 0, 12, 3, 14, 7, 2, 1, 0})
	f.Add("a\n\"\n\\\n<&>\n\u2028\n\x00\n\t\n键\n🚀", []byte{24, 25, 26, 27, 28, 30})
	f.Add("__metadata__\nx", []byte{0})
	f.Add("", []byte{})
	f.Fuzz(func(t *testing.T, names string, shapes []byte) {
		p := &Plan{}
		seen := make(map[string]bool)
		next := func() uint64 { // a small number from shapes
			if len(shapes) == 0 {
				return 1
			}
			n := shapes[0]
			shapes = shapes[1:]
			return uint64(n)
		}
		reserved := false
		types := gguf.Types()
		for name := range strings.SplitSeq(names, "\n") {
			if name == "" || len(name) >= 64 || !utf8.ValidString(name) || seen[name] || len(seen) == 200 {
				continue // what the reader of GGUF files refuses does not come here
			}
			seen[name] = true
			reserved = reserved || name == "__metadata__"
			typ := types[next()%uint64(len(types))]
			shape := []uint64{uint64(typ.BlockElems()) * (1 + next()), 1 + next()}
			x := &gguf.Tensor{Name: name, Type: typ, Shape: shape}
			target := DTypes()[next()%4].Target(typ)
			size, ok := target.Bytes(x.Elems())
			if !ok {
				t.Fatalf("%d elements of %v have no size", x.Elems(), target)
			}
			p.Tensors = append(p.Tensors, PlannedTensor{Tensor: x, Target: target, Bytes: size})
		}
		w := &Model{plan: p}
		header, starts, err := w.safetensorsHeader()
		if reserved {
			if err == nil {
				t.Fatal("a tensor with the reserved name: no error")
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if n := binary.LittleEndian.Uint64(header); n != uint64(len(header)-8) || n%8 != 0 {
			t.Fatalf("a header of %d bytes says that it has %d", len(header)-8, n)
		}
		readSafetensors(t, header[8:], p, starts)
	})
}

// readSafetensors checks a header, entry by entry in the order of the file.
func readSafetensors(t *testing.T, header []byte, p *Plan, starts []uint64) {
	t.Helper()
	sizes := map[string]uint64{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
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
	for i := range p.Tensors {
		x := &p.Tensors[i]
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
		if e.Offsets != [2]uint64{at, at + x.Bytes} || starts[i] != at || sizes[e.DType] == 0 || elems*sizes[e.DType] != x.Bytes {
			t.Fatalf("%q: %+v, starts at %d; want %d bytes at %d", x.Name, e, starts[i], x.Bytes, at)
		}
		at += x.Bytes
	}
	if token() != json.Delim('}') || token() != nil {
		t.Fatal("something follows the last entry")
	}
}
