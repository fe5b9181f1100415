package gpu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

const (
	// checkTime is how long kernels may take for the few blocks that they are checked with.
	checkTime = 10 * time.Second
	// checkElems is how many elements each kernel is checked with: more than a block of threads writes, not a multiple of that,
	// and whole blocks of every type.
	checkElems = 16<<10 + 256
)

// CheckError is a kernel that gives other numbers than the CPU.
type CheckError struct {
	Key       Key
	Element   int    // the first that differs
	Got, Want []byte // its bytes, little-endian
}

// Error names the kernel, the element and both values, as their bytes in memory.
func (e *CheckError) Error() string {
	return fmt.Sprintf("gpu: kernel %v is wrong: element %d has the bytes %x, want %x: the compiler or the device computes wrongly",
		e.Key, e.Element, e.Got, e.Want)
}

// check is a number of kernels being tried on the device.
type check struct {
	trials    []trial
	ins, outs int // bytes of all inputs and outputs
	stream    *amdhip.Stream
	host      *amdhip.HostMemory // inputs, then outputs
	mem       *amdhip.Memory     // the same
}

// trial is one kernel's.
type trial struct {
	key     Key
	in, out int // where, among inputs and among outputs
	src     int // bytes of input
	dst     int // bytes of output
}

// check lets every kernel convert some blocks and compares the outcome with the CPU's. If the device does not come to rest, s is
// stuck and what it works with is not freed.
func (s *Set) check(ctx context.Context, keys []Key) (err error) {
	if len(keys) == 0 {
		return nil
	}
	c := newCheck(keys)
	defer func() {
		if !s.stuck {
			err = errors.Join(err, c.close())
		}
	}()
	if err := c.open(s.dev); err != nil {
		return err
	}
	err = c.enqueue(s)
	if err == nil {
		err = c.wait(ctx)
	}
	if err != nil {
		s.stuck = !c.settled() // what was enqueued before the failure may be running
		return err
	}
	return c.compare()
}

// newCheck lays out the buffers. There is padding on both sides of every input.
func newCheck(keys []Key) *check {
	c := &check{}
	for _, k := range keys {
		blocks := checkElems / k.From.BlockElems()
		t := trial{key: k, in: alignUp(c.ins + Padding), out: c.outs}
		t.src, t.dst = blocks*k.From.BlockBytes(), checkElems*k.To.BlockBytes()
		c.ins, c.outs = t.in+t.src+Padding, alignUp(t.out+t.dst)
		c.trials = append(c.trials, t)
	}
	c.ins = alignUp(c.ins)
	return c
}

func alignUp(n int) int { return (n + 255) &^ 255 }

// open allocates.
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

// enqueue puts everything on the stream.
func (c *check) enqueue(s *Set) error {
	host, in := c.host.Bytes(), c.mem.Ptr()
	out := in + amdhip.DevicePtr(c.ins)
	for i := range c.trials {
		t := &c.trials[i]
		if err := fill(host[t.in:][:t.src], t.key.From); err != nil {
			return err
		}
	}
	if err := c.stream.CopyToDevice(in, c.host, 0, c.ins); err != nil {
		return err
	}
	for i := range c.trials {
		t := &c.trials[i]
		blocks := uint64(t.src) / t.key.inBytes()
		if err := s.Launch(c.stream, t.key, out+amdhip.DevicePtr(t.out), in+amdhip.DevicePtr(t.in), blocks); err != nil {
			return err
		}
	}
	return c.stream.CopyToHost(c.host, c.ins, out, c.outs)
}

// fill makes blocks of random bytes, always the same ones: they have scales of all kinds. A block whose scale is NaN shows
// little, so the last one, after whole tiles of the kernels, gives numbers.
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

// hasNaN reports whether there is a NaN among these elements of type F32.
func hasNaN(b []byte) bool {
	for element := range slices.Chunk(b, 4) {
		if elementIsNaN(gguf.F32, element) {
			return true
		}
	}
	return false
}

// wait waits for the stream, but not for ever.
func (c *check) wait(ctx context.Context) error {
	deadline := time.Now().Add(checkTime)
	for pause := 20 * time.Microsecond; ; pause = min(2*pause, time.Millisecond) {
		switch done, err := c.stream.Query(); {
		case done || err != nil:
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case time.Now().After(deadline):
			return fmt.Errorf("gpu: kernels that should take a millisecond have not ended after %v: the device or its driver hangs",
				checkTime)
		}
		time.Sleep(pause)
	}
}

// settled reports whether nothing is running on the stream, or will be soon. A stream that has failed executes nothing any more.
func (c *check) settled() bool {
	for range 1000 {
		if done, err := c.stream.Query(); done || err != nil {
			return true
		}
		time.Sleep(time.Millisecond)
	}
	return false
}

// compare looks at all outputs.
func (c *check) compare() error {
	cpu, err := kernels.For(kernels.Auto)
	if err != nil {
		return err
	}
	host := c.host.Bytes()
	want := make([]byte, checkElems*4)
	for i := range c.trials {
		t := &c.trials[i]
		if err := cpu.Dequantize(want[:t.dst], t.key.To, host[t.in:][:t.src], t.key.From); err != nil {
			return err
		}
		if err := same(t.key, host[c.ins+t.out:][:t.dst], want[:t.dst]); err != nil {
			return err
		}
	}
	return nil
}

// same compares k's output with what is wanted. Any NaN is as good as another.
func same(k Key, got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	size := k.To.BlockBytes()
	for i := 0; i < len(want); i += size {
		g, w := got[i:i+size], want[i:i+size]
		if !bytes.Equal(g, w) && (!elementIsNaN(k.To, g) || !elementIsNaN(k.To, w)) {
			return &CheckError{Key: k, Element: i / size, Got: bytes.Clone(g), Want: bytes.Clone(w)}
		}
	}
	return nil
}

// elementIsNaN reports whether the little-endian bytes of an element of type t are a NaN.
func elementIsNaN(t gguf.Type, b []byte) bool {
	top := uint32(b[len(b)-1])&0x7f<<8 | uint32(b[len(b)-2])
	rest := len(b) == 4 && b[0]|b[1] != 0
	if t == gguf.F16 {
		return top > 0x7c00
	}
	return top > 0x7f80 || top == 0x7f80 && rest
}
