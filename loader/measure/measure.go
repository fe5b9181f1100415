package measure

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

const (
	runs       = 5                     // of which the median counts
	runTime    = 80 * time.Millisecond // of one run, about
	batchBytes = 32 << 20              // of one copy: more than a core's cache holds
	maxBatch   = 1 << 20               // copies of one run, at most
)

// Link measures what the link to dev carries: pinned memory to device memory in large copies, the ceiling of every
// load. It returns the median of a few runs in bytes per second, and takes about half a second. It needs 32 MiB of
// device memory and as much that is page-locked, and gives both back. Errors are those of the device (*amdhip.Error),
// or the cause of ctx's end.
func Link(ctx context.Context, dev *amdhip.Device) (speed float64, err error) {
	host, err := dev.HostMalloc(batchBytes)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, host.Close()) }()
	mem, err := dev.Malloc(batchBytes)
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
			if err := stream.CopyToDevice(mem.Ptr(), host, 0, batchBytes); err != nil {
				return err
			}
		}
		return stream.Synchronize()
	})
}

// Copy measures how fast threads cores together copy memory that is in no cache. It returns the median of a few runs in
// bytes per second. Bytes that are copied count once, not once as read and once as written. The error is the cause of
// ctx's end.
func Copy(ctx context.Context, threads int) (float64, error) {
	if err := checkThreads(threads); err != nil {
		return 0, err
	}
	type pair struct{ dst, src []byte }
	buffers := make([]pair, threads)
	for i := range buffers {
		buffers[i] = pair{make([]byte, batchBytes), make([]byte, batchBytes)}
		for j := 0; j < batchBytes; j += 4096 {
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

// checkThreads refuses numbers with which nothing would be measured.
func checkThreads(n int) error {
	if n < 1 {
		return fmt.Errorf("measure: %d threads: use 1 or more", n)
	}
	return nil
}

// medianSpeed times batch, which moves n times batchBytes bytes, for an n that takes about runTime.
func medianSpeed(ctx context.Context, batch func(n int) error) (float64, error) {
	n := 1
	var speeds []float64
	for len(speeds) < runs {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		start := time.Now()
		if err := batch(n); err != nil {
			return 0, err
		}
		took := max(time.Since(start), 1) // a clock may stand still
		if len(speeds) == 0 && took < runTime/2 && n < maxBatch {
			n *= 2 // still warming up
			continue
		}
		speeds = append(speeds, float64(n)*batchBytes/took.Seconds())
	}
	slices.Sort(speeds)
	return speeds[len(speeds)/2], nil
}
