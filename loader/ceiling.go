package loader

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

const (
	ceilingRuns   = 5
	ceilingTime   = 80 * time.Millisecond // of one run, about
	ceilingBuffer = 32 << 20              // larger than any cache that a copy may come from
	readExtent    = 4 << 20
	readLimit     = 4 << 30 // bytes of a file that are read: enough for any disk, and no wait for large models
)

// LinkSpeed measures what the link to dev carries: pinned memory to device memory in large copies, the ceiling of every load.
// It returns the median of a few runs in bytes per second, and takes about half a second.
func LinkSpeed(ctx context.Context, dev *amdhip.Device) (speed float64, err error) {
	host, err := dev.HostMalloc(ceilingBuffer)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, host.Close()) }()
	mem, err := dev.Malloc(ceilingBuffer)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, mem.Close()) }()
	stream, err := dev.NewStream()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, stream.Close()) }()
	return medianSpeed(ctx, func(n int) error {
		for range n {
			if err := stream.CopyToDevice(mem.Ptr(), host, 0, ceilingBuffer); err != nil {
				return err
			}
		}
		return stream.Synchronize()
	})
}

// CopySpeed measures how fast threads cores together copy memory that is in no cache. It returns the median of a few runs in
// bytes (copied, not read plus written) per second.
func CopySpeed(ctx context.Context, threads int) (float64, error) {
	type pair struct{ dst, src []byte }
	buffers := make([]pair, threads)
	for i := range buffers {
		buffers[i] = pair{make([]byte, ceilingBuffer), make([]byte, ceilingBuffer)}
		for j := 0; j < ceilingBuffer; j += 4096 {
			buffers[i].src[j] = 1 // a page of its own: untouched pages are all the same one
		}
	}
	perThread, err := medianSpeed(ctx, func(n int) error {
		var all sync.WaitGroup
		for _, b := range buffers {
			all.Go(func() {
				for range n {
					copy(b.dst, b.src)
				}
			})
		}
		all.Wait()
		return nil
	})
	return perThread * float64(threads), err
}

// medianSpeed times batch, which moves n times ceilingBuffer bytes, for an n that takes about ceilingTime.
func medianSpeed(ctx context.Context, batch func(n int) error) (float64, error) {
	n := 1
	var speeds []float64
	for len(speeds) < ceilingRuns {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		start := time.Now()
		if err := batch(n); err != nil {
			return 0, err
		}
		took := time.Since(start)
		if len(speeds) == 0 && took < ceilingTime/2 {
			n *= 2 // warming up still
			continue
		}
		speeds = append(speeds, float64(n)*ceilingBuffer/took.Seconds())
	}
	slices.Sort(speeds)
	return speeds[len(speeds)/2], nil
}

// ReadSpeed measures how fast the model's files can be read by threads readers in file order: directly from the disk when direct
// is set, otherwise the way any program reads them, from the page cache as far as they are in it, or by ranges from a server. It
// returns bytes per second over the first 4 GiB.
func ReadSpeed(ctx context.Context, m *gguf.Model, threads int, direct bool) (float64, error) {
	type extent struct {
		f   io.ReaderAt
		off int64
	}
	var extents []extent
	for _, p := range m.Parts() {
		var f io.ReaderAt = p.File()
		switch {
		case p.Source() != nil:
			f = rangesOf{ctx, p.Source()}
		case direct:
			d, err := openDirect(p.File())
			if err != nil {
				return 0, fmt.Errorf("loader: %s: %w", p.Path, err)
			}
			defer d.Close()
			f = d
		}
		for off := int64(0); off < p.Size && len(extents) < readLimit/readExtent; off += readExtent {
			extents = append(extents, extent{f, off})
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next, bytes atomic.Int64
	var readers sync.WaitGroup
	start := time.Now()
	for range threads {
		readers.Go(func() {
			buf := alignedBytes(readExtent)
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= len(extents) {
					return
				}
				n, err := extents[i].f.ReadAt(buf, extents[i].off)
				if err != nil && !errors.Is(err, io.EOF) {
					cancel(err)
				}
				bytes.Add(int64(n))
			}
		})
	}
	readers.Wait()
	took := time.Since(start)
	return float64(bytes.Load()) / took.Seconds(), context.Cause(ctx)
}

// rangesOf reads a source as a file is read.
type rangesOf struct {
	ctx context.Context
	s   gguf.Source
}

// ReadAt fills b with one range, or with what there is of it.
func (r rangesOf) ReadAt(b []byte, off int64) (int, error) {
	b = b[:min(int64(len(b)), r.s.Size()-off)]
	body := r.s.Range(r.ctx, off, int64(len(b)))
	defer body.Close()
	return io.ReadFull(body, b)
}
