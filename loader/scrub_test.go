package loader

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// newScrubbers returns a Scrubber for each device.
func newScrubbers(t *testing.T, l *Loader, devices int) (all []*Scrubber) {
	t.Helper()
	for d := range devices {
		s, err := l.NewScrubber(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
		all = append(all, s)
	}
	return all
}

// round looks at all of w once, and returns what is damaged.
func (w *Scrub) round(t *testing.T) (damage []*ProveError) {
	t.Helper()
	var bytes, want int64
	for ended := false; !ended; {
		n, found, last, err := w.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		bytes, damage, ended = bytes+n, append(damage, found...), last
	}
	for i := range w.tensors {
		want += w.tensors[i].Bytes
	}
	if bytes != want {
		t.Errorf("a round has looked at %d bytes, want %d", bytes, want)
	}
	return damage
}

// scrubWays are models that are scrubbed: every dtype and who converts, devices, splits, slices.
var scrubWays = []struct {
	name    string
	path    string // "": a model that can be divided
	devices int
	apu     bool
	o       options
}{
	{"raw", allTypes, 1, false, options{Policy: plan.Raw}},
	{"f32", allTypes, 1, false, options{Policy: plan.F32}},
	{"f16", allTypes, 1, false, options{}},
	{"bf16", allTypes, 1, false, options{Policy: plan.BF16}},
	{"raw sample", sample, 1, false, options{Policy: plan.Raw}},
	{"f32 gpu", allTypes, 1, false, options{Policy: plan.F32, Dequant: DequantGPU}},
	{"f16 gpu", sample, 1, false, options{Dequant: DequantGPU}},
	{"bf16 gpu", allTypes, 1, false, options{Policy: plan.BF16, Dequant: DequantGPU}},
	{"layers", sample, 3, false, options{}},
	{"copies", sample, 2, false, options{Split: plan.Split{By: plan.SplitNone}}},
	{"slices", "", 1, false, withShard(options{Policy: plan.Raw})},
	{"slices gpu", "", 1, false, withShard(options{Dequant: DequantGPU})},
	{"apu", sample, 1, true, options{}},
}

// TestScrub flips a bit at the beginning, at the end or somewhere in every tensor on every device of models of all
// kinds. A round finds it and no more, says which bit it is, and it is written again from the file.
func TestScrub(t *testing.T) {
	t.Parallel()
	for _, way := range scrubWays {
		for _, prove := range []Prove{ProveOn, ProveOff} {
			t.Run(fmt.Sprintf("%s/prove %v", way.name, prove), func(t *testing.T) {
				t.Parallel()
				f := llama(t)
				if way.path != "" {
					f = openModel(t, way.path)
				}
				devs, sw := openDevices(t, way.devices, soft.Options{Integrated: way.apu})
				o := way.o.on(way.devices)
				o.Prove = prove
				l := newLoader(t, o, devs...)
				w, err := l.Load(t.Context(), mustPlan(t, l, f, o), o.request())
				if err != nil {
					t.Fatal(err)
				}
				defer mustClose(t, w)
				before := contents(t, w)
				scrubbers := newScrubbers(t, l, len(devs))
				random := rand.New(rand.NewPCG(1, 2))
				for d, s := range scrubbers {
					watched, err := s.Watch(w)
					if err != nil {
						t.Fatal(err)
					}
					if watched.Proved() != (prove == ProveOn) {
						t.Errorf("proved: %v", watched.Proved())
					}
					for range 2 {
						if damage := watched.round(t); damage != nil {
							t.Fatalf("nothing was flipped: %v", damage[0])
						}
					}
					for i := range watched.tensors {
						x := &watched.tensors[i]
						off, bit := []int64{0, x.Bytes - 1, random.Int64N(x.Bytes)}[i%3], random.IntN(8)
						flipAt(t, sw, x.Ptr+amdhip.DevicePtr(off), bit)
						damage := watched.round(t)
						if len(damage) != 1 {
							t.Fatalf("%q, byte %d: %d blocks are damaged: %v", x.Tensor.Name, off, len(damage), damage)
						}
						wantDamage(t, damage[0], ProveError{
							Device: devs[d], Tensor: x.Tensor.Name, Offset: off, Bit: int64(bit), Blocks: 1,
						})
						if err := watched.Repair(t.Context(), damage[0], nil, f); err != nil {
							t.Fatal(err)
						}
					}
					if damage := watched.round(t); damage != nil {
						t.Errorf("all was repaired: %v", damage[0])
					}
				}
				same(t, w.Plan(), contents(t, w), before)
			})
		}
	}
}

func flipAt(t *testing.T, sw *soft.Software, p amdhip.DevicePtr, bit int) {
	t.Helper()
	if err := sw.FlipBit(p, uint8(bit)); err != nil {
		t.Fatal(err)
	}
}

// TestRepair writes damaged blocks from an Image, which may be damaged itself, and from files.
func TestRepair(t *testing.T) {
	t.Parallel()
	for _, policy := range plan.Policies() {
		t.Run(policy.String(), func(t *testing.T) {
			t.Parallel()
			f := openModel(t, allTypes)
			devs, sw := openDevices(t, 1, soft.Options{})
			o := options{Policy: policy, Prove: ProveOn}
			l := newLoader(t, o, devs...)
			w, err := l.Load(t.Context(), mustPlan(t, l, f, o), o.request())
			if err != nil {
				t.Fatal(err)
			}
			defer mustClose(t, w)
			im := imageOf(t, devs[0], f, w.Plan(), 100_000)
			watched, err := newScrubbers(t, l, 1)[0].Watch(w)
			if err != nil {
				t.Fatal(err)
			}
			for i := range watched.tensors {
				x := &watched.tensors[i]
				flipAt(t, sw, x.Ptr+amdhip.DevicePtr(x.Bytes/2), 1)
				damage := watched.round(t)
				if len(damage) != 1 {
					t.Fatalf("%q: %v", x.Tensor.Name, damage)
				}
				off := x.Tensor.Size / 2
				flipImage(im, x.Tensor, off)
				err := watched.Repair(t.Context(), damage[0], im, nil)
				if err == nil && policy != plan.Raw && slices.Contains([]gguf.Type{gguf.F32, gguf.F64, gguf.Q8_K}, x.Tensor.Type) {
					flipImage(im, x.Tensor, off) // this bit of a float makes no difference to what it is converted to
					continue
				}
				wantDamage(t, hostOnly(err), ProveError{
					Tensor: x.Tensor.Name, Offset: off, Bit: 3, Host: true, InFile: true, Blocks: 1,
				})
				if !errors.Is(err, ErrOtherBytes) {
					t.Errorf("from a damaged image: %v", err)
				}
				if again := watched.round(t); len(again) != 1 {
					t.Fatalf("something was written: %v", again)
				}
				flipImage(im, x.Tensor, off)
				if err := watched.Repair(t.Context(), damage[0], im, nil); err != nil {
					t.Fatal(err)
				}
			}
			if damage := watched.round(t); damage != nil {
				t.Errorf("all was repaired: %v", damage[0])
			}
			same(t, w.Plan(), contents(t, w), wanted(t, f, o))
			other := openModel(t, sample)
			x := &watched.tensors[0]
			flipAt(t, sw, x.Ptr, 1)
			if err := watched.Repair(t.Context(), watched.round(t)[0], nil, other); err == nil {
				t.Error("repaired from another model")
			}
		})
	}
}

// hostOnly is err if it is a damaged Image's.
func hostOnly(err error) error {
	if e, ok := errors.AsType[*ProveError](err); ok && e.Host {
		return e
	}
	return nil
}

// TestRepairOfBadMemory writes a block that does not keep what is written to it.
func TestRepairOfBadMemory(t *testing.T) {
	t.Parallel()
	f := openModel(t, small)
	devs, sw := openDevices(t, 1, soft.Options{})
	o := options{Prove: ProveOn}
	l := newLoader(t, o, devs...)
	w, err := l.Load(t.Context(), mustPlan(t, l, f, o), o.request())
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, w)
	watched, err := newScrubbers(t, l, 1)[0].Watch(w)
	if err != nil {
		t.Fatal(err)
	}
	flipAt(t, sw, watched.tensors[0].Ptr, 0)
	damage := watched.round(t)
	for n := range repairTries {
		if err := sw.Flip(soft.Flip{Copy: n + 1}); err != nil {
			t.Fatal(err)
		}
	}
	err = watched.Repair(t.Context(), damage[0], nil, f)
	wantDamage(t, err, ProveError{Device: devs[0], Tensor: watched.tensors[0].Tensor.Name, Blocks: 1})
	if err := watched.Repair(t.Context(), damage[0], nil, f); err != nil {
		t.Error(err)
	}
}

// TestImageCheck finds a flipped bit in every tensor of an Image.
func TestImageCheck(t *testing.T) {
	t.Parallel()
	f := openModel(t, allTypes)
	devs, _ := openDevices(t, 1, soft.Options{})
	p := planned(t, f, options{})
	im := imageOf(t, devs[0], f, p, 50_000)
	check := func() error {
		var sum, want int64
		for at := int64(0); ; {
			next, n, err := im.Check(p, at)
			if err != nil {
				return err
			}
			if sum += n; next == 0 {
				break
			}
			if next <= at {
				t.Fatalf("from byte %d to %d", at, next)
			}
			at = next
		}
		for _, x := range p.Tensors() {
			want += x.Size
		}
		if sum != want {
			t.Errorf("%d bytes were looked at, want %d", sum, want)
		}
		return nil
	}
	if err := check(); err != nil {
		t.Fatal(err)
	}
	for _, x := range p.Tensors() {
		if x.Size == 0 {
			continue
		}
		for _, off := range []int64{0, x.Size - 1} {
			flipImage(im, x, off)
			wantDamage(t, check(), ProveError{Tensor: x.Name, Offset: off, Bit: 3, Host: true, InFile: true, Blocks: 1})
			flipImage(im, x, off)
		}
	}
}

// TestScrubHangs looks at a device that hangs. That is said in time, and what it may still use is not freed.
func TestScrubHangs(t *testing.T) {
	t.Parallel()
	f := openModel(t, small)
	devs, sw := leakyDevices(t, 1, soft.Options{})
	l, err := New(devs, Config{Stall: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	w, err := l.Load(t.Context(), mustPlan(t, l, f, options{}), Request{Prove: ProveOn})
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.NewScrubber(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	watched, err := s.Watch(w)
	if err != nil {
		t.Fatal(err)
	}
	sw.Inject(soft.Fault{Func: "hipModuleLaunchKernel", N: 1, Stall: true})
	for range 2 {
		if _, _, _, err := watched.Next(t.Context()); !errors.Is(err, ErrStalled) {
			t.Errorf("a device that hangs: %v", err)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	left, ok := errors.AsType[*LeftError](w.Close())
	if !ok || left.DeviceBytes != w.Plan().DeviceBytes() {
		t.Errorf("the model has left %+v", left)
	}
	left, ok = errors.AsType[*LeftError](l.Close())
	if !ok || left.Streams == 0 || left.DeviceBytes == 0 || left.HostBytes == 0 {
		t.Errorf("the scrubber has left %+v", left)
	}
	sw.ClearFaults()
}

// TestScrubClosed looks at a model that is closed.
func TestScrubClosed(t *testing.T) {
	t.Parallel()
	f := openModel(t, small)
	devs, _ := openDevices(t, 1, soft.Options{})
	l := newLoader(t, options{}, devs...)
	w, err := l.Load(t.Context(), mustPlan(t, l, f, options{}), Request{})
	if err != nil {
		t.Fatal(err)
	}
	s := newScrubbers(t, l, 1)[0]
	watched, err := s.Watch(w)
	if err != nil {
		t.Fatal(err)
	}
	mustClose(t, w)
	if _, _, _, err := watched.Next(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("of a closed model: %v", err)
	}
	if _, err := s.Watch(w); !errors.Is(err, ErrClosed) {
		t.Errorf("of a closed model: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
