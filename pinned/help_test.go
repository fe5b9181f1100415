package pinned_test

import (
	"bytes"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

const buf = pinned.MinBufferBytes

// inBubble runs a test on testing/synctest's clock: sleeping costs no time, and a deadlock fails the test.
func inBubble(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, test)
}

// device opens a software device and fails the test if anything of it is left at the end.
func device(t *testing.T, o soft.Options) (*amdhip.Device, *soft.Software) {
	t.Helper()
	dev, sw := leakyDevice(t, o)
	t.Cleanup(func() {
		if s := sw.Stats(); s.PinnedBytes != 0 || s.Events != 0 || s.Streams != 0 || s.DeviceBytes != 0 {
			t.Errorf("left on the device: %+v", s)
		}
	})
	return dev, sw
}

// leakyDevice opens a software device on which a test may leave something.
func leakyDevice(t *testing.T, o soft.Options) (*amdhip.Device, *soft.Software) {
	t.Helper()
	rt, err := soft.OpenRuntime(o)
	must(t, err)
	t.Cleanup(func() {
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
	dev, err := rt.Device(0)
	must(t, err)
	return dev, soft.Of(rt)
}

// recorder is a Completion that keeps what it was told.
type recorder struct {
	mu   sync.Mutex
	tags []int
	took []time.Duration
	errs []error
	told chan struct{}
}

func newRecorder() *recorder { return &recorder{told: make(chan struct{}, 1024)} }

func (r *recorder) Done(tag int, took time.Duration, err error) {
	r.mu.Lock()
	r.tags, r.took, r.errs = append(r.tags, tag), append(r.took, took), append(r.errs, err)
	r.mu.Unlock()
	r.told <- struct{}{}
}

// newStream and newMemory make what a copy needs and close it with the test.
func newStream(t *testing.T, dev *amdhip.Device) *amdhip.Stream {
	t.Helper()
	s, err := dev.NewStream()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func newMemory(t *testing.T, dev *amdhip.Device, n uint64) *amdhip.Memory {
	t.Helper()
	m, err := dev.Malloc(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// newPool makes a pool; the test closes it.
func newPool(t *testing.T, dev *amdhip.Device, o pinned.Options) *pinned.Pool {
	t.Helper()
	p, err := pinned.New(dev, o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// acquire returns a free buffer.
func acquire(t *testing.T, p *pinned.Pool) *pinned.Buffer {
	t.Helper()
	b, err := p.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// must fails the test on the first error.
func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// fill sets every byte of the buffer to v.
func fill(b *pinned.Buffer, v byte) {
	for i := range b.Bytes() {
		b.Bytes()[i] = v
	}
}

// holds reports whether device memory at from holds a buffer of the value v. It reads them through a buffer of p.
func holds(t *testing.T, p *pinned.Pool, s *amdhip.Stream, from amdhip.DevicePtr, v byte) bool {
	t.Helper()
	b := acquire(t, p)
	defer b.Release()
	must(t, b.CopyToHost(s, from, buf), s.Synchronize())
	return bytes.Equal(b.Bytes()[:buf], bytes.Repeat([]byte{v}, buf))
}
