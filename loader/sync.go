package loader

import (
	"context"
	"errors"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// LoadSync puts the tensors of m on dev the plain way: one thread, one buffer, one copy at a time, each waited for. It is the
// reference that Load is compared with, byte for byte, and the baseline that Load must beat. It shares the plan and the kernels
// with Load, and nothing of its pipeline: a copy that never ends hangs it. Of the options, those on threads, streams and reading
// have no effect, and it is always the CPU that converts.
func LoadSync(ctx context.Context, dev *amdhip.Device, m *gguf.Model, o Options) (*Model, error) {
	began := time.Now()
	o.Dequant = DequantCPU
	w, conv, err := prepare(ctx, dev, m, o)
	if err != nil {
		return nil, err
	}
	if err := w.loadSync(ctx, conv.cpu); err != nil {
		return nil, errors.Join(err, w.free())
	}
	w.report.Total = time.Since(began)
	close(w.finished)
	return w, nil
}

// loadSync does the work of LoadSync.
func (w *Model) loadSync(ctx context.Context, ker *kernels.Kernels) (err error) {
	pinning := time.Now()
	pool, err := newPool(w, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pool.Close()) }()
	stream, err := w.dev.NewStream()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stream.Close()) }()
	buf, err := pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer buf.Release()

	inspect := newInspector(w.plan, w.sums)
	var gathered []byte
	start := time.Now()
	w.ready.set(len(w.plan.Tensors), nil)
	w.issued.set(len(w.plan.Tensors), nil)
	r := &w.report
	r.Pin, r.PinTotal, r.PinnedBytes = start.Sub(pinning), start.Sub(pinning), pool.Stats().PinnedBytes
	r.Streams, r.Threads, r.ChunkBytes = 1, 1, pool.BufferBytes()
	total := int64(0)
	for i := range w.plan.Tensors {
		total += int64(w.plan.Tensors[i].Bytes)
	}
	for i := range w.plan.Tensors {
		t := &w.plan.Tensors[i]
		src, dst := t.Type.BlockBytes(), t.Target.BlockBytes()*t.Type.BlockElems()/t.Target.BlockElems()
		for off, done := int64(0), uint64(0); off < t.Size; {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			n := min(int(t.Size-off)/src, pool.BufferBytes()/max(src, dst)) // blocks
			out := buf.Bytes()[:n*dst]
			data, err := w.plan.data(ctx, &gathered, t, off, n*src)
			if err == nil {
				err = w.plan.model.Guard(func() error {
					if err := inspect.see(i, off, data); err != nil {
						return err
					}
					if t.Target == t.Type {
						copy(out, data)
						return nil
					}
					return ker.Dequantize(out, t.Target, data, t.Type)
				})
			}
			if _, named := errors.AsType[*TensorError](err); named {
				return err
			}
			if err != nil {
				return &TensorError{Tensor: t.Name, Op: "read", Offset: off, Bytes: n * src, Err: err}
			}
			err = buf.CopyToDevice(stream, w.ptr(t.arena, t.offset+done), len(out))
			if err == nil {
				err = stream.Synchronize()
			}
			if err != nil {
				return &TensorError{Tensor: t.Name, Op: "copy", Offset: int64(done), Bytes: len(out), Err: err}
			}
			if !buf.Pinned() {
				r.UnpinnedCopies++
			}
			w.plan.letGo(t, off, n*src)
			off, done = off+int64(n*src), done+uint64(len(out))
			r.UploadBytes += uint64(len(out))
			if w.plan.opts.Progress != nil {
				w.plan.opts.Progress(int64(r.UploadBytes), total)
			}
		}
	}
	r.Transfer = time.Since(start)
	if r.MappedBytes = r.ReadBytes; w.plan.model.Remote() {
		r.MappedBytes, r.RemoteBytes, r.Connections = 0, r.ReadBytes, 1
	}
	return nil
}
