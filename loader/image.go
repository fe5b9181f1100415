package loader

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// Image is host memory that holds the bytes which the tensors of a plan have in the model's file, one tensor behind the
// other. Devices copy straight from it, so that a load from an Image in page-locked memory costs no work of the CPU
// (see Loader.PlanImage). The bytes are the file's, whatever the tensors become: one Image serves every policy.
//
// The memory is a list of slabs and stays the caller's. It must not be freed while a load from the Image runs, nor when
// Stuck says that a device may go on reading it.
type Image struct {
	slabs  []*amdhip.HostMemory
	starts []int64 // of each slab, in the Image; and the end of the last one
	places map[string]imagePlace
	prints map[string]fingerprints // of the tensors' bytes, as Fill has read them
	bytes  int64
	filled atomic.Bool
	stuck  atomic.Bool
	way    *onItsWay // nil: Fill fills it
}

// imagePlace is where the bytes of a tensor are.
type imagePlace struct{ off, size int64 }

// fillBytes is how much Fill copies between two looks at its context.
const fillBytes = 4 << 20

// ImageBytes is how many bytes the slabs of an Image for p must have together.
func ImageBytes(p *plan.Plan) int64 {
	_, n := imagePlaces(p)
	return n
}

// imagePlaces lays the tensors of p out in file order. Each begins at a multiple of plan.Align, as it does in device
// memory, so that neighbours that stay as they are travel in one copy.
func imagePlaces(p *plan.Plan) (map[string]imagePlace, int64) {
	places, at := make(map[string]imagePlace, p.Len()), int64(0)
	for _, t := range p.Tensors() {
		places[t.Name] = imagePlace{at, t.Size}
		at = (at + max(t.Size, 1) + plan.Align - 1) &^ (plan.Align - 1)
	}
	return places, at
}

// NewImage returns an empty Image for the tensors of p. The slabs must have ImageBytes(p) bytes together, else the
// error matches ErrBadOption; a tensor may lie in several.
func NewImage(p *plan.Plan, slabs []*amdhip.HostMemory) (*Image, error) {
	sizes := make([]int64, len(slabs))
	for i, s := range slabs {
		sizes[i] = int64(s.Len())
	}
	im, err := newImage(p, sizes)
	if err == nil {
		im.slabs = slabs
	}
	return im, err
}

// newImage is NewImage without the slabs.
func newImage(p *plan.Plan, sizes []int64) (*Image, error) {
	im := &Image{prints: make(map[string]fingerprints)}
	im.places, im.bytes = imagePlaces(p)
	at := int64(0)
	for _, n := range sizes {
		im.starts = append(im.starts, at)
		at += n
	}
	im.starts = append(im.starts, at)
	if at < im.bytes {
		return nil, fmt.Errorf("%w: slabs of %d bytes for an image of %d", ErrBadOption, at, im.bytes)
	}
	return im, nil
}

// Fill reads the tensors of p, which the Image was made for, from f. It is called once, by one goroutine; PlanImage
// refuses the Image until it has succeeded. The error is a *TensorError or the cause of ctx's end.
func (im *Image) Fill(ctx context.Context, f *gguf.File, p *plan.Plan) error {
	var scratch []byte
	end := int64(0) // of what has been written
	for _, t := range p.Tensors() {
		at, ok := im.places[t.Name]
		if !ok || at.size != t.Size {
			return fmt.Errorf("%w: the image was made for another plan: tensor %q", ErrBadOption, t.Name)
		}
		im.clear(end, at.off)
		prints := make(fingerprints, kernels.Fingerprints(t.Size))
		block, _ := t.Block()
		step := int64(max(1, fillBytes/block) * block)
		for off := int64(0); off < t.Size; off += step {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			n := int(min(step, t.Size-off))
			data, err := read.Tensor(ctx, f, &scratch, t, off, n)
			if err == nil {
				err = f.Guard(func() error {
					im.each(at.off+off, int64(n), func(slab, from, done, n int) {
						begin := off + int64(done)
						kernels.CopyAddFingerprint(im.slabs[slab].Bytes()[from:from+n], data[done:done+n],
							prints[begin/kernels.FingerprintBlock:], begin)
					})
					return nil
				})
			}
			if err != nil {
				return &TensorError{Tensor: t.Name, Op: "read", Offset: off, Bytes: n, Err: err}
			}
			read.LetGo(f, t, off, n)
		}
		im.prints[t.Name], end = prints, at.off+t.Size
	}
	im.clear(end, im.bytes)
	im.filled.Store(true)
	return nil
}

// damaged reports whether a block of t has changed since the Image was filled.
func (im *Image) damaged(t *plan.Tensor, block int) bool {
	return im.sumOf(t, block) != im.prints[t.Name][block]
}

// sumOf is the fingerprint that a block of t has now.
func (im *Image) sumOf(t *plan.Tensor, block int) uint64 {
	off := int64(block) * kernels.FingerprintBlock
	var sum [1]uint64
	im.each(im.places[t.Name].off+off, min(kernels.FingerprintBlock, t.Size-off), func(slab, from, done, n int) {
		kernels.AddFingerprint(sum[:], int64(done), im.slabs[slab].Bytes()[from:from+n])
	})
	return sum[0]
}

// Stuck reports whether a load from the Image has ended while a device may still be reading it. Its memory must not be
// freed then.
func (im *Image) Stuck() bool { return im.stuck.Load() }

// each calls f for each slab that has some of the n bytes from off on: where they are in the slab, how many came
// before, and how many they are.
func (im *Image) each(off, n int64, f func(slab, from, done, n int)) {
	i := 0
	for im.starts[i+1] <= off {
		i++
	}
	for done := int64(0); done < n; i++ {
		at := off + done
		take := min(n-done, im.starts[i+1]-at)
		f(i, int(at-im.starts[i]), int(done), int(take))
		done += take
	}
}

// clear zeroes the bytes from lo to hi. They are padding, which travels with its neighbours.
func (im *Image) clear(lo, hi int64) {
	if lo < hi {
		im.each(lo, hi-lo, func(slab, from, _, n int) { clear(im.slabs[slab].Bytes()[from : from+n]) })
	}
}

// segment returns the bytes of a segment. Those that lie in several slabs are put together in buf.
func (im *Image) segment(t *plan.Tensor, s *plan.Segment, buf *[]byte) (b []byte) {
	off, n := im.places[t.Name].off+s.Src, s.SrcBytes
	im.each(off, int64(n), func(slab, from, done, part int) {
		piece := im.slabs[slab].Bytes()[from : from+part]
		if part == n {
			b = piece
			return
		}
		if done == 0 {
			*buf = (*buf)[:0]
		}
		*buf = append(*buf, piece...)
		b = *buf
	})
	return b
}

// runs calls f for each piece of one slab that is copied to one piece of the device, for a chunk whose bytes stay as
// they are in the file: the slab, where in it, where in the chunk, and how many bytes.
func (im *Image) runs(g *plan.Group, c *plan.Chunk, f func(slab, from, to, n int) error) error {
	var err error
	emit := func(off int64, to, n int) {
		im.each(off, int64(n), func(slab, from, done, n int) {
			if err == nil {
				err = f(slab, from, to+done, n)
			}
		})
	}
	begin, to, end := int64(0), 0, 0 // of the run that is being put together
	for i := range c.Segs {
		s := &c.Segs[i]
		off := im.places[g.Tensors[s.Tensor].Name].off + s.Src
		if i == 0 || off-begin != int64(s.Dst-to) {
			if i > 0 {
				emit(begin, to, end-to)
			}
			begin, to = off, s.Dst
		}
		end = s.Dst + s.DstBytes
	}
	emit(begin, to, end-to)
	return err
}

// suits refuses a plan of other tensors.
func (im *Image) suits(p *plan.Plan) error {
	for _, t := range p.Tensors() {
		if at, ok := im.places[t.Name]; !ok || at.size != t.Size {
			return fmt.Errorf("%w: the image does not have the %d bytes of tensor %q", ErrBadOption, t.Size, t.Name)
		}
	}
	return nil
}

// PlanImage returns a Plan that is loaded from im and not from a file. p is the plan of a model for the same devices,
// such as Model.Plan of an earlier load, and im an Image of its tensors. Where devices can convert, they do; else the
// CPU converts through the usual staging memory. Request.Check and Request.Hash are not for such loads. The error
// matches ErrBadOption when im is not filled, or not with the tensors of p.
func (l *Loader) PlanImage(p *plan.Plan, im *Image) (*Plan, error) {
	switch {
	case !im.filled.Load():
		return nil, fmt.Errorf("%w: the image is not filled", ErrBadOption)
	case im.Stuck():
		return nil, fmt.Errorf("%w: a device that hangs may still read the image", ErrStalled)
	case p.Devices != len(l.devices):
		return nil, fmt.Errorf("%w: a plan for %d devices, the Loader has %d", ErrBadOption, p.Devices, len(l.devices))
	}
	if err := im.suits(p); err != nil {
		return nil, err
	}
	made := &Plan{Plan: p, image: im, loader: l}
	_, err := made.sizes(l.config, nil)
	return made, err
}

var errImageOnly = errors.New("a load from an image cannot check or hash, and is not for LoadSync: load from the file")

// suits refuses what a load from an Image cannot do.
func (p *Plan) suits(r Request, sync bool) error {
	if p.image != nil && (r.Check || r.Hash || sync) {
		return fmt.Errorf("%w: %w", ErrBadOption, errImageOnly)
	}
	if sync && len(p.Groups) > 1 && p.file.Reading().Once {
		return fmt.Errorf("%w: the synchronous loader fills one device after the other, and %s can be read only once and in order",
			ErrBadOption, p.file.Parts()[0].Path)
	}
	if r.Keep == nil {
		return nil
	}
	if p.image != nil || sync || r.Keep.way == nil {
		return fmt.Errorf("%w: Keep is for a load from a file, other than by LoadSync, and an Image of AwaitImage", ErrBadOption)
	}
	return r.Keep.suits(p.Plan)
}

// remote reports whether the model is on a server.
func (p *Plan) remote() bool { return p.file != nil && p.file.Remote() }

// sizes decides all sizes of a load by the plan: one entry for each group.
func (p *Plan) sizes(c Config, expand [][]bool) ([]sizes, error) {
	if p.file != nil {
		c = c.forFile(p.file)
	}
	all, err := sizesOf(p.Plan, c, p.remote(), expand)
	if err != nil || p.image == nil {
		return all, err
	}
	for i := range all {
		var converts []bool
		if expand != nil {
			converts = expand[i]
		}
		all[i].direct(&p.Groups[i], c, converts)
	}
	return all, nil
}

// directChunk is the size of a copy from page-locked memory, in bytes. On a PCIe 5 link copies of 16 MiB gave 99 % of
// what one large copy does, those of 4 MiB 97 %.
const directChunk = 16 << 20

// direct changes the sizes to those of a load from an Image, if the CPU has nothing to convert: then there is no
// staging memory, and one worker is enough to start all copies.
func (z *sizes) direct(g *plan.Group, c Config, expand []bool) {
	for i := range g.Tensors {
		if t := &g.Tensors[i]; t.Target != t.Type && (expand == nil || !expand[i]) {
			return
		}
	}
	z.unstaged, z.threads, z.staging = true, 1, 0
	if c.Chunk == 0 {
		z.chunk = max(minChunk, int(min((g.DeviceBytes+minChunk-1)/minChunk*minChunk, directChunk)))
	}
}
