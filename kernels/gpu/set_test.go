package gpu

import (
	"encoding/binary"
	"errors"
	"math"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
)

// setOf returns a set in which run does the work of kernel k.
func setOf(t *testing.T, dev *amdhip.Device, k Key, run func(*amdhip.KernelCall) amdhip.Status) *Set {
	t.Helper()
	rt := dev.Runtime()
	soft.Of(rt).Offer(k.Name(), k.params(), run)
	object, err := rt.Compile(k.Name(), k.Source())
	if err != nil {
		t.Fatal(err)
	}
	b := build{dev: dev}
	s := &Set{dev: dev, kernels: map[Key]kernel{}}
	if err := b.load(t.Context(), watch.From(t.Context(), stallTime), s, k, code{object: object}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, s) })
	return s
}

// TestLaunchGrid checks the grids and the arguments of launches.
func TestLaunchGrid(t *testing.T) {
	t.Parallel()
	dev, _ := openSoft(t)
	b := newBuffers(t, dev)
	for _, tt := range []struct {
		to     gguf.Type
		blocks uint64 // of 256 elements
		grid   uint32
	}{
		{gguf.F16, 1, 1},
		{gguf.F16, 8, 1},
		{gguf.F16, 9, 2},
		{gguf.F32, 4, 1},
		{gguf.F32, 5, 2},
		{gguf.F32, 1 << 21, 1 << 19},
		{gguf.F32, 1<<22 + 1, maxGrid},
		{gguf.BF16, maxWork, maxGrid},
	} {
		var got []amdhip.KernelCall
		k := Key{To: tt.to, From: gguf.Q4_K}
		s := setOf(t, dev, k, func(l *amdhip.KernelCall) amdhip.Status {
			got = append(got, *l)
			return amdhip.Success
		})
		if err := errors.Join(s.Launch(b.stream, k, b.out(), b.in(), tt.blocks), b.stream.Synchronize()); err != nil {
			t.Fatal(err)
		}
		if len(got) != 1 || got[0].Grid.X != tt.grid || got[0].Block.X != Threads {
			t.Fatalf("%d blocks to %v: launches %+v, want a grid of %d", tt.blocks, tt.to, got, tt.grid)
		}
		if a := got[0].Args; a[0] != uint64(b.out()) || a[1] != uint64(b.in()) || a[2] != tt.blocks {
			t.Errorf("%d blocks to %v: arguments %#x", tt.blocks, tt.to, a)
		}
	}
}

// TestLaunchRefuses calls Launch with arguments that a kernel must not get.
func TestLaunchRefuses(t *testing.T) {
	t.Parallel()
	dev, sw := openSoft(t)
	s, b := mustLoad(t, &Compiler{}, dev, q4kToF16), newBuffers(t, dev)
	launched := sw.Calls()["hipModuleLaunchKernel"]
	for name, tt := range map[string]struct {
		k       Key
		out, in amdhip.DevicePtr
		blocks  uint64
		want    error
	}{
		"output not aligned": {q4kToF16, b.out() + 8, b.in(), 1, amdhip.ErrInvalidValue},
		"input not aligned":  {q4kToF16, b.out(), b.in() + 4, 1, amdhip.ErrInvalidValue},
		"too many blocks":    {q4kToF16, b.out(), b.in(), maxWork + 1, amdhip.ErrInvalidValue},
		"not loaded":         {q80ToF32, b.out(), b.in(), 1, amdhip.ErrUnsupported},
		"nothing":            {q4kToF16, b.out(), b.in(), 0, nil},
	} {
		if err := s.Launch(b.stream, tt.k, tt.out, tt.in, tt.blocks); !errors.Is(err, tt.want) {
			t.Errorf("%s: error %v, want %v", name, err, tt.want)
		}
	}
	if n := sw.Calls()["hipModuleLaunchKernel"]; n != launched {
		t.Errorf("%d launches", n-launched)
	}
	other, err := dev.Runtime().Device(1)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := newBuffers(t, other)
	if err := s.Launch(elsewhere.stream, q4kToF16, b.out(), b.in(), 1); !errors.Is(err, amdhip.ErrInvalidHandle) {
		t.Errorf("on another device: %v", err)
	}
	closed(t, s, s)
	if err := s.Launch(b.stream, q4kToF16, b.out(), b.in(), 1); !errors.Is(err, amdhip.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// TestStandInsAreStrict launches stand-ins directly, without the checks of Set.Launch.
func TestStandInsAreStrict(t *testing.T) {
	t.Parallel()
	dev, _ := openSoft(t)
	s := mustLoad(t, &Compiler{}, dev, q4kToF16)
	const block = 144
	mem, err := dev.Malloc(4096)
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, mem)
	start := uint64(mem.Ptr())
	for name, tt := range map[string]struct {
		threads         uint32
		out, in, blocks uint64
		want            amdhip.Status
	}{
		"well":                 {Threads, start + 1024, start + 16, 1, amdhip.Success},
		"up to the last bytes": {Threads, start, start + 4096 - 16 - block, 1, amdhip.Success},
		"threads":              {Threads / 2, start + 1024, start + 16, 1, amdhip.ErrInvalidValue},
		"output not aligned":   {Threads, start + 1032, start + 16, 1, amdhip.ErrInvalidValue},
		"input not aligned":    {Threads, start + 1024, start + 18, 1, amdhip.ErrInvalidValue},
		"overlap":              {Threads, start + 16, start + 16, 1, amdhip.ErrInvalidValue},
		"absurd":               {Threads, start + 1024, start + 16, math.MaxUint64, amdhip.ErrInvalidValue},
		"no padding before":    {Threads, start + 1024, start, 1, amdhip.ErrIllegalAddress},
		"no padding after":     {Threads, start, start + 4096 - block, 1, amdhip.ErrIllegalAddress},
		"output too short":     {Threads, start + 4096 - 16, start + 16, 1, amdhip.ErrIllegalAddress},
		"nowhere":              {Threads, start, 0, 1, amdhip.ErrIllegalAddress},
	} {
		stream, err := dev.NewStream()
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Launch(s.kernels[q4kToF16].function, 1, tt.threads, tt.out, tt.in, tt.blocks); err != nil {
			t.Fatal(err)
		}
		err = stream.Synchronize()
		if failed := tt.want != amdhip.Success; failed && !errors.Is(err, tt.want) || !failed && err != nil {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
		closed(t, stream)
	}
}

// TestCheckFindsOneWrongBit checks kernels with one wrong bit, and one that gives NaNs with another payload, which is
// right.
func TestCheckFindsOneWrongBit(t *testing.T) {
	t.Parallel()
	dev, _ := openSoft(t)
	for _, k := range []Key{q4kToF16, q80ToF32, {To: gguf.BF16, From: gguf.IQ2_S}} {
		size, element := k.To.BlockBytes(), 0
		s := setOf(t, dev, k, func(l *amdhip.KernelCall) amdhip.Status {
			if st := k.standIn(l); st != amdhip.Success {
				return st
			}
			out, st := l.Memory(amdhip.DevicePtr(l.Args[0]), l.Args[2]*k.outBytes())
			element = len(out)/size - 1
			for elementIsNaN(k.To, out[element*size:][:size]) { // until the last number
				element--
			}
			out[element*size] ^= 1
			return st
		})
		err := s.check(t.Context(), watch.From(t.Context(), stallTime), []Key{k})
		e, ok := errors.AsType[*CheckError](err)
		if !ok || e.Key != k || e.Element != element || element < 16<<10 || len(e.Got) != size || e.Got[0]^e.Want[0] != 1 {
			t.Errorf("%v: error %v, want element %d", k, err, element)
		}
	}
	k := Key{To: gguf.F32, From: gguf.F16}
	nans := 0
	s := setOf(t, dev, k, func(l *amdhip.KernelCall) amdhip.Status {
		st := k.standIn(l)
		if st != amdhip.Success {
			return st
		}
		out, st := l.Memory(amdhip.DevicePtr(l.Args[0]), 4*l.Args[2])
		for ; len(out) > 0; out = out[4:] {
			if elementIsNaN(gguf.F32, out[:4]) {
				binary.LittleEndian.PutUint32(out, 0xffc00001)
				nans++
			}
		}
		return st
	})
	if err := s.check(t.Context(), watch.From(t.Context(), stallTime), []Key{k}); err != nil || nans == 0 {
		t.Errorf("%d NaNs with another payload: %v", nans, err)
	}
}

func TestElementIsNaN(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		t    gguf.Type
		bits uint32
		want bool
	}{
		{gguf.F32, 0x7f800000, false},
		{gguf.F32, 0xff800000, false},
		{gguf.F32, 0x7f800001, true},
		{gguf.F32, 0xff800100, true},
		{gguf.F32, 0x7fc00000, true},
		{gguf.F32, 0x7f7fffff, false},
		{gguf.F32, 0x80000001, false},
		{gguf.F16, 0x7c00, false},
		{gguf.F16, 0xfc00, false},
		{gguf.F16, 0x7c01, true},
		{gguf.F16, 0xfe00, true},
		{gguf.F16, 0x7bff, false},
		{gguf.BF16, 0x7f80, false},
		{gguf.BF16, 0xff80, false},
		{gguf.BF16, 0x7f81, true},
		{gguf.BF16, 0xffc0, true},
		{gguf.BF16, 0x7c01, false},
	} {
		b := binary.LittleEndian.AppendUint32(nil, tt.bits)[:tt.t.BlockBytes()]
		if got := elementIsNaN(tt.t, b); got != tt.want {
			t.Errorf("%v %#x: %v, want %v", tt.t, tt.bits, got, tt.want)
		}
	}
}
