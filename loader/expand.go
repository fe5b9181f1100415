package loader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

const (
	// minSaved is how many bytes the link must be spared for DequantAuto to choose the device: at the speed of a fast one,
	// the time in which cached kernels are loaded and checked.
	minSaved = 256 << 20
	// minExpand is the least size of a tensor, in bytes of the file, that is worth launching a kernel for.
	minExpand = 4 << 10
)

// kernelSet is the kernels that one device has ready.
type kernelSet map[gpu.Key]*gpu.Set

// kernelCache keeps the kernels of one device for all loads of a Loader.
type kernelCache struct {
	making chan struct{} // has room for one: who makes kernels ready, so that two loads do not do it twice

	mu   sync.Mutex
	have kernelSet
	sets []*gpu.Set
}

func newKernelCache() *kernelCache {
	return &kernelCache{making: make(chan struct{}, 1), have: make(kernelSet)}
}

// get returns kernels for keys, and makes ready what is missing.
func (k *kernelCache) get(ctx context.Context, dev *amdhip.Device, c *gpu.Compiler, keys []gpu.Key) (kernelSet, error) {
	select {
	case k.making <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-k.making }()
	missing := slices.DeleteFunc(slices.Clone(keys), func(key gpu.Key) bool { return k.ready(keys)[key] != nil })
	if len(missing) > 0 {
		set, err := c.Load(ctx, dev, missing)
		if err != nil {
			return nil, err
		}
		k.add(set, missing)
	}
	return k.ready(keys), nil
}

// ready returns those of keys that are ready.
func (k *kernelCache) ready(keys []gpu.Key) kernelSet {
	k.mu.Lock()
	defer k.mu.Unlock()
	ready := make(kernelSet, len(keys))
	for _, key := range keys {
		if set := k.have[key]; set != nil {
			ready[key] = set
		}
	}
	return ready
}

// add enters kernels that are ready.
func (k *kernelCache) add(set *gpu.Set, keys []gpu.Key) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sets = append(k.sets, set)
	for _, key := range keys {
		k.have[key] = set
	}
}

// things takes all kernels out of the cache, to be unloaded. Nothing that they do may be running then.
func (k *kernelCache) things(dev *amdhip.Device) (all []thing) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, set := range k.sets {
		all = append(all, thing{dev, set.Close, LeftError{Kernels: 1}})
	}
	clear(k.have)
	k.sets = nil
	return all
}

// expansion is what the devices convert: which tensors of each group, and with which kernels on each device. The zero
// value is nothing.
type expansion struct {
	tensors [][]bool    // by group, by tensor; nil: nothing of that group
	kernels []kernelSet // by device of the Loader
}

// of is which tensors of group i the devices convert; nil: none.
func (x *expansion) of(i int) []bool {
	if x.tensors == nil {
		return nil
	}
	return x.tensors[i]
}

// expand decides what the devices convert, and makes their kernels ready.
func (l *Loader) expand(ctx context.Context, limit *watch.Limit, p *Plan, by Dequant) (x expansion, err error) {
	if by == DequantCPU {
		return x, nil
	}
	x.tensors = make([][]bool, len(p.Groups))
	x.kernels = make([]kernelSet, len(l.devices))
	for i := range p.Groups {
		if x.tensors[i], err = l.expandGroup(ctx, limit, p, i, x.kernels); err != nil {
			return x, err
		}
	}
	return x, nil
}

// expandGroup decides for one group. Devices with the same bytes all convert, or none does.
func (l *Loader) expandGroup(
	ctx context.Context, limit *watch.Limit, p *Plan, i int, ready []kernelSet,
) ([]bool, error) {
	tensors, keys := l.wantsExpanded(p, i)
	if len(keys) == 0 {
		return nil, nil
	}
	err := l.readyKernels(ctx, limit, p, i, tensors, keys, ready)
	switch {
	case err == nil:
		return tensors, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case l.config.Dequant != DequantAuto, watch.Lost(err): // nothing else can be expected of a device that hangs
		return nil, fmt.Errorf("loader: the device cannot convert: %w", err)
	}
	l.config.Logger.Warn("the CPU converts, as the device cannot", slog.Any("error", err))
	return nil, nil
}

// wantsExpanded returns which tensors of group i the devices are to convert, if they have the kernels and the memory,
// and the kernels for that; none where the CPU converts all.
func (l *Loader) wantsExpanded(p *Plan, i int) (tensors []bool, keys []gpu.Key) {
	if l.config.Dequant == DequantCPU {
		return nil, nil
	}
	g, auto, image := &p.Groups[i], l.config.Dequant == DequantAuto, p.image != nil
	if auto && !l.config.autoAlways && slices.ContainsFunc(l.of(g), func(d *amdhip.Device) bool {
		return d.Runtime().Kind() != "hip" || d.Integrated()
	}) {
		return nil, nil
	}
	tensors, keys, saved := expandable(g, auto && !image, image)
	if auto && !l.config.autoAlways && !image && saved < minSaved {
		return nil, nil
	}
	return tensors, keys
}

// ScratchBytes is how much device memory a load by the plan takes at most, on each device of the Loader, beside the
// model: places for blocks that the devices convert, and the sums of a load that is proved, which by says. It is the
// Loader's, which keeps it for later loads; see Loader.ScratchBytes.
func (p *Plan) ScratchBytes(by Prove) ([]uint64, error) {
	l := p.loader
	expand, sum := make([][]bool, len(p.Groups)), make([]uint64, len(l.devices))
	for i := range p.Groups {
		if tensors, keys := l.wantsExpanded(p, i); len(keys) > 0 {
			expand[i] = tensors
		}
	}
	all, err := p.sizes(l.config, expand)
	if err != nil {
		return nil, err
	}
	proved := by == ProveOn || by == ProveAuto && (l.unfree(p) == nil || l.config.autoProve)
	for i := range p.Groups {
		n := all[i].scratchBytes()
		if proved && len(p.Groups[i].Tensors) > 0 {
			n += summerBytes(sumBytes(&p.Groups[i], expand[i]))
		}
		for _, d := range p.Groups[i].Devices {
			sum[d] += n
		}
	}
	return sum, nil
}

// readyKernels sees that the devices of group i have memory for the blocks, too, and makes their kernels ready.
func (l *Loader) readyKernels(ctx context.Context, limit *watch.Limit, p *Plan, i int, tensors []bool, keys []gpu.Key,
	ready []kernelSet,
) error {
	expand := make([][]bool, len(p.Groups))
	expand[i] = tensors
	all, err := p.sizes(l.config, expand)
	if err != nil {
		return err
	}
	free, err := l.free(ctx, limit)
	if err != nil {
		return err
	}
	for _, d := range p.Groups[i].Devices {
		if err := l.fits(p, d, free[d], all[i].scratchBytes()); err != nil {
			return err
		}
		if ready[d], err = l.readyOn(ctx, limit, d, l.compiler(), keys); err != nil {
			return err
		}
	}
	return nil
}

// compiler makes kernels for the devices.
func (l *Loader) compiler() *gpu.Compiler {
	if c := l.config.Compiler; c != nil {
		return c
	}
	return &gpu.Compiler{Logger: l.config.Logger}
}

// readyOn makes kernels ready on device d.
func (l *Loader) readyOn(
	ctx context.Context, limit *watch.Limit, d int, c *gpu.Compiler, keys []gpu.Key,
) (kernelSet, error) {
	dev := l.devices[d]
	ready, err := l.kernels[d].get(watch.With(ctx, limit), dev, c, keys)
	if errors.Is(err, ErrStalled) {
		l.calls.Hang()
		l.leave(LeftError{Kernels: 1})
	}
	return ready, onDevice(dev, len(l.devices) > 1, err)
}

// expandable returns which tensors of g a device converts, the kernels for them, and how many bytes the link is spared.
// small says that small tensors are worth it, too: those of an Image, which the CPU need not touch then.
func expandable(g *plan.Group, auto, small bool) (tensors []bool, keys []gpu.Key, saved uint64) {
	tensors = make([]bool, len(g.Tensors))
	for i := range g.Tensors {
		t := &g.Tensors[i]
		if !isExpandable(t, auto, small) {
			continue
		}
		tensors[i] = true
		saved += t.Bytes - uint64(t.Size)
		if key := keyOf(t); !slices.Contains(keys, key) {
			keys = append(keys, key)
		}
	}
	return tensors, keys, saved
}

// isExpandable reports whether a device can convert t. With auto only what does not become smaller is worth it.
func isExpandable(t *plan.Tensor, auto, small bool) bool {
	return t.Target != t.Type && t.Size > 0 && gpu.Supported(t.Target, t.Type) &&
		(!auto || t.Bytes >= uint64(t.Size)) && (small || t.Size >= minExpand)
}

// keyOf is the kernel that converts t.
func keyOf(t *plan.Tensor) gpu.Key { return gpu.Key{To: t.Target, From: t.Type} }

// scratchSize is how much device memory a place for chunks of so many bytes takes. Kernels may read a little beyond a
// chunk, on both sides.
func scratchSize(chunk int) uint64 {
	return (uint64(chunk)+plan.Align-1)&^(plan.Align-1) + 2*plan.Align
}

// scratch is device memory for chunks on their way to being expanded.
type scratch struct {
	mem    *amdhip.Memory
	places []place
}

// place takes the chunks of one stream, one after the other: the stream's order is what keeps them apart.
type place struct {
	taken chan struct{} // has room for one: who enqueues a chunk's copy and kernels
	ptr   amdhip.DevicePtr
}

// newScratch allocates n places for chunks.
func newScratch(ctx context.Context, limit *watch.Limit, dev *amdhip.Device, n, chunk int) (*scratch, error) {
	size := scratchSize(chunk)
	mem, err := watch.Do(ctx, limit, "allocating device memory for blocks", func() (*amdhip.Memory, error) {
		return dev.Malloc(uint64(n) * size)
	}, func(m *amdhip.Memory) { _ = m.Close() })
	if errors.Is(err, amdhip.ErrOutOfMemory) {
		err = fmt.Errorf("%w: %w", ErrInsufficientMemory, err)
	}
	if err != nil {
		return nil, err
	}
	s := &scratch{mem: mem, places: make([]place, n)}
	for i := range s.places {
		s.places[i].taken = make(chan struct{}, 1)
		s.places[i].ptr = mem.Ptr() + amdhip.DevicePtr(uint64(i)*size+plan.Align)
	}
	return s, nil
}
