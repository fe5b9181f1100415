package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// contents is a tensor as it was read back.
type contents struct {
	dtype string
	shape []uint64
	bytes []byte
	sum   [sha256.Size]byte // of the bytes, with all NaNs the same

	parts  []extent // of a tensor that was put together, which bytes there are
	copies int      // how many ranks have the whole tensor
}

// extent is a range of bytes.
type extent struct{ start, end uint64 }

// sumOf returns the hash of the bytes. The device's conversions make other NaNs than the CPU's do.
func (t *contents) sumOf() [sha256.Size]byte {
	b := t.bytes
	switch t.dtype {
	case "F32":
		for i := 0; i+4 <= len(b); i += 4 {
			if x := binary.LittleEndian.Uint32(b[i:]); x&0x7fffffff > 0x7f800000 {
				binary.LittleEndian.PutUint32(b[i:], 0x7fffffff)
			}
		}
	case "F16", "BF16":
		infinity := map[string]uint16{"F16": 0x7c00, "BF16": 0x7f80}[t.dtype]
		for i := 0; i+2 <= len(b); i += 2 {
			if x := binary.LittleEndian.Uint16(b[i:]); x&0x7fff > infinity {
				binary.LittleEndian.PutUint16(b[i:], 0x7fff)
			}
		}
	}
	return sha256.Sum256(b)
}

// safetensors is a file that was read back.
type safetensors struct {
	metadata map[string]string
	tensors  map[string]safetensorsEntry
	data     []byte
}

type safetensorsEntry struct {
	DType   string    `json:"dtype"`
	Shape   []uint64  `json:"shape"`
	Offsets [2]uint64 `json:"data_offsets"`
}

// safetensorsPart is what the metadata say about a slice.
type safetensorsPart struct {
	Dim    int         `json:"dim"`
	Ranges [][2]uint64 `json:"ranges"`
	Shape  []uint64    `json:"shape"` // of the whole
	Type   gguf.Type   `json:"type"`
}

func readSafetensors(path string) (*safetensors, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint64(b)
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(b[8:8+n], &raw); err != nil {
		return nil, err
	}
	f := &safetensors{tensors: make(map[string]safetensorsEntry), data: b[8+n:]}
	for name, text := range raw {
		var e safetensorsEntry
		if name == "__metadata__" {
			err = json.Unmarshal(text, &f.metadata)
		} else if err = json.Unmarshal(text, &e); err == nil {
			f.tensors[name] = e
		}
		if err != nil {
			return nil, err
		}
	}
	return f, nil
}

func (f *safetensors) bytes(t safetensorsEntry) []byte { return f.data[t.Offsets[0]:t.Offsets[1]] }

// assembly puts together what the ranks have.
type assembly struct {
	by         string
	world      int
	replicated *regexp.Regexp // with layers, tensors that every rank has
	tensors    map[string]*contents
}

func newAssembly(by string, world int, c combination) *assembly {
	a := &assembly{by: by, world: world, tensors: make(map[string]*contents)}
	if c.is("shard-rule", "replicate") {
		a.replicated = regexp.MustCompile(`attn_[kv]\.`)
	}
	return a
}

// add takes in the file of a rank.
func (a *assembly) add(path string, rank int) error {
	f, err := readSafetensors(path)
	if err != nil {
		return err
	}
	parts := make(map[string]safetensorsPart)
	if a.by != "none" {
		if f.metadata["rank"] != strconv.Itoa(rank) || f.metadata["world"] != strconv.Itoa(a.world) || f.metadata["shard"] != a.by {
			return fmt.Errorf("the metadata are %v", f.metadata)
		}
		if err := json.Unmarshal([]byte(f.metadata["slices"]), &parts); err != nil {
			return err
		}
	}
	for name, e := range f.tensors {
		t, b := a.tensors[name], f.bytes(e)
		part, sliced := parts[name]
		switch {
		case t == nil:
			t = &contents{dtype: e.DType, shape: e.Shape, bytes: b}
			a.tensors[name] = t
			if sliced {
				t.shape, t.bytes = part.Shape, nil
			}
		case t.dtype != e.DType || !sliced && (!slices.Equal(t.shape, e.Shape) || !bytes.Equal(t.bytes, b)):
			return fmt.Errorf("tensor %q is not the same as before", name)
		}
		if !sliced {
			t.copies++
		} else if err := t.put(part, b); err != nil {
			return fmt.Errorf("tensor %q: %w", name, err)
		}
	}
	return nil
}

// put puts a slice where it belongs.
func (t *contents) put(part safetensorsPart, b []byte) error {
	inner, elems := uint64(1), uint64(1)
	for i, n := range part.Shape {
		if elems *= n; i > part.Dim {
			inner *= n
		}
	}
	size, ok := part.Type.Bytes(elems)
	if !ok {
		return fmt.Errorf("%d elements are not whole blocks of %v", elems, part.Type)
	}
	if t.bytes == nil {
		t.bytes = make([]byte, size)
	}
	if t.dtype == "U8" {
		t.shape = []uint64{size}
	}
	bytesOf := func(n uint64) uint64 {
		return n * inner * uint64(part.Type.BlockBytes()) / uint64(part.Type.BlockElems())
	}
	for at := uint64(0); at < size; at += bytesOf(part.Shape[part.Dim]) {
		for _, r := range part.Ranges {
			x := extent{at + bytesOf(r[0]), at + bytesOf(r[1])}
			if x.end > size || x.end-x.start > uint64(len(b)) {
				return fmt.Errorf("its ranges %v do not fit its %d bytes", part.Ranges, len(b))
			}
			b = b[copy(t.bytes[x.start:x.end], b):]
			t.parts = append(t.parts, x)
		}
	}
	if len(b) > 0 {
		return fmt.Errorf("%d bytes are in none of its ranges", len(b))
	}
	return nil
}

// compare wants every tensor of the plain load, and nothing else, with the same bytes, and each of these as often as
// the ranks should have it.
func (a *assembly) compare(ref *reference) error {
	if len(a.tensors) != len(ref.tensors) {
		return fmt.Errorf("there are %d tensors, and %d in the plain load", len(a.tensors), len(ref.tensors))
	}
	for name, want := range ref.tensors {
		got := a.tensors[name]
		if got == nil {
			return fmt.Errorf("tensor %q is missing", name)
		}
		copies := 1
		if a.by == "tensor" || a.replicated != nil && a.replicated.MatchString(name) {
			copies = a.world
		}
		if err := got.once(); err != nil {
			return fmt.Errorf("tensor %q: %w", name, err)
		}
		switch {
		case got.parts != nil && got.copies > 0:
			return fmt.Errorf("tensor %q is whole on %d ranks, and divided among others", name, got.copies)
		case got.parts == nil && got.copies != copies:
			return fmt.Errorf("tensor %q is there %d times, want %d", name, got.copies, copies)
		case got.dtype != want.dtype || !slices.Equal(got.shape, want.shape):
			return fmt.Errorf("tensor %q is %s %d, want %s %d", name, got.dtype, got.shape, want.dtype, want.shape)
		case got.sumOf() != want.sum:
			return fmt.Errorf("tensor %q has other bytes than in the plain load", name)
		}
	}
	return nil
}

// once checks that the slices together are the tensor, every byte once.
func (t *contents) once() error {
	if t.parts == nil {
		return nil
	}
	slices.SortFunc(t.parts, func(a, b extent) int { return cmp.Compare(a.start, b.start) })
	var at uint64
	for _, x := range t.parts {
		if x.start != at {
			return fmt.Errorf("the slices go on at byte %d, want %d", x.start, at)
		}
		at = x.end
	}
	if at != uint64(len(t.bytes)) {
		return fmt.Errorf("the slices end at byte %d of %d", at, len(t.bytes))
	}
	return nil
}
