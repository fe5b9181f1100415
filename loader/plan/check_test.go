package plan

import (
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// told is a tensor as another process describes it: 64 elements of F32 as F16 at byte at of the first allocation.
func told(name string, at uint64) Tensor {
	return Tensor{
		Tensor: &gguf.Tensor{Name: name, Type: gguf.F32, Shape: []uint64{16, 4}, Size: 256}, Target: gguf.F16, Bytes: 128,
		DeviceOffset: at,
	}
}

// twoGroups is what FromGroups accepts: two devices with a copy each, and one with the rest.
func twoGroups() []Group {
	return []Group{
		{Devices: []int{2, 0}, Arenas: []uint64{1024}, Tensors: []Tensor{told("a", 0), told("b", 512)}},
		{Devices: []int{1}, Arenas: []uint64{100, 384}, Tensors: []Tensor{{
			Tensor: &gguf.Tensor{Name: "c", Type: gguf.Q8_0, Shape: []uint64{32, 2}, Size: 68}, Target: gguf.Q8_0, Bytes: 68,
			Slice: &Slice{Dim: 1, Ranges: [][2]uint64{{0, 1}, {3, 4}}, Shape: []uint64{32, 4}},
		}, {
			Tensor: &gguf.Tensor{Name: "d", Type: gguf.I8, Shape: nil, Size: 1}, Target: gguf.I8, Bytes: 1, Arena: 1,
			DeviceOffset: 256,
		}}},
	}
}

func TestFromGroups(t *testing.T) {
	t.Parallel()
	p, err := FromGroups(Spec{Policy: F16}, twoGroups(), 3, 10, 4096)
	if err != nil {
		t.Fatal(err)
	}
	if p.Len() != 4 || p.ModelTensors != 10 || p.FileBytes != 4096 || p.Spec.Shard.World != 1 {
		t.Errorf("%+v", p)
	}
	if p.DeviceBytes() != 2*1024+484 || p.ReadBytes() != 512+69 || p.TensorBytes() != 256+69 {
		t.Errorf("%d, %d and %d bytes", p.DeviceBytes(), p.ReadBytes(), p.TensorBytes())
	}
	if g, i, ok := p.Find("d"); g != 1 || i != 1 || !ok {
		t.Errorf("d is tensor %d of group %d, %v", i, g, ok)
	}
	if _, _, ok := p.Find("e"); ok || p.GroupOf(3) != nil {
		t.Error("something is found that is not there")
	}
	if p.GroupOf(0) != p.GroupOf(2) || p.GroupOf(0) == p.GroupOf(1) {
		t.Error("devices are in other groups")
	}
}

// TestBadGroups wants whatever cannot be in memory to be refused, as groups may come from another process.
func TestBadGroups(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		name   string
		change func(g []Group) []Group
		want   string
	}{
		{"no groups", func([]Group) []Group { return nil }, "3 of 3 devices are in no group"},
		{"a device in two groups", func(g []Group) []Group { g[1].Devices[0] = 2; return g }, "device 2 is in two groups"},
		{"a device twice in a group", func(g []Group) []Group { g[0].Devices[0] = 0; return g }, "device 0 is in two groups"},
		{"a device beyond", func(g []Group) []Group { g[1].Devices[0] = 3; return g }, "device 3; the plan has 3"},
		{"a device below", func(g []Group) []Group { g[1].Devices[0] = -1; return g }, "device -1"},
		{"a device missing", func(g []Group) []Group { g[0].Devices = []int{0}; return g }, "1 of 3 devices are in no group"},
		{"a group without devices", func(g []Group) []Group {
			return append(g, Group{Tensors: []Tensor{told("x", 0)}, Arenas: []uint64{1024}})
		}, "group 2 of 3 has no device"},
		{"a name twice", func(g []Group) []Group { g[0].Tensors[1].Name = "a"; return g }, `"a" is there twice`},
		{"a name in two groups", func(g []Group) []Group { g[1].Tensors[0].Name = "b"; return g }, `"b" is there twice`},
		{"an overlap", func(g []Group) []Group {
			g[0].Tensors[0].Shape[1], g[0].Tensors[0].Size, g[0].Tensors[0].Bytes = 24, 1536, 768
			return g
		}, `"b": byte 512 of allocation 0 is before the end of another`},
		{"another order", func(g []Group) []Group { slices.Reverse(g[0].Tensors); return g }, `"a": byte 0 of allocation 0`},
		{"allocations in another order", func(g []Group) []Group {
			g[1].Arenas[0] = 1024
			slices.Reverse(g[1].Tensors)
			return g
		}, `"c": byte 0 of allocation 0`},
		{"the end outside", func(g []Group) []Group { g[0].Arenas[0] = 512 + 127; return g }, "128 bytes at 512 are not in"},
		{"the beginning outside", func(g []Group) []Group {
			g[0].Tensors[1].DeviceOffset = math.MaxUint64 &^ 255
			return g
		}, "are not in allocation 0"},
		{"no such allocation", func(g []Group) []Group { g[0].Tensors[1].Arena = 1; return g }, "are not in allocation 1"},
		{"a negative allocation", func(g []Group) []Group { g[0].Tensors[0].Arena = -1; return g }, "in allocation -1"},
		{"no allocation", func(g []Group) []Group { g[0].Arenas = nil; return g }, "are not in allocation 0"},
		{"not aligned", func(g []Group) []Group { g[0].Tensors[1].DeviceOffset = 500; return g }, "no multiple of 256"},
		{"allocations that overflow", func(g []Group) []Group {
			g[0].Arenas = []uint64{1 << 63, 1 << 63}
			return g
		}, "the allocations' sizes together overflow"},
		{"no description", func(g []Group) []Group { g[0].Tensors[0].Tensor = nil; return g }, "no description"},
		{"a size that is wrong", func(g []Group) []Group { g[0].Tensors[0].Size = 255; return g }, "in 255 bytes cannot be"},
		{"a negative size", func(g []Group) []Group { g[0].Tensors[0].Size = -1; return g }, "in -1 bytes cannot be"},
		{"a device size that is wrong", func(g []Group) []Group {
			g[0].Tensors[0].Bytes = 0
			return g
		}, "in 0 bytes on the device cannot be"},
		{"a shape that overflows", func(g []Group) []Group {
			g[0].Tensors[0].Shape = []uint64{0, 1 << 32, 1 << 32}
			return g
		}, "overflows"},
		{"a foreign type that is converted", func(g []Group) []Group { g[0].Tensors[0].Type = 144; return g }, "cannot be"},
		{"a foreign target", func(g []Group) []Group { g[0].Tensors[0].Target = 144; return g }, "cannot be"},
		{"an impossible conversion", func(g []Group) []Group {
			g[0].Tensors[0].Target, g[0].Tensors[0].Bytes = gguf.Q8_0, 68
			return g
		}, "nothing is converted to blocks"},
		{"a slice of another shape", func(g []Group) []Group {
			g[1].Tensors[0].Slice.Ranges[0][1] = 2
			return g
		}, `"c": [[0 2] [3 4]] of dimension 1`},
		{"an impossible slice", func(g []Group) []Group { g[1].Tensors[0].Slice.Dim = 7; return g }, "along dimension 7"},
	} {
		p, err := FromGroups(Spec{}, x.change(twoGroups()), 3, 10, 4096)
		if p != nil || err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, want %q", x.name, err, x.want)
		}
	}
}

// TestManyDevices: a number of devices that nobody has is refused, and nothing is allocated for it.
func TestManyDevices(t *testing.T) {
	t.Parallel()
	_, err := FromGroups(Spec{}, twoGroups(), math.MaxInt, 0, 0)
	if err == nil || !strings.Contains(err.Error(), "in no group") {
		t.Error(err)
	}
}

// fuzzed reads small and large numbers from the bytes of a fuzz test.
type fuzzed struct{ b []byte }

func (f *fuzzed) next() uint64 {
	if len(f.b) == 0 {
		return 0
	}
	n := uint64(f.b[0])
	f.b = f.b[1:]
	if n < 200 || len(f.b) == 0 {
		return n
	}
	more := f.b[0]
	f.b = f.b[1:]
	if n < 250 {
		return uint64(more) * 256 // aligned
	}
	return n << (more % 64)
}

func (f *fuzzed) groups() (all []Group) {
	for range 1 + f.next()%3 {
		var g Group
		for range f.next() % 3 {
			g.Devices = append(g.Devices, int(f.next()))
		}
		for range f.next() % 3 {
			g.Arenas = append(g.Arenas, f.next())
		}
		for range f.next() % 4 {
			x := Tensor{Tensor: &gguf.Tensor{Name: string(rune('a' + f.next()%8)), Type: gguf.Type(f.next())}}
			for range f.next() % 3 {
				x.Shape = append(x.Shape, f.next())
			}
			x.Target, x.Arena, x.DeviceOffset = gguf.Type(f.next()), int(f.next()), f.next()
			if elems, ok := x.count(); ok && f.next() != 1 { // mostly the right sizes
				size, _ := x.Type.Bytes(elems)
				x.Size = int64(size)
				x.Bytes, _ = x.Target.Bytes(elems)
			} else {
				x.Size, x.Bytes = int64(f.next()), f.next()
			}
			if f.next() == 1 {
				x.Slice = &Slice{Dim: int(f.next()), Ranges: [][2]uint64{{f.next(), f.next()}}, Shape: []uint64{f.next(), f.next()}}
			}
			g.Tensors = append(g.Tensors, x)
		}
		all = append(all, g)
	}
	return all
}

// FuzzFromGroups: groups from anywhere are refused, or can be used in every way.
func FuzzFromGroups(f *testing.F) {
	f.Add([]byte{0, 1, 0, 1, 201, 4, 2, 0, 0, 1, 64, 1, 0, 0, 0, 0, 1, 8, 1, 96, 8, 0, 201, 1, 0, 0}, uint8(1))
	f.Add([]byte{1, 1, 0, 1, 201, 9, 1, 3, 24, 2, 5, 2, 24, 0, 0, 0, 1, 1, 1, 3, 5, 4, 1, 1, 0, 0}, uint8(2))
	f.Add([]byte{0, 1, 0, 1, 254, 50, 1, 2, 8, 1, 254, 40, 1, 0, 0, 0, 0}, uint8(1))
	f.Fuzz(func(t *testing.T, b []byte, devices uint8) {
		source := fuzzed{b}
		p, err := FromGroups(Spec{}, source.groups(), int(devices), 0, 0)
		if err != nil {
			if p != nil {
				t.Fatal("a plan and an error")
			}
			return
		}
		checkGroups(t, p, int(devices))
		if len(p.Tensors()) != p.Len() || p.TensorBytes() > p.DeviceBytes() {
			t.Fatalf("%d tensors of %d bytes in %d bytes", p.Len(), p.TensorBytes(), p.DeviceBytes())
		}
		for d := range p.Devices {
			if err := p.Fits(d, p.GroupOf(d).DeviceBytes, 0); err != nil {
				t.Fatal(err)
			}
			_ = p.Fits(d, 0, 1)
		}
		for i := range p.Groups {
			if p.Groups[i].DeviceBytes < 1<<26 && p.Groups[i].ReadBytes < 1<<26 {
				checkCut(t, &p.Groups[i], CutOptions{Bytes: MinChunk, Ramp: 3, Ordered: true})
			}
		}
	})
}
