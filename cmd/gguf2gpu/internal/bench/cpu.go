package bench

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/synth"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

const (
	// l2Output is the output of one call in the L2 working set, and l2Elems how many different elements such calls convert
	// in turn. With fewer, the branch predictor would learn them by heart.
	l2Output = 128 << 10
	l2Elems  = 1 << 20

	memoryCall = 1 << 20 // bytes of output of one call in the memory working set

	kernelRunTime = 2 * time.Millisecond // of one run, at least
)

// CPUOptions says what [CPUKernels] measures.
type CPUOptions struct {
	Types  []gguf.Type   // from these types of blocks
	DTypes []gguf.Type   // to these types of elements
	ISAs   []kernels.ISA // with these tiers of instructions
	Runs   int           // of each kind, at least 1
	Buffer uint64        // bytes of output and of input, from MinBuffer up to MaxBuffer; 0: MemoryBuffer
}

// CPUKernels measures how fast one thread converts blocks, in both working sets. A tier without a kernel of its own for
// a conversion is left out, since it uses the next lower one. Errors are those of the context and of unsupported tiers.
func CPUKernels(ctx context.Context, o CPUOptions) (*KernelsReport, error) {
	size := cmp.Or(o.Buffer, uint64(MemoryBuffer))
	b := &cpuBench{runs: o.Runs, memory: walk{dst: make([]byte, size), src: make([]byte, size)}}
	if err := b.measure(ctx, o); err != nil {
		return nil, err
	}
	return &b.report, nil
}

// walk goes through two buffers, some bytes of each at a time. At the end of a buffer it starts over, so that in a
// large one a byte comes again only after all others.
type walk struct {
	dst, src         []byte
	dstStep, srcStep int
	dstAt, srcAt     int
}

// next returns the next bytes to write and to read.
func (w *walk) next() (dst, src []byte) {
	if w.dstAt+w.dstStep > len(w.dst) {
		w.dstAt = 0
	}
	if w.srcAt+w.srcStep > len(w.src) {
		w.srcAt = 0
	}
	dst, src = w.dst[w.dstAt:w.dstAt+w.dstStep], w.src[w.srcAt:w.srcAt+w.srcStep]
	w.dstAt += w.dstStep
	w.srcAt += w.srcStep
	return dst, src
}

// convert sets the steps for a conversion that writes so many bytes of output at a time.
func (w *walk) convert(to, from gguf.Type, bytes int) {
	w.dstStep, w.srcStep = bytes, bytes/to.BlockBytes()/from.BlockElems()*from.BlockBytes()
}

// cpuBench measures kernels on the CPU.
type cpuBench struct {
	runs   int
	memory walk // the large buffers; the small working set uses pieces of them
	report KernelsReport
}

// measure fills the report.
func (b *cpuBench) measure(ctx context.Context, o CPUOptions) error {
	if err := b.measureCeilings(ctx); err != nil {
		return err
	}
	for _, from := range o.Types {
		b.fillSource(from)
		for _, to := range o.DTypes {
			var done []kernels.ISA
			for _, isa := range o.ISAs {
				k, err := kernels.For(isa)
				if err != nil {
					return err
				}
				tier := k.Tier(to, from)
				if slices.Contains(done, tier) {
					continue
				}
				done = append(done, tier)
				if err := b.measureKernel(ctx, k, to, from); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// measureCeilings measures copies and fills.
func (b *cpuBench) measureCeilings(ctx context.Context) error {
	best, err := kernels.For(slices.Max(kernels.Supported()))
	if err != nil {
		return err
	}
	// Pages that were never written are slower to write and faster to read than others.
	b.fillSource(gguf.F32)
	clear(b.memory.dst)
	small := walk{dst: b.memory.dst[:l2Output], src: b.memory.src[:l2Output]}
	small.convert(gguf.F32, gguf.F32, l2Output)
	b.memory.convert(gguf.F32, gguf.F32, memoryCall)
	c := &b.report.Ceilings
	for _, m := range []struct {
		to    *float64
		walk  *walk
		write func(dst, src []byte)
	}{
		{&c.L2.Memcpy, &small, func(dst, src []byte) { copy(dst, src) }},
		{&c.Memory.Memcpy, &b.memory, func(dst, src []byte) { copy(dst, src) }},
		{&c.Memory.Fill, &b.memory, func(dst, _ []byte) { best.FillNT(dst, 1) }},
	} {
		*m.to, err = b.speed(ctx, m.walk, func(dst, src []byte) error {
			m.write(dst, src)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// measureKernel measures one conversion in both working sets.
func (b *cpuBench) measureKernel(ctx context.Context, k *kernels.Kernels, to, from gguf.Type) error {
	small := walk{dst: b.memory.dst[:l2Output], src: b.memory.src[:l2Elems/from.BlockElems()*from.BlockBytes()]}
	small.convert(to, from, l2Output)
	b.memory.convert(to, from, memoryCall)
	for _, set := range []struct {
		name string
		walk *walk
		run  func(dst []byte, to gguf.Type, src []byte, from gguf.Type) error
	}{
		{SetL2, &small, k.Dequantize},
		{SetMemory, &b.memory, k.DequantizeNT},
	} {
		speed, err := b.speed(ctx, set.walk, func(dst, src []byte) error { return set.run(dst, to, src, from) })
		if err != nil {
			return err
		}
		b.report.Kernels = append(b.report.Kernels, KernelRun{
			Type: lower(from), DType: lower(to), ISA: k.Tier(to, from).String(), WorkingSet: set.name, GBps: speed,
		})
	}
	return nil
}

// fillSource fills the input with random weights of type t: as many different ones as the L2 working set has, repeated.
func (b *cpuBench) fillSource(t gguf.Type) {
	src := b.memory.src
	n := l2Elems / t.BlockElems() * t.BlockBytes()
	synth.Fill(src[:n], t, 1)
	for n < len(src) {
		n += copy(src[n:], src[:n])
	}
	b.memory.srcAt = 0
}

// speed calls write for step after step of the walk and returns the median speed of the runs.
func (b *cpuBench) speed(ctx context.Context, w *walk, write func(dst, src []byte) error) (float64, error) {
	calls := 1
	var speeds []float64
	for len(speeds) < b.runs {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		start := time.Now()
		for range calls {
			if err := write(w.next()); err != nil {
				return 0, err
			}
		}
		took := time.Since(start)
		if len(speeds) == 0 && took < kernelRunTime {
			calls *= 2 // too short to measure, and warming up
			continue
		}
		speeds = append(speeds, float64(calls)*float64(w.dstStep)/took.Seconds()/1e9)
	}
	return median(speeds), nil
}
