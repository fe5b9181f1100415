package gpu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

const (
	// checkTime is how long all kernels together may take for the blocks of the check.
	checkTime = 10 * time.Second
	// settleTime is how long to wait, after a failure, until the device is done with what was enqueued.
	settleTime = 750 * time.Millisecond
	// checkElems is how many elements each kernel converts in the check: more than a block of threads writes in one
	// iteration, not a multiple of that, and whole blocks of every type.
	checkElems = 16<<10 + 256
)

// CheckError says that a kernel gives other numbers than the CPU.
type CheckError struct {
	Key       Key
	Element   int    // the first one that differs; for fingerprints, the number of the fingerprint
	Got, Want []byte // its little-endian bytes, from the device and from the CPU
}

// Error names the kernel, the element and both values, as their bytes in memory.
func (e *CheckError) Error() string {
	return fmt.Sprintf("gpu: kernel %v is wrong: element %d has the bytes %x, want %x: "+
		"the compiler or the device computes wrongly", e.Key, e.Element, e.Got, e.Want)
}

// check tries kernels on the device.
type check struct {
	trials    []trial
	ins, outs int // bytes of all inputs and of all outputs, with padding
	copied    int // of the inputs, how many are copied from the host; the others are made on the device
	stream    *amdhip.Stream
	host      *amdhip.HostMemory // all inputs, then all outputs
	mem       *amdhip.Memory     // the same on the device
}

// trial is the check of one kernel.
type trial struct {
	key     Key
	in, out int // offset among all inputs, and among all outputs
	src     int // bytes of input
	dst     int // bytes of output
	// fill makes the input, launch enqueues the kernel, and want writes the output that it must have. make enqueues what
	// makes the same input on the device; nil: it is copied there.
	fill   func(src []byte) error
	make   func(stream *amdhip.Stream, in amdhip.DevicePtr) error
	launch func(s *Set, stream *amdhip.Stream, out, in amdhip.DevicePtr) error
	want   func(dst, src []byte) error
}

// conversion is the check of a kernel that converts.
func conversion(k Key) trial {
	blocks := checkElems / k.From.BlockElems()
	return trial{
		key: k, src: blocks * k.From.BlockBytes(), dst: checkElems * k.To.BlockBytes(),
		fill: func(src []byte) error { return fill(src, k.From) },
		launch: func(s *Set, stream *amdhip.Stream, out, in amdhip.DevicePtr) error {
			return s.Launch(stream, k, out, in, uint64(blocks))
		},
		want: func(dst, src []byte) error {
			cpu, err := kernels.For(kernels.Auto)
			if err != nil {
				return err
			}
			return cpu.Dequantize(dst, k.To, src, k.From)
		},
	}
}

// check lets every kernel convert some blocks and compares the result with that of the CPU. Where it is not known that
// the kernels have ended, it sets s.stuck and does not free the memory and the stream that they use.
func (s *Set) check(ctx context.Context, limit *watch.Limit, keys []Key) error {
	if len(keys) == 0 {
		return nil
	}
	c, err := watch.Do(ctx, limit, "allocating memory to check kernels", func() (*check, error) {
		c := newCheck(keys)
		if err := c.open(s.dev); err != nil {
			return nil, errors.Join(err, c.close())
		}
		return c, nil
	}, func(c *check) { _ = c.close() })
	if err != nil {
		return err
	}
	if err := c.run(ctx, limit, s); err != nil || s.stuck {
		if s.stuck {
			return errors.Join(err, fmt.Errorf("%w: what kernels were checked with is left until the process ends", watch.ErrStalled))
		}
		closed, _ := limit.Free("freeing what kernels were checked with", c.close)
		return errors.Join(err, closed)
	}
	err = c.compare()
	closed, ended := limit.Free("freeing what kernels were checked with", c.close)
	if !ended {
		closed = fmt.Errorf("%w: the memory that kernels were checked with cannot be freed", watch.ErrStalled)
	}
	return errors.Join(err, closed)
}

// run lets the kernels convert. It sets s.stuck unless the device is known to be done in the end.
func (c *check) run(ctx context.Context, limit *watch.Limit, s *Set) error {
	var begun, over atomic.Bool
	wait := min(checkTime, limit.Left()/4) // so that there is time left for a load that does without the kernels
	err := watch.Call(ctx, limit, "checking kernels", func() error {
		begun.Store(true)
		err := c.enqueue(s)
		var rest bool
		if err == nil {
			rest, err = c.wait(ctx, time.Now().Add(wait))
		}
		if !rest { // the device may still do what was enqueued before the failure
			rest, _ = watch.Drain(c.stream.Query, amdhip.StopsWork, time.Now().Add(min(settleTime, wait)))
		}
		over.Store(rest)
		return err
	})
	if s.stuck = begun.Load() && !over.Load(); s.stuck && !watch.Lost(err) {
		limit.Use(wait)
	}
	return err
}

// newCheck decides where in the buffers each input and output is. There is padding on both sides of every input. Those
// that are made on the device come last.
func newCheck(keys []Key) *check {
	c := &check{}
	keys = slices.Clone(keys)
	slices.SortStableFunc(keys, func(a, b Key) int {
		switch {
		case a.Fingerprint == b.Fingerprint:
			return 0
		case b.Fingerprint:
			return -1
		}
		return 1
	})
	for _, k := range keys {
		var t trial
		if k.Fingerprint {
			t = fingerprintTrial()
		} else {
			t = conversion(k)
		}
		t.in, t.out = alignUp(c.ins+Padding), c.outs
		c.ins, c.outs = t.in+t.src+Padding, alignUp(t.out+t.dst)
		if t.make == nil {
			c.copied = alignUp(c.ins)
		}
		c.trials = append(c.trials, t)
	}
	c.ins = alignUp(c.ins)
	return c
}

// alignUp rounds up to a multiple of 256 bytes.
func alignUp(n int) int { return (n + 255) &^ 255 }

// open allocates memory on host and device, and a stream.
func (c *check) open(dev *amdhip.Device) (err error) {
	if c.host, err = dev.HostMalloc(c.ins + c.outs); err != nil {
		return err
	}
	if c.mem, err = dev.Malloc(uint64(c.ins + c.outs)); err != nil {
		return err
	}
	c.stream, err = dev.NewStream()
	return err
}

// close frees what open has allocated.
func (c *check) close() error {
	var errs []error
	if c.stream != nil {
		errs = append(errs, c.stream.Close())
	}
	if c.mem != nil {
		errs = append(errs, c.mem.Close())
	}
	if c.host != nil {
		errs = append(errs, c.host.Close())
	}
	return errors.Join(errs...)
}

// enqueue makes the inputs, and enqueues their copy to the device, the kernels, and the copy of the outputs back.
func (c *check) enqueue(s *Set) error {
	host, in := c.host.Bytes(), c.mem.Ptr()
	out := in + amdhip.DevicePtr(c.ins)
	for i := range c.trials {
		t := &c.trials[i]
		if err := t.fill(host[t.in:][:t.src]); err != nil {
			return err
		}
		if t.make == nil {
			continue
		}
		if err := t.make(c.stream, in+amdhip.DevicePtr(t.in)); err != nil {
			return err
		}
	}
	if c.copied > 0 {
		if err := c.stream.CopyToDevice(in, c.host, 0, c.copied); err != nil {
			return err
		}
	}
	for i := range c.trials {
		t := &c.trials[i]
		if err := t.launch(s, c.stream, out+amdhip.DevicePtr(t.out), in+amdhip.DevicePtr(t.in)); err != nil {
			return err
		}
	}
	return c.stream.CopyToHost(c.host, c.ins, out, c.outs)
}

// fill fills b with blocks of random bytes, the same in every call, so that there are scales of all kinds. A block
// whose scale is NaN can hide errors. So fill makes the last block, which the kernels convert in their code for the
// rest after whole tiles, one without NaNs.
func fill(b []byte, from gguf.Type) error {
	cpu, err := kernels.For(kernels.Auto)
	if err != nil {
		return err
	}
	random := rand.NewChaCha8([32]byte{byte(from)})
	_, _ = random.Read(b) // never fails
	last, out := b[len(b)-from.BlockBytes():], make([]byte, 4*from.BlockElems())
	for {
		if err := cpu.Dequantize(out, gguf.F32, last, from); err != nil {
			return err
		}
		if !hasNaN(out) {
			return nil
		}
		_, _ = random.Read(last)
	}
}

// hasNaN reports whether one of the F32 elements in b is a NaN.
func hasNaN(b []byte) bool {
	for element := range slices.Chunk(b, 4) {
		if elementIsNaN(gguf.F32, element) {
			return true
		}
	}
	return false
}

// wait waits until the stream is done, ctx ends, or the deadline comes. rest reports whether nothing is on the stream
// any more.
func (c *check) wait(ctx context.Context, deadline time.Time) (rest bool, err error) {
	began := time.Now()
	for pause := 20 * time.Microsecond; ; pause = min(2*pause, time.Millisecond) {
		switch done, err := c.stream.Query(); {
		case err != nil:
			return amdhip.StopsWork(err), err
		case done:
			return true, nil
		case ctx.Err() != nil:
			return false, context.Cause(ctx)
		case time.Now().After(deadline):
			return false, fmt.Errorf("gpu: kernels that should take a millisecond have not ended after %v: "+
				"the device or its driver hangs", time.Since(began).Round(time.Millisecond))
		}
		time.Sleep(pause)
	}
}

// compare compares all outputs with those of the CPU.
func (c *check) compare() error {
	host := c.host.Bytes()
	for i := range c.trials {
		t := &c.trials[i]
		want := make([]byte, t.dst)
		if err := t.want(want, host[t.in:][:t.src]); err != nil {
			return err
		}
		if err := same(t.key, host[c.ins+t.out:][:t.dst], want); err != nil {
			return err
		}
	}
	return nil
}

// same compares the output of k with what is wanted. All NaNs are equal to it. The error is a *CheckError.
func same(k Key, got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	size := k.To.BlockBytes()
	if k.Fingerprint {
		size = sumBytes
	}
	for i := 0; i < len(want); i += size {
		g, w := got[i:i+size], want[i:i+size]
		nans := !k.Fingerprint && elementIsNaN(k.To, g) && elementIsNaN(k.To, w)
		if !bytes.Equal(g, w) && !nans {
			return &CheckError{Key: k, Element: i / size, Got: bytes.Clone(g), Want: bytes.Clone(w)}
		}
	}
	return nil
}

// elementIsNaN reports whether b, the little-endian bytes of an F32, F16 or BF16 element, are a NaN.
func elementIsNaN(t gguf.Type, b []byte) bool {
	top := uint32(b[len(b)-1])&0x7f<<8 | uint32(b[len(b)-2])
	rest := len(b) == 4 && b[0]|b[1] != 0
	if t == gguf.F16 {
		return top > 0x7c00
	}
	return top > 0x7f80 || top == 0x7f80 && rest
}
