package loader

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// ErrOtherBytes is matched by the error of Scrub.Repair when what a block would be written from does not give the bytes
// that were loaded.
var ErrOtherBytes = errors.New("this does not give the bytes that were loaded")

// repairTries is how often a block is written before the memory itself is taken to be bad.
const repairTries = 2

// Repair writes a block that Next has found damaged again, where it is, so that all who have the memory mapped get it
// back. The bytes are those of im or, if that is nil, of f, the model's file; the CPU converts them. Nothing is written
// but what has the fingerprint of the block: else the error matches ErrOtherBytes, of an Image that is damaged there it
// is a *ProveError with Host as well. The error is a *ProveError without Host when the block is wrong after it has been
// written.
func (w *Scrub) Repair(ctx context.Context, d *ProveError, im *Image, f *gguf.File) error {
	if err := w.model.acquire(); err != nil {
		return err
	}
	defer w.model.release()
	i := slices.IndexFunc(w.tensors, func(t scrubbed) bool { return t.Tensor.Name == d.Tensor })
	if i < 0 {
		return fmt.Errorf("%w: no tensor %q", ErrBadOption, d.Tensor)
	}
	t := &w.tensors[i]
	block := int(d.Offset / kernels.FingerprintBlock)
	good, err := w.scrubber.original(ctx, t.Tensor, d, im, f)
	if err != nil {
		return err
	}
	var sum [1]uint64
	if kernels.Fingerprint(sum[:], good); sum[0] != t.Sums[block] {
		err := fmt.Errorf("loader: tensor %q, bytes %d to %d: %w", d.Tensor, d.Offset, d.Offset+int64(d.Bytes), ErrOtherBytes)
		if im != nil {
			return errors.Join(err, im.damageIn(t.Tensor, d.Offset, d.Bytes))
		}
		return err
	}
	run := []scrubRun{{tensor: t, at: d.Offset, bytes: int64(d.Bytes)}}
	for range repairTries {
		s := w.scrubber.summer
		copy(s.copied.Bytes()[sumSize*scrubSums:], good)
		err := w.do(ctx, "writing a block again", run, func() error {
			return s.stream.CopyToDevice(t.Ptr+amdhip.DevicePtr(d.Offset), s.copied, sumSize*scrubSums, d.Bytes)
		})
		if err == nil {
			err = w.look(ctx, run)
		}
		if err != nil {
			return err
		}
		if len(w.compare(run[0])) == 0 {
			return nil
		}
	}
	return w.compare(run[0])[0]
}

// original returns the bytes that a block is to have.
func (s *Scrubber) original(
	ctx context.Context, t *plan.Tensor, d *ProveError, im *Image, f *gguf.File,
) ([]byte, error) {
	seg, skip := around(t, d.Offset, d.Bytes)
	var src, scratch []byte
	convert := func() ([]byte, error) {
		if t.Target == t.Type {
			return slices.Clone(src), nil
		}
		dst := make([]byte, seg.DstBytes)
		return dst, s.loader.kernelsOfCPU.Dequantize(dst, t.Target, src, t.Type)
	}
	var all []byte
	var err error
	if im != nil {
		if at, ok := im.places[t.Name]; !ok || at.size != t.Size || !im.filled.Load() {
			return nil, fmt.Errorf("%w: the image does not have the %d bytes of tensor %q", ErrBadOption, t.Size, t.Name)
		}
		src = im.segment(t, &seg, &scratch)
		all, err = convert()
	} else {
		in, missing := t.In(f)
		if missing != nil {
			return nil, missing
		}
		if src, err = read.Tensor(ctx, f, &scratch, in, seg.Src, seg.SrcBytes); err == nil {
			err = f.Guard(func() (err error) {
				all, err = convert()
				return err
			})
			read.LetGo(f, in, seg.Src, seg.SrcBytes)
		}
	}
	if err != nil {
		return nil, &TensorError{Tensor: t.Name, Op: "read", Offset: seg.Src, Bytes: seg.SrcBytes, Err: err}
	}
	return all[skip : skip+d.Bytes], nil
}

// around returns the whole blocks of t's type that n bytes of the tensor on the device, from off on, are made of; and
// how many bytes of what they give come before those.
func around(t *plan.Tensor, off int64, n int) (seg plan.Segment, skip int) {
	in, out := t.Block()
	first, end := off/int64(out), (off+int64(n)+int64(out)-1)/int64(out)
	return plan.Segment{
		Src: first * int64(in), SrcBytes: int(end-first) * in, DstBytes: int(end-first) * out,
	}, int(off - first*int64(out))
}

// damageIn looks whether the Image has changed where it has the bytes that n bytes on the device are made of.
func (im *Image) damageIn(t *plan.Tensor, off int64, n int) error {
	seg, _ := around(t, off, n)
	last := (seg.Src + int64(seg.SrcBytes) - 1) / kernels.FingerprintBlock
	for b := seg.Src / kernels.FingerprintBlock; b <= last; b++ {
		if e := im.wrong(t, int(b)); e != nil {
			return e
		}
	}
	return nil
}

// wrong says that a block of t has changed since the Image was filled; nil: it has not.
func (im *Image) wrong(t *plan.Tensor, block int) *ProveError {
	got, want := im.sumOf(t, block), im.prints[t.Name][block]
	if got == want {
		return nil
	}
	e := &ProveError{Tensor: t.Name, InFile: true, Host: true, Want: want, Got: got, Blocks: 1}
	e.place(block, t)
	return e
}

// checkBytes is how much of an Image Check looks at in one go.
const checkBytes = 4 << 20

// Check looks whether the Image, which was made for p, is what Fill has read: at 4 MiB of it, from byte at of its
// tensors on. It returns where to go on, 0 when all has been seen, how many bytes it has looked at, and a *ProveError
// for the first block that has changed. The Image must be filled.
func (im *Image) Check(p *plan.Plan, at int64) (next, bytes int64, err error) {
	for _, t := range p.Tensors() {
		if at >= t.Size {
			at, next = at-t.Size, next+t.Size
			continue
		}
		for b := at / kernels.FingerprintBlock; b < kernels.Fingerprints(t.Size); b++ {
			if bytes >= checkBytes {
				return next + b*kernels.FingerprintBlock, bytes, nil
			}
			if e := im.wrong(t, int(b)); e != nil {
				return 0, bytes, e
			}
			bytes += min(kernels.FingerprintBlock, t.Size-b*kernels.FingerprintBlock)
		}
		at, next = 0, next+t.Size
	}
	return 0, bytes, nil
}
