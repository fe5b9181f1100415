package loader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
)

// Dequant says who converts tensors to another type.
type Dequant uint8

// Who converts. DequantAuto lets the device do it where that moves fewer bytes, if hipRTC is there to compile kernels and enough
// bytes are saved; when something about that fails, the CPU converts, and one warning says why. DequantGPU makes the
// device convert whatever it has a kernel for, and fails where it cannot.
const (
	DequantAuto Dequant = iota
	DequantCPU
	DequantGPU
)

var dequantNames = [...]string{DequantAuto: "auto", DequantCPU: "cpu", DequantGPU: "gpu"}

// String returns the name that ParseDequant takes.
func (d Dequant) String() string { return nameOf(d, dequantNames[:], "dequant") }

// ParseDequant returns the choice of that name: "auto", "cpu" or "gpu".
func ParseDequant(s string) (Dequant, error) {
	return parseName[Dequant](s, dequantNames[:], "way to dequantize")
}

const (
	// minSaved is how many bytes the link must be spared for DequantAuto to choose the device: at the speed of a fast one, the
	// time in which cached kernels are loaded and checked.
	minSaved = 256 << 20
	// minExpand is the least size of a tensor, in bytes of the file, that is worth launching a kernel for.
	minExpand = 4 << 10
	// expandStreams: each stream has one place for blocks on the device, and the copy of the next ones waits until the kernel has
	// read the last. Meanwhile the other streams keep the link busy.
	expandStreams = 4
)

// expandOn decides which tensors are converted on dev and returns the kernels for them, nil when there are none.
func (p *Plan) expandOn(ctx context.Context, dev *amdhip.Device) (*gpu.Set, error) {
	auto := p.opts.Dequant == DequantAuto
	if p.opts.Dequant == DequantCPU || auto && !p.opts.autoAlways && (dev.Runtime().Kind() != "hip" || dev.Integrated()) {
		return nil, nil
	}
	keys, saved := p.expandable(auto)
	if len(keys) == 0 || auto && !p.opts.autoAlways && saved < minSaved {
		return nil, nil
	}
	err := p.check(dev, uint64(p.scratchSlots())*scratchSize(p.opts.Chunk))
	var set *gpu.Set
	if err == nil {
		compiler := p.opts.Compiler
		if compiler == nil {
			compiler = &gpu.Compiler{Logger: p.opts.Logger}
		}
		set, err = compiler.Load(ctx, dev, keys)
	}
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case !auto:
		return nil, fmt.Errorf("loader: the device cannot convert: %w", err)
	default:
		p.opts.Logger.Warn("the CPU converts, as the device cannot", slog.Any("error", err))
		return nil, nil
	}
	for i := range p.Tensors {
		p.Tensors[i].expand = p.Tensors[i].expandable(auto)
	}
	return set, nil
}

// expandable returns the kernels that the plan's tensors have use for, and how many bytes the link is spared by them.
func (p *Plan) expandable(auto bool) (keys []gpu.Key, saved uint64) {
	seen := make(map[gpu.Key]bool)
	for i := range p.Tensors {
		t := &p.Tensors[i]
		if !t.expandable(auto) {
			continue
		}
		saved += t.Bytes - uint64(t.Size)
		if !seen[t.key()] {
			seen[t.key()] = true
			keys = append(keys, t.key())
		}
	}
	return keys, saved
}

// expandable reports whether the device is to convert t. On its own account it converts only what does not become smaller.
func (t *PlannedTensor) expandable(auto bool) bool {
	return t.Target != t.Type && t.Size >= minExpand && gpu.Supported(t.Target, t.Type) && (!auto || t.Bytes >= uint64(t.Size))
}

// expanded counts the tensors that the device converts.
func (p *Plan) expanded() (n int) {
	for i := range p.Tensors {
		if p.Tensors[i].expand {
			n++
		}
	}
	return n
}

// scratchSlots is how many streams expand, each in a place of its own. Together they take no more than the staging memory does,
// or one chunk.
func (p *Plan) scratchSlots() int {
	n := p.opts.Streams
	if p.opts.defaultStreams {
		n = expandStreams
	}
	return max(1, min(n, int(p.opts.Staging/int64(p.opts.Chunk))))
}

// scratchSize is how much device memory a slot for chunks of so many bytes takes.
func scratchSize(chunk int) uint64 { return alignUp(uint64(chunk), deviceAlign) + 2*deviceAlign }

// scratch is device memory for chunks on their way to being expanded.
type scratch struct {
	mem   *amdhip.Memory
	slots []slot
}

// slot takes the chunks of one stream, one after the other: the stream's order is what keeps them apart.
type slot struct {
	mu  sync.Mutex // held while a chunk's copy and kernels are enqueued
	ptr amdhip.DevicePtr
}

// newScratch allocates n slots. Kernels may read a little beyond a chunk, on both sides.
func newScratch(dev *amdhip.Device, n, chunk int) (*scratch, error) {
	size := scratchSize(chunk)
	mem, err := dev.Malloc(uint64(n) * size)
	if errors.Is(err, amdhip.ErrOutOfMemory) {
		err = fmt.Errorf("%w: %w", ErrInsufficientMemory, err)
	}
	if err != nil {
		return nil, err
	}
	s := &scratch{mem: mem, slots: make([]slot, n)}
	for i := range s.slots {
		s.slots[i].ptr = mem.Ptr() + amdhip.DevicePtr(uint64(i)*size+deviceAlign)
	}
	return s, nil
}

// expand enqueues the kernels that turn c, whose bytes are at from when they run, into tensors.
func (t *target) expand(stream *amdhip.Stream, c *chunk, from amdhip.DevicePtr) error {
	plan := t.model.plan
	for i := range c.segs {
		s := &c.segs[i]
		x := &plan.Tensors[s.tensor]
		out := t.model.ptr(x.arena, x.offset+plan.tensorOffset(s))
		blocks := uint64(s.srcBytes / x.Type.BlockBytes())
		if err := t.set.Launch(stream, x.key(), out, from+amdhip.DevicePtr(s.dst), blocks); err != nil {
			return err
		}
	}
	return nil
}
