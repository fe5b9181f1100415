package loader

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

// visitor is called with a segment's bytes as they are in device memory. Every worker has its own.
type visitor func(c *chunk, s *segment, device []byte) error

// readBack reads all tensors back from the device, in pipelined chunks: while one worker waits for its copy, the others
// look at theirs. It waits for the load to end first. The first error of a visitor ends it; a copy that does not end within
// Options.Stall ends it, too, with ErrStalled, and then nothing is freed that the device may still write to or read.
func (w *Model) readBack(ctx context.Context, newVisitor func() visitor) (err error) {
	if err := w.WaitAll(ctx); err != nil {
		return err
	}
	w.mu.RLock() // Close has to wait
	defer w.mu.RUnlock()
	switch {
	case w.closed:
		return ErrClosed
	case w.err != nil:
		return w.err
	case w.attached.lost() != nil:
		return w.attached.lost()
	}
	threads := w.plan.opts.Threads
	pool, err := newPool(w, int64(threads)*int64(w.plan.opts.Chunk))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pool.Close()) }()
	chunks := w.plan.cut(pool.BufferBytes(), 0, false)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var workers sync.WaitGroup
	for range min(threads, len(chunks)) {
		workers.Go(func() {
			if err := w.readChunks(ctx, pool, chunks, &next, newVisitor()); err != nil {
				cancel(err)
			}
		})
	}
	workers.Wait()
	err = context.Cause(ctx)
	if errors.Is(err, ErrStalled) {
		pool.Abandon()
		w.stuck.Store(true)
	}
	if lost := w.attached.lost(); lost != nil { // then what was read means nothing
		return errors.Join(lost, err)
	}
	return err
}

// readChunks is one worker of readBack.
func (w *Model) readChunks(ctx context.Context, pool *pinned.Pool, chunks []chunk, next *atomic.Int64, visit visitor) (err error) {
	stream, err := w.dev.NewStream()
	if err != nil {
		return err
	}
	defer func() {
		if !errors.Is(err, ErrStalled) { // closing would wait for the copy
			err = errors.Join(err, stream.Close())
		}
	}()
	for {
		i := int(next.Add(1)) - 1
		if i >= len(chunks) {
			return nil
		}
		c := &chunks[i]
		buf, err := pool.Acquire(ctx)
		if err != nil {
			return err
		}
		if err := w.readChunk(c, stream, buf); err != nil {
			return err // buf stays out of use: the copy may still write to it
		}
		for j := 0; err == nil && j < len(c.segs); j++ {
			s := &c.segs[j]
			err = visit(c, s, buf.Bytes()[s.dst:s.dst+s.dstBytes])
		}
		buf.Release()
		if err != nil {
			return err
		}
	}
}

// readChunk copies c's bytes from the device into buf.
func (w *Model) readChunk(c *chunk, stream *amdhip.Stream, buf *pinned.Buffer) error {
	err := buf.CopyToHost(stream, w.ptr(c.arena, c.off), c.bytes)
	if err == nil {
		err = drain(stream, time.Now().Add(w.plan.opts.Stall))
	}
	if err != nil {
		s := &c.segs[0]
		t := &w.plan.Tensors[s.tensor]
		return &TensorError{Tensor: t.Name, Op: "read back", Offset: int64(w.plan.tensorOffset(s)), Bytes: c.bytes, Err: err}
	}
	return nil
}

// drain waits until everything on s is done. It polls, since a wait inside the runtime could not be given up: the error
// matches ErrStalled when the deadline comes first. What the stream's work failed with is returned at once: such a stream
// executes nothing any more.
func drain(s *amdhip.Stream, deadline time.Time) error {
	for wait := 20 * time.Microsecond; ; wait = min(2*wait, time.Millisecond) {
		if done, err := s.Query(); done || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w: a copy does not end; the device or its driver hangs (see the kernel's log)", ErrStalled)
		}
		time.Sleep(wait)
	}
}
