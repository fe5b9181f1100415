package loader

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// damage stands in for the kernel of fingerprints, and flips a bit before one of the launches: as if a copy had brought
// the wrong bytes.
type damage struct {
	slog.Handler
	sw     *soft.Software
	mu     sync.Mutex
	after  int // launches until then, those that check the kernel among them
	back   int // from the end of what is summed up, in bytes; 0: the middle
	struck amdhip.DevicePtr
}

// damaged returns options whose loads are damaged at a launch of the kernel. The stand-in takes the kernel's place
// between compiling and loading it, which is when the compiler logs.
func damaged(o options, sw *soft.Software, after, back int) (options, *damage) {
	d := &damage{Handler: slog.DiscardHandler, sw: sw, after: after, back: back}
	o.Logger, o.Prove = slog.New(d), ProveOn
	return o, d
}

func (d *damage) Enabled(context.Context, slog.Level) bool { return true }

func (d *damage) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "compiled a kernel" {
		d.sw.Offer("fingerprint", 4, d.run)
	}
	return nil
}

// checkLaunches is how often the kernel is launched to be checked on a device.
const checkLaunches = 3

func (d *damage) run(l *amdhip.KernelCall) amdhip.Status {
	out, in, bytes, at := amdhip.DevicePtr(l.Args[0]), amdhip.DevicePtr(l.Args[1]), l.Args[2], int64(l.Args[3])
	src, st := l.Memory(in, bytes)
	if st != amdhip.Success {
		return st
	}
	dst, st := l.Memory(out, 8*uint64(kernels.Fingerprints(at+int64(bytes))))
	if st != amdhip.Success {
		return st
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.after--; d.after == -1 {
		i := len(src) / 2
		if d.back > 0 {
			i = max(0, len(src)-d.back)
		}
		src[i] ^= 1 << 5
		d.struck = in + amdhip.DevicePtr(i)
	}
	sums := make([]uint64, len(dst)/8)
	kernels.AddFingerprint(sums, at, src)
	for i, sum := range sums {
		binary.LittleEndian.PutUint64(dst[8*i:], sum)
	}
	return amdhip.Success
}

// where returns the device, the tensor and the byte of it that was damaged.
func (d *damage) where(t *testing.T, w *Model) (*amdhip.Device, *plan.Tensor, int64) {
	t.Helper()
	for _, p := range w.parts {
		for n, on := range p.on {
			for i := range p.group.Tensors {
				x := &p.group.Tensors[i]
				if off := d.struck - p.ptr(n, x.Arena, x.DeviceOffset); off < amdhip.DevicePtr(x.Bytes) {
					return on.device, x, int64(off)
				}
			}
		}
	}
	t.Fatalf("no tensor is at %#x", d.struck)
	return nil, nil, 0
}

// TestDamage flips a bit of what a copy brings, in loads of all kinds. The load fails and says which bit of which
// tensor on which device, and nothing is left there.
func TestDamage(t *testing.T) {
	t.Parallel()
	f := llama(t)
	for _, way := range provedWays {
		for _, policy := range []plan.Policy{plan.Raw, plan.F16} {
			if way.o.Dequant == DequantGPU && policy == plan.F16 {
				continue // see TestDamagedBlocks
			}
			t.Run(fmt.Sprintf("%s/%v", way.name, policy), func(t *testing.T) {
				t.Parallel()
				for _, after := range []int{0, 7} {
					devs, sw := openDevices(t, way.devices, soft.Options{Integrated: way.apu})
					o := way.o.on(way.devices)
					o.Policy = policy
					o, d := damaged(o, sw, after+checkLaunches*way.devices, after%2)
					l, err := New(devs, o.config())
					if err != nil {
						t.Fatal(err)
					}
					var kept *Model // its addresses tell where the bit was
					if strings.Contains(way.name, "sync") {
						_, err = l.LoadSync(t.Context(), mustPlan(t, l, f, o), o.request())
						e, ok := errors.AsType[*ProveError](err)
						if !ok || e.Blocks != 1 || e.Bit < 0 || e.Bit%8 != 5 || !slices.Contains(devs, e.Device) {
							t.Errorf("%v, want a *ProveError", err)
						}
					} else {
						if kept, err = l.Start(t.Context(), mustPlan(t, l, f, o), o.request()); err != nil {
							t.Fatal(err)
						}
						err = kept.WaitAll(t.Context())
						dev, x, off := d.where(t, kept)
						wantDamage(t, err, ProveError{Device: dev, Tensor: x.Name, Offset: off, Bit: 5, Blocks: 1})
						mustClose(t, kept)
					}
					if err := l.Close(); err != nil {
						t.Error(err)
					}
					wantBack(t, sw, resources{})
				}
			})
		}
	}
}

// TestDamagedBlocks flips a bit of the blocks that a device is to convert, while they are in its scratch memory.
func TestDamagedBlocks(t *testing.T) {
	t.Parallel()
	f := makeModel(t, nil, []made{{"a", gguf.Q6_K, []uint64{256, 4000}}})
	size := f.Tensors()[0].Size
	for _, after := range []int{0, 1, 2, 4} { // sums of blocks, and of what they have become, take turns
		dev, sw := openDevice(t, soft.Options{})
		o, d := damaged(options{Dequant: DequantGPU, Chunk: 400_000, Threads: 1, Streams: 1}, sw, after+checkLaunches, 1)
		w := start(t.Context(), t, f, o, dev)
		err := w.WaitAll(t.Context())
		if after%2 == 1 { // what a device has made of blocks is what it has made of them
			if err != nil {
				t.Error(err)
			}
			mustClose(t, w)
			continue
		}
		chunks := w.plan.Groups[0].Cut(plan.CutOptions{Bytes: 400_000, Ramp: 1, Expand: []bool{true}})
		seg := chunks[after/2].Segs[0]
		if len(chunks) < 3 || d.struck == 0 {
			t.Fatalf("%d chunks", len(chunks))
		}
		wantDamage(t, err, ProveError{
			Device: dev, Tensor: "a", Offset: seg.Src + int64(seg.SrcBytes) - 1, Bit: 5, InFile: true, Blocks: 1,
		})
		if seg.Src+int64(seg.SrcBytes) > size {
			t.Errorf("beyond the tensor's %d bytes", size)
		}
		mustClose(t, w)
		wantBack(t, sw, using(sw))
	}
}

// TestProofFaults lets what a proof needs fail. A load that is to be proved fails with it, and nothing is left; another
// one goes on without, and says so.
func TestProofFaults(t *testing.T) {
	t.Parallel()
	kernel := []soft.Fault{
		{Func: "hiprtcCompileProgram", N: 1, Code: 6},
		{Func: "hipModuleLoadData", N: 1, Code: amdhip.ErrInvalidImage},
		{Func: "hipModuleLaunchKernel", N: 2, Code: amdhip.ErrLaunchFailure},
		{Func: "hipModuleLaunchKernel", N: checkLaunches + 1, Code: amdhip.ErrLaunchFailure},
		{Func: "hipModuleLaunchKernel", N: checkLaunches + 9, Code: amdhip.ErrLaunchFailure},
	}
	for _, fault := range kernel {
		for _, prove := range []Prove{ProveOn, ProveAuto} {
			t.Run(fmt.Sprintf("%s %d %v", fault.Func, fault.N, prove), func(t *testing.T) {
				t.Parallel()
				f := openModel(t, sample)
				dev, sw := openDevice(t, soft.Options{Poison: true})
				sw.Inject(fault)
				o := tight
				o.Prove, o.autoProve = prove, true
				w, err := load(t.Context(), f, o, dev)
				if prove == ProveAuto {
					if err != nil {
						t.Fatal(err)
					}
					if r := w.Report(); r.Proved || r.Unproved == "" {
						t.Errorf("proved: %v, %q", r.Proved, r.Unproved)
					}
					same(t, w.Plan(), contents(t, w), wanted(t, f, o))
					mustClose(t, w)
					return
				}
				if err == nil || fault.Func != "hiprtcCompileProgram" && !errors.Is(err, fault.Code) {
					t.Errorf("%v, want %v", err, fault.Code)
				}
				e, ok := errors.AsType[*TensorError](err)
				if fault.N > checkLaunches && (!ok || e.Op != "prove") {
					t.Errorf("%v does not say that it is the proof", err)
				}
				wantBack(t, sw, resources{})
			})
		}
	}
}

// TestProofCallsFail lets every single call of a load that is proved fail: it fails, or gives what it should.
func TestProofCallsFail(t *testing.T) {
	t.Parallel()
	f := openModel(t, small)
	for name, load := range map[string]loadFunc{"Load": load, "LoadSync": loadSync} {
		for _, fault := range []soft.Fault{
			{Func: "hipMalloc"},
			{Func: "hipHostMalloc"},
			{Func: "hipEventCreateWithFlags"},
			{Func: "hipStreamCreateWithFlags"},
			{Func: "hipMemcpyAsync"},
			{Func: "hipMemcpyAsync", Async: true},
			{Func: "hipEventRecord"},
			{Func: "hipEventQuery"},
			{Func: "hipModuleLaunchKernel"},
			{Func: "hipModuleLaunchKernel", Async: true},
			{Func: "hipMemGetInfo"},
		} {
			t.Run(fmt.Sprintf("%s/%s %v", name, fault.Func, fault.Async), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					for n := 1; ; n++ {
						dev, sw := openDevice(t, soft.Options{Integrated: n%2 == 0})
						if fault.N, fault.Code = n, amdhip.ErrUnknown; fault.Async {
							fault.Code = amdhip.ErrIllegalAddress
						}
						sw.Inject(fault)
						w, err := load(t.Context(), f, options{Policy: plan.Raw, Prove: ProveOn}, dev)
						sw.ClearFaults()
						if err == nil {
							wantProved(t, w)
							mustClose(t, w)
						}
						wantBack(t, sw, resources{})
						if calls := sw.Calls()[fault.Func]; calls < n || n > 40 {
							return
						}
					}
				})
			})
		}
	}
}

// TestProofAfterStartingOver: when the CPU takes over from a device that has failed to convert, all is proved, what had
// arrived by then, too.
func TestProofAfterStartingOver(t *testing.T) {
	t.Parallel()
	for _, async := range []bool{false, true} {
		over := 0
		for n := 1; n <= 12 && over == 0; n++ { // until it is a kernel that converts
			synctest.Test(t, func(t *testing.T) {
				f := openModel(t, sample)
				dev, sw := openDevice(t, soft.Options{LinkBytesPerSecond: 50e6})
				o := options{Chunk: 64 << 10, Staging: 64 << 10, Threads: 1, Streams: 1, autoAlways: true, Prove: ProveOn}
				w := start(t.Context(), t, f, o, dev)
				defer mustClose(t, w)
				if err := w.Wait(t.Context(), w.Tensors()[12].Name); err != nil {
					t.Fatal(err)
				}
				sw.Inject(soft.Fault{Func: "hipModuleLaunchKernel", N: n, Code: amdhip.ErrLaunchFailure, Async: async})
				err := w.WaitAll(t.Context())
				if _, unsummed := errors.AsType[*unsummed](err); unsummed {
					return
				} else if err != nil {
					t.Fatal(err)
				}
				r := w.Report()
				if over++; !r.Proved || r.ProvedTensors != w.Plan().Len() || r.Expanded == 0 ||
					r.Expanded == expandableTensors(w.Plan()) {
					t.Errorf("proved: %v, %d tensors; %d were converted by the device", r.Proved, r.ProvedTensors, r.Expanded)
				}
				if err := verify(t.Context(), w, f); err != nil {
					t.Error(err)
				}
			})
		}
		if over == 0 {
			t.Errorf("async %v: no load started over", async)
		}
	}
}

// TestStartingOverLeavesWhatHasArrived: a small tensor has arrived, and those before and behind it, with which it could
// share a chunk, have not. Another attempt must not write to it.
func TestStartingOverLeavesWhatHasArrived(t *testing.T) {
	t.Parallel()
	f := makeModel(t, nil, []made{
		{"before", gguf.F32, []uint64{24 << 10}}, {"small", gguf.F32, []uint64{64}}, {"behind", gguf.F32, []uint64{32 << 10}},
	})
	dev, sw := openDevice(t, soft.Options{Poison: true})
	o := reading(IODirect)
	o.Threads, o.Prove, o.autoProve = 2, ProveAuto, true
	arrived := make(chan struct{})
	goOn := sync.OnceFunc(func() { close(arrived) })
	var failing sync.Once
	o.readAt = func(file *os.File, b []byte, off int64) (int, error) {
		if off < 32<<10 || off > 180<<10 { // what the first chunk and the last one need
			<-arrived
			failing.Do(func() { sw.Inject(soft.Fault{Func: "hipModuleLaunchKernel", Code: amdhip.ErrLaunchFailure}) })
		}
		return file.ReadAt(b, off)
	}
	w := start(t.Context(), t, f, o, dev)
	defer mustClose(t, w)
	defer goOn()
	if err := w.Wait(t.Context(), "small"); err != nil {
		t.Fatal(err)
	}
	goOn()
	if err := w.WaitAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r := w.Report(); r.Unproved == "" {
		t.Errorf("%+v: the load did not start over", r)
	}
	same(t, w.Plan(), contents(t, w), wanted(t, f, o))
}

// TestProofIsCancelled ends loads that are proved at many points, the comparison among them.
func TestProofIsCancelled(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := openModel(t, sample)
		dev, sw := openDevice(t, soft.Options{LinkBytesPerSecond: 200e6, LinkLatency: 10 * time.Millisecond})
		gone := errors.New("gone")
		for n := range 60 {
			ctx, cancel := context.WithCancelCause(t.Context())
			time.AfterFunc(time.Duration(n)*4*time.Millisecond, func() { cancel(gone) })
			o := rawTight()
			o.Prove, o.Tensors = ProveOn, regexp.MustCompile("attn")
			w, err := load(ctx, f, o, dev)
			if err == nil {
				wantProved(t, w)
				mustClose(t, w)
			} else if !errors.Is(err, gone) {
				t.Error(err)
			}
			cancel(nil)
			wantBack(t, sw, resources{})
		}
	})
}

// TestProofStalls: a kernel of a proof that never ends is given up, and what it may still use is left.
func TestProofStalls(t *testing.T) {
	t.Parallel()
	for _, fault := range []soft.Fault{
		{Func: "hipModuleLaunchKernel", N: checkLaunches + 5, Stall: true}, {Func: "hipModuleLaunchKernel", N: checkLaunches + 5, Block: true},
	} {
		for _, apu := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				f := openModel(t, sample)
				devs, sw := leakyDevices(t, 1, soft.Options{Integrated: apu})
				sw.Inject(fault)
				o := tight
				o.Prove, o.Stall = ProveOn, 50*time.Millisecond
				w, err := load(t.Context(), f, o, devs...)
				if !errors.Is(err, ErrStalled) {
					t.Errorf("%+v: %v, want ErrStalled", fault, err)
				}
				if w != nil {
					mustClose(t, w)
				}
				if sw.Stats().DeviceBytes == 0 {
					t.Error("memory was freed that the device may still use")
				}
				sw.ClearFaults()
			})
		}
	}
}
