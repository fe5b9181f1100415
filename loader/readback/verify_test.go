package readback

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestVerifyCounts wants the result to say how many tensors of how many were compared, and bytes on all devices.
func TestVerifyCounts(t *testing.T) {
	t.Parallel()
	f := open(t, sample)
	norms := regexp.MustCompile(`attn_norm`)
	for _, x := range []struct {
		name    string
		spec    plan.Spec
		devices int
		want    int
		copies  uint64
	}{
		{"one device", plan.Spec{}, 1, 40, 1},
		{"raw", plan.Spec{Policy: plan.Raw}, 1, 40, 1},
		{"a selection", plan.Spec{Tensors: norms}, 1, 4, 1},
		{"two devices", plan.Spec{Policy: plan.BF16}, 2, 40, 1},
		{"more devices than layers", plan.Spec{}, 6, 40, 1},
		{"copies", plan.Spec{Split: plan.Split{By: plan.SplitNone}}, 3, 40, 3},
		{"a selection on two devices", plan.Spec{Policy: plan.F32, Tensors: norms}, 2, 4, 1},
		{"copies of a selection", plan.Spec{Tensors: norms, Split: plan.Split{By: plan.SplitNone}}, 2, 4, 2},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			m := load(t, f, x.spec, devices(t, x.devices)...)
			r, err := Verify(t.Context(), m, f)
			if err != nil {
				t.Fatal(err)
			}
			if want := (Result{x.want, 40, x.copies * m.Plan().TensorBytes()}); r != want {
				t.Errorf("%+v, want %+v", r, want)
			}
			if want := fmt.Sprintf("%d of 40 tensors", x.want); r.String() != want {
				t.Errorf("%q, want %q", r, want)
			}
		})
	}
}

// TestVerifyShards: each rank compares its share, and all together the model.
func TestVerifyShards(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		name  string
		f     *gguf.File
		shard plan.Shard
		sum   int // tensors of all ranks
	}{
		{"layers", open(t, sample), plan.Shard{By: plan.ShardLayers, World: 3}, 40},
		{"more ranks than layers", open(t, sample), plan.Shard{By: plan.ShardLayers, World: 6}, 40},
		{"slices", sliced(t, false), plan.Shard{By: plan.ShardTensors, World: 2}, 16},
	} {
		sum, of := 0, len(x.f.Tensors())
		for rank := range x.shard.World {
			shard := x.shard
			shard.Rank = rank
			for _, policy := range []plan.Policy{plan.Raw, plan.F32} {
				m := load(t, x.f, plan.Spec{Policy: policy, Shard: shard}, devices(t, 2)...)
				r, err := Verify(t.Context(), m, x.f)
				if err != nil || r.Tensors != m.Plan().Len() || r.Of != of || r.Bytes != m.Plan().TensorBytes() {
					t.Errorf("%s, rank %d: %+v, %v", x.name, rank, r, err)
				}
				if policy == plan.Raw {
					sum += r.Tensors
				}
			}
		}
		if sum != x.sum {
			t.Errorf("%s: %d tensors on all ranks, want %d", x.name, sum, x.sum)
		}
	}
}

// TestVerifyCopy: a model is compared with another file that has the same tensors at other places.
func TestVerifyCopy(t *testing.T) {
	t.Parallel()
	f, reversed := sliced(t, false), sliced(t, true)
	for _, shard := range []plan.Shard{{}, {By: plan.ShardTensors, World: 2, Rank: 1}} {
		m := load(t, f, plan.Spec{Shard: shard}, devices(t, 1)...)
		if r, err := Verify(t.Context(), m, reversed); err != nil || r.Tensors != 8 {
			t.Errorf("%+v: %+v, %v", shard, r, err)
		}
	}
}

// remote is a file that a server has.
type remote []byte

func (r remote) Path() string { return "served.gguf" }
func (r remote) Size() int64  { return int64(len(r)) }
func (r remote) Close() error { return nil }

func (r remote) Range(_ context.Context, off, n int64) io.ReadCloser {
	return io.NopCloser(bytes.NewReader(r[off : off+n]))
}

// TestVerifyRemote: a model that came from a server is compared with what the server has, and with a file.
func TestVerifyRemote(t *testing.T) {
	t.Parallel()
	near := sliced(t, false)
	data, err := os.ReadFile(near.Parts()[0].Path)
	if err != nil {
		t.Fatal(err)
	}
	far, err := gguf.OpenSource(t.Context(), "served.gguf", func(context.Context, string) (gguf.Source, error) {
		return remote(data), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, shard := range []plan.Shard{{}, {By: plan.ShardTensors, World: 2, Rank: 1}} {
		m := load(t, far, plan.Spec{Shard: shard}, devices(t, 2)...)
		for _, f := range []*gguf.File{far, near} {
			if r, err := Verify(t.Context(), m, f); err != nil || r.Tensors != 8 {
				t.Errorf("%+v, %v: %+v, %v", shard, f, r, err)
			}
		}
	}
}

// TestFlippedBits wants a wrong bit to be found on whichever device it is, in the first and in the last byte of a
// tensor.
func TestFlippedBits(t *testing.T) {
	t.Parallel()
	f := open(t, sample)
	for _, spec := range []plan.Spec{
		{Policy: plan.Raw},
		{Policy: plan.F16, Split: plan.Split{By: plan.SplitNone}},
		{Policy: plan.F32, Tensors: regexp.MustCompile("norm")},
	} {
		devs := devices(t, 3)
		m := load(t, f, spec, devs...)
		for _, dev := range devs {
			var last *loader.Tensor
			for _, x := range m.Tensors() {
				if on, err := m.TensorOn(dev, x.Name); err == nil {
					last = &on
				}
			}
			if last == nil {
				t.Fatalf("device %d has nothing", dev.Index())
			}
			for _, off := range []uint64{0, last.Bytes - 1} {
				flip(t, dev, last.Ptr+amdhip.DevicePtr(off), 2)
				r, err := Verify(t.Context(), m, f)
				e, ok := errors.AsType[*MismatchError](err)
				if !ok || !errors.Is(err, ErrMismatch) || r != (Result{}) {
					t.Fatalf("byte %d of %s on device %d: %+v, %v", off, last.Name, dev.Index(), r, err)
				}
				elem := uint64(1) // the offset is that of an element
				if n := last.Type.BlockBytes(); last.Type.BlockElems() == 1 {
					elem = uint64(n)
				}
				in := off % elem
				if e.Tensor != last.Name || e.Type != last.Type || uint64(e.Offset) != off-in {
					t.Errorf("byte %d of %s (%v): %+v", off, last.Name, last.Type, e)
				}
				if len(e.Got) != len(e.Want) || uint64(len(e.Got)) <= in || e.Got[in]^e.Want[in] != 4 {
					t.Errorf("byte %d of %s: %#x, want %#x", off, last.Name, e.Got, e.Want)
				}
				if s := e.Error(); !strings.Contains(s, last.Name) || !strings.Contains(s, fmt.Sprintf("device has %#x", e.Got)) {
					t.Error(s)
				}
				flip(t, dev, last.Ptr+amdhip.DevicePtr(off), 2)
			}
		}
		if _, err := Verify(t.Context(), m, f); err != nil {
			t.Errorf("all bits are as before: %v", err)
		}
	}
}

func flip(t *testing.T, dev *amdhip.Device, at amdhip.DevicePtr, bit uint8) {
	t.Helper()
	if err := soft.Of(dev.Runtime()).FlipBit(at, bit); err != nil {
		t.Fatal(err)
	}
}

// TestNaNs: a NaN is one whatever its other bits say, and nothing but a NaN.
func TestNaNs(t *testing.T) {
	t.Parallel()
	f := write(t, nil, []made{{"x", gguf.F32, []uint64{4}, floats(0x7fc00001, 0xff800001, 0x7f800000, 0x3f800000)}})
	dev := devices(t, 1)[0]
	for policy, size := range map[plan.Policy]uint64{plan.Raw: 4, plan.F32: 4, plan.F16: 2, plan.BF16: 2} {
		m := load(t, f, plan.Spec{Policy: policy}, dev)
		if _, err := Verify(t.Context(), m, f); err != nil {
			t.Fatalf("%v: %v", policy, err)
		}
		x, err := m.Tensor("x")
		if err != nil {
			t.Fatal(err)
		}
		for elem, found := range []bool{false, false, true, true} { // infinity plus a bit is a NaN, and none was wanted
			at := x.Ptr + amdhip.DevicePtr(uint64(elem)*size)
			flip(t, dev, at, 1)
			_, err := Verify(t.Context(), m, f)
			e, ok := errors.AsType[*MismatchError](err)
			if ok != found || ok && uint64(e.Offset) != uint64(elem)*size {
				t.Errorf("%v, element %d: %v", policy, elem, err)
			}
			flip(t, dev, at, 1)
		}
	}
}

func TestFirstDifference(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		typ  gguf.Type
		a, b []byte
		want int
	}{
		{gguf.F32, floats(1, 2, 3), floats(1, 2, 3), -1},
		{gguf.F32, floats(1, 2, 3), floats(1, 2, 4), 8},
		{gguf.F32, floats(1, 0x7f800001, 3), floats(1, 0xffffffff, 3), -1},
		{gguf.F32, floats(1, 0x7f800001, 3), floats(1, 0x7f800000, 3), 4},
		{gguf.F32, floats(0x80000000), floats(0), 0}, // minus zero is not zero
		{gguf.F16, []byte{0, 0x7c, 1, 0x7c}, []byte{0, 0x7c, 0xff, 0xff}, -1},
		{gguf.F16, []byte{0, 0x7c, 1, 0x7c}, []byte{0, 0x7c, 0, 0x7c}, 2},
		{gguf.BF16, []byte{0x81, 0x7f}, []byte{0xff, 0xff}, -1},
		{gguf.BF16, []byte{0x81, 0x7f}, []byte{0x80, 0x7f}, 0},
		{gguf.I32, floats(0x7f800001), floats(0x7f800002), 0},
		{gguf.Q8_0, []byte{1, 2, 3}, []byte{1, 2, 4}, 2},
		{gguf.Q8_0, nil, nil, -1},
	} {
		if got := firstDifference(x.a, x.b, x.typ); got != x.want {
			t.Errorf("%v: %x and %x differ at %d, want %d", x.typ, x.a, x.b, got, x.want)
		}
	}
}

// TestOtherFile: a file that is not the model's is refused before anything is compared.
func TestOtherFile(t *testing.T) {
	t.Parallel()
	x := made{"x", gguf.F32, []uint64{8, 4}, nil}
	m := load(t, write(t, nil, []made{x, {"y", gguf.F16, []uint64{8}, nil}}), plan.Spec{}, devices(t, 1)...)
	for want, other := range map[string][]made{
		`has no tensor "y"`: {x},
		"has the type F32":  {x, {"y", gguf.F32, []uint64{8}, nil}},
		"has the shape [9]": {x, {"y", gguf.F16, []uint64{9}, nil}},
		"[4 8]":             {{"x", gguf.F32, []uint64{4, 8}, nil}, {"y", gguf.F16, []uint64{8}, nil}},
	} {
		_, err := Verify(t.Context(), m, write(t, nil, other))
		_, ok := errors.AsType[*MismatchError](err)
		if ok || !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// TestVerifyEnds: a model that was closed, a caller who gives up and a file that cannot be read end it.
func TestVerifyEnds(t *testing.T) {
	t.Parallel()
	f := open(t, sample)
	m := load(t, f, plan.Spec{}, devices(t, 1)...)
	stopped := errors.New("stopped")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stopped)
	if _, err := Verify(ctx, m, f); !errors.Is(err, stopped) {
		t.Errorf("after the end of the context: %v", err)
	}
	other, err := gguf.Open(sample)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if e, ok := errors.AsType[*loader.TensorError](second(Verify(t.Context(), m, other))); !ok || e.Op != "read" {
		t.Errorf("a file that was closed: %v", e)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(t.Context(), m, f); !errors.Is(err, loader.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if _, err := Tensor(t.Context(), m, "output.weight"); !errors.Is(err, loader.ErrClosed) {
		t.Errorf("a tensor after Close: %v", err)
	}
	if err := WriteSafetensors(t.Context(), m, new(memory)); !errors.Is(err, loader.ErrClosed) {
		t.Errorf("an export after Close: %v", err)
	}
}

func second[A, B any](_ A, b B) B { return b }

// TestVerifyTruncated: a file that has become shorter is an error, and no fault.
func TestVerifyTruncated(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("a file that is mapped cannot be truncated here")
	}
	f := write(t, nil, []made{{"x", gguf.F32, []uint64{1 << 18}, nil}})
	m := load(t, f, plan.Spec{Policy: plan.F32}, devices(t, 1)...)
	if err := os.Truncate(f.Parts()[0].Path, 1<<17); err != nil {
		t.Fatal(err)
	}
	_, err := Verify(t.Context(), m, f)
	if e, ok := errors.AsType[*loader.TensorError](err); !ok || e.Tensor != "x" || !errors.Is(err, gguf.ErrTruncated) {
		t.Error(err)
	}
}

// TestTensor: one tensor is read back by one call, from the device that it is on, and nothing else is.
func TestTensor(t *testing.T) {
	t.Parallel()
	f := open(t, sample)
	for _, spec := range []plan.Spec{{Policy: plan.Raw}, {Policy: plan.Raw, Split: plan.Split{By: plan.SplitNone}}} {
		devs := devices(t, 3)
		m := load(t, f, spec, devs...)
		for _, x := range f.Tensors() {
			before := soft.Of(devs[0].Runtime()).Stats().CopiedBytes
			b, err := Tensor(t.Context(), m, x.Name)
			if err != nil || !bytes.Equal(b, f.Data(&x)) {
				t.Errorf("%s: %d bytes, want those of the file; %v", x.Name, len(b), err)
			}
			if n := soft.Of(devs[0].Runtime()).Stats().CopiedBytes - before; n != uint64(x.Size) {
				t.Errorf("%s: %d bytes were copied, want %d", x.Name, n, x.Size)
			}
		}
		if _, err := Tensor(t.Context(), m, "nothing"); err == nil || !strings.Contains(err.Error(), `"nothing"`) {
			t.Errorf("a tensor that is not there: %v", err)
		}
	}
}
