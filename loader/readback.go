package loader

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

// Piece is a run of a tensor's bytes, as they are in device memory.
type Piece struct {
	Device   *amdhip.Device
	Tensor   *plan.Tensor
	Offset   int64  // of the first byte, in the tensor's bytes on the device
	Bytes    []byte // valid during the call only
	Src      int64  // where the same elements begin in the tensor's bytes in the file
	SrcBytes int
}

// ReadOptions says what ReadBack reads.
type ReadOptions struct {
	Tensors   func(name string) bool // only these tensors; nil: all
	EveryCopy bool                   // of tensors that are on several devices, what is on each; else what is on the first
}

// ReadBack reads tensors back from the devices, in pieces: while one worker waits for its copy, the others look at
// theirs. visitor is called once for each worker, and what it returns for each piece, in no order. It waits for the
// load to end first. The first error of a visitor ends it; a copy that does not end within Config.Stall ends it, too,
// with ErrStalled, and then nothing is freed that the device may still write to or read. Package loader/readback
// compares and exports with it.
func (m *Model) ReadBack(ctx context.Context, o ReadOptions, visitor func() func(Piece) error) error {
	if err := m.WaitAll(ctx); err != nil {
		return err
	}
	if err := m.acquire(); err != nil {
		return err
	}
	defer m.release()
	all, err := sizesOf(m.plan, m.config, false, nil)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var devices sync.WaitGroup
	for i, p := range m.parts {
		for n := range p.on {
			if n > 0 && !o.EveryCopy || len(p.group.Tensors) == 0 {
				continue
			}
			devices.Go(func() {
				r := readBack{model: m, part: p, n: n, options: o, visitor: visitor, limit: m.limit()}
				if err := r.run(ctx, all[i]); err != nil {
					cancel(onDevice(p.on[n].device, len(m.devices) > 1, err))
				}
			})
		}
	}
	devices.Wait()
	err = context.Cause(ctx)
	if lost := m.lost(); lost != nil { // then what was read means nothing
		return errors.Join(lost, err)
	}
	return err
}

// lost is why an adopted model's memory is gone.
func (m *Model) lost() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// readBack reads what one device has.
type readBack struct {
	model   *Model
	part    *part
	n       int // of the device in the group
	options ReadOptions
	visitor func() func(Piece) error
	limit   *watch.Limit
	pool    *pinned.Pool
	chunks  []plan.Chunk
	next    atomic.Int64 // chunk to be taken
	stuck   atomic.Bool  // a copy may still be under way
}

// device is the one that is read.
func (r *readBack) device() *amdhip.Device { return r.part.on[r.n].device }

// run reads with as many workers as a load of the group would have, and a buffer for each.
func (r *readBack) run(ctx context.Context, z sizes) (err error) {
	var skip []bool
	if want := r.options.Tensors; want != nil {
		for i := range r.part.group.Tensors {
			skip = append(skip, !want(r.part.group.Tensors[i].Name))
		}
	}
	budget := min(z.staging, int64(z.threads)*int64(z.chunk))
	if r.options.EveryCopy { // all devices of the group are read at the same time
		budget /= int64(len(r.part.on))
	}
	r.pool, err = watch.Do(ctx, r.limit, "page-locking memory to read back to", func() (*pinned.Pool, error) {
		return pinned.New(r.device(), pinned.Options{Budget: budget, BufferBytes: z.chunk, Logger: r.model.config.Logger})
	}, func(p *pinned.Pool) { _ = p.Close() })
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	r.chunks = r.part.group.Cut(plan.CutOptions{Bytes: r.pool.BufferBytes(), Skip: skip})
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var workers sync.WaitGroup
	for range min(z.threads, len(r.chunks)) {
		workers.Go(func() {
			if err := r.work(ctx, r.visitor()); err != nil {
				cancel(err)
			}
		})
	}
	workers.Wait()
	return context.Cause(ctx)
}

// close frees the buffers. The error is a *LeftError if a device may still write to them, or does not let them go.
func (r *readBack) close() error {
	if r.stuck.Load() {
		r.model.hangs(r.part)
		r.pool.Abandon()
	}
	left := r.limit.Left()
	ctx, cancel := context.WithTimeout(context.Background(), left)
	defer cancel()
	err := r.pool.CloseContext(ctx)
	if ctx.Err() != nil {
		r.limit.Use(left)
	}
	e, ok := errors.AsType[*pinned.LeftError](err)
	if !ok {
		return err
	}
	if refused, ok := errors.AsType[*amdhip.Error](e.Err); ok { // no device hangs
		return refused
	}
	return &LeftError{HostBytes: uint64(e.Bytes)}
}

// work is one worker.
func (r *readBack) work(ctx context.Context, visit func(Piece) error) (err error) {
	stream, err := watch.Do(ctx, r.limit, "creating a stream", r.device().NewStream,
		func(s *amdhip.Stream) { _ = s.Close() })
	if err != nil {
		return err
	}
	rest := true // of the worker's own copies
	defer func() {
		if !rest { // closing would wait for the copy
			r.stuck.Store(true)
			err = errors.Join(err, &LeftError{Streams: 1})
			return
		}
		left, closed := freeAll(r.limit, "closing a stream", []thing{{r.device(), stream.Close, LeftError{Streams: 1}}})
		err = errors.Join(err, closed, left.orNil())
	}()
	for {
		i := int(r.next.Add(1)) - 1
		if i >= len(r.chunks) {
			return nil
		}
		c := &r.chunks[i]
		buf, err := r.pool.Acquire(ctx)
		if err != nil {
			return err
		}
		if rest, err = r.copy(ctx, c, stream, buf); err != nil {
			return err // buf stays out of use, and the pool is about to be closed
		}
		for j := 0; err == nil && j < len(c.Segs); j++ {
			err = visit(r.piece(&c.Segs[j], buf.Bytes()))
		}
		buf.Release()
		if err != nil {
			return err
		}
	}
}

// piece is segment s of a chunk whose bytes are in buf.
func (r *readBack) piece(s *plan.Segment, buf []byte) Piece {
	return Piece{
		Device: r.device(), Tensor: &r.part.group.Tensors[s.Tensor], Offset: int64(r.part.group.TensorOffset(s)),
		Bytes: buf[s.Dst : s.Dst+s.DstBytes], Src: s.Src, SrcBytes: s.SrcBytes,
	}
}

// copy copies c's bytes from the device into buf. rest is whether the copy is known to be over.
func (r *readBack) copy(ctx context.Context, c *plan.Chunk, stream *amdhip.Stream, buf *pinned.Buffer) (rest bool,
	err error,
) {
	left := r.limit.Left()
	deadline := time.Now().Add(left - left/8)
	from := r.part.ptr(r.n, c.Arena, c.Offset)
	var begun, over atomic.Bool
	err = watch.Call(ctx, r.limit, "copying from the device", func() error {
		begun.Store(true)
		err := buf.CopyToHost(stream, from, c.Bytes) // may have started the copy if it fails
		rest, failed := watch.Drain(stream.Query, amdhip.StopsWork, deadline)
		over.Store(rest)
		return errors.Join(err, failed)
	})
	if rest = over.Load() || !begun.Load(); err == nil {
		return rest, nil
	}
	if errors.Is(err, ErrStalled) {
		r.limit.Spend()
	}
	s := &c.Segs[0]
	return rest, &TensorError{
		Tensor: r.part.group.Tensors[s.Tensor].Name, Op: "read back", Offset: int64(r.part.group.TensorOffset(s)),
		Bytes: c.Bytes, Err: err,
	}
}
