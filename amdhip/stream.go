package amdhip

import (
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// Stream is a queue of work for one device, done in the order in which it was put there. It is created non-blocking:
// HIP's null stream does not wait for it, nor it for the null stream. Its methods are safe for concurrent use. The
// caller must Close it.
type Stream struct {
	handle
	raw uintptr
}

// NewStream creates a stream.
func (d *Device) NewStream() (*Stream, error) {
	var raw uintptr
	err := d.current("hipStreamCreateWithFlags", "", func() Status {
		return d.rt.api.HipStreamCreateWithFlags(&raw, hip.StreamNonBlocking)
	})
	if err != nil {
		return nil, err
	}
	s := &Stream{raw: raw}
	s.track(d, "stream", 1)
	return s, nil
}

// StreamFromHandle makes a Stream of a stream (hipStream_t) that somebody else in this process created: another binding
// such as PyTorch's. It must belong to this device and to the same HIP library, and must exist for as long as the
// Stream is used. Close of the Stream does not destroy it. Handle 0 is the null stream of whichever device is current;
// the software device refuses it.
func (d *Device) StreamFromHandle(raw uintptr) (*Stream, error) {
	if err := d.rt.usable(); err != nil {
		return nil, err
	}
	s := &Stream{raw: raw}
	s.borrow(d, "borrowed stream")
	return s, nil
}

// Device returns the device that does the stream's work.
func (s *Stream) Device() *Device { return s.dev }

// CopyToDevice starts a copy of n bytes of src, from offset off on, to dst and returns. Until the copy is done those
// bytes must stay as they are and src must stay open. An error of HIP may also belong to earlier work.
func (s *Stream) CopyToDevice(dst DevicePtr, src *HostMemory, off, n int) error {
	return s.copy(dst, src, off, n, hip.MemcpyHostToDevice)
}

// CopyToHost starts a copy of n bytes from src to dst, from offset off on, and returns. Until the copy is done the
// bytes of dst must not be touched and dst must stay open.
func (s *Stream) CopyToHost(dst *HostMemory, off int, src DevicePtr, n int) error {
	return s.copy(src, dst, off, n, hip.MemcpyDeviceToHost)
}

func (s *Stream) copy(dev DevicePtr, host *HostMemory, off, n int, kind hip.MemcpyKind) error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	if err := host.enter(); err != nil {
		return err
	}
	defer host.leave()
	rt := s.dev.rt
	if off < 0 || n < 0 || n > len(host.bytes)-off {
		return rt.fail("hipMemcpyAsync", ErrInvalidValue, "not called: %d bytes at offset %d of %d bytes of host memory",
			n, off, len(host.bytes))
	}
	if n == 0 {
		return nil
	}
	dst, src := uintptr(dev), host.addr+uintptr(off)
	if kind == hip.MemcpyDeviceToHost {
		dst, src = src, dst
	}
	st := s.dev.forCopies(func() Status { return rt.api.HipMemcpyAsync(dst, src, uintptr(n), kind, s.raw) })
	if st != Success {
		return rt.fail("hipMemcpyAsync", st, "%d bytes from %#x to %#x, %s", n, src, dst, s.what)
	}
	if !host.pinned || host.dev.rt != rt {
		s.dev.unpinned.Add(1)
	}
	return nil
}

// CopyDevice starts a copy of n bytes from src to dst, both in memory of the stream's device, and returns. They must
// not overlap. For copies between devices there is CopyPeer.
func (s *Stream) CopyDevice(dst, src DevicePtr, n uint64) error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	if n == 0 {
		return nil
	}
	api := s.dev.rt.api
	st := s.dev.forCopies(func() Status {
		return api.HipMemcpyAsync(uintptr(dst), uintptr(src), uintptr(n), hip.MemcpyDeviceToDevice, s.raw)
	})
	if st != Success {
		return s.dev.rt.fail("hipMemcpyAsync", st, "%d bytes from %#x to %#x, %s", n, src, dst, s.what)
	}
	return nil
}

// Memset starts setting n bytes at dst to v and returns.
func (s *Stream) Memset(dst DevicePtr, v byte, n uint64) error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	if n == 0 {
		return nil
	}
	api := s.dev.rt.api
	st := s.dev.forCopies(func() Status { return api.HipMemsetAsync(uintptr(dst), int32(v), uintptr(n), s.raw) })
	if st != Success {
		return s.dev.rt.fail("hipMemsetAsync", st, "%d bytes at %#x, %s", n, dst, s.what)
	}
	return nil
}

// Wait makes all work that is put on the stream from now on wait until the work that e stands for is done. It does not
// block the caller. The event may belong to another device. An event that was never recorded is not waited for.
func (s *Stream) Wait(e *Event) error {
	return s.withEvent(e, "hipStreamWaitEvent", func(api *hip.API) Status {
		return api.HipStreamWaitEvent(s.raw, e.raw, 0)
	})
}

// Record makes e stand for all work that was put on the stream so far. Stream and event must belong to one device, else
// the error matches ErrInvalidHandle.
func (s *Stream) Record(e *Event) error {
	return s.withEvent(e, "hipEventRecord", func(api *hip.API) Status { return api.HipEventRecord(e.raw, s.raw) })
}

func (s *Stream) withEvent(e *Event, call string, f func(*hip.API) Status) error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	if err := e.enter(); err != nil {
		return err
	}
	defer e.leave()
	if err := s.sameRuntime(&e.handle); err != nil {
		return err
	}
	if st := f(s.dev.rt.api); st != Success {
		return s.dev.rt.fail(call, st, "%s, %s", s.what, e.what)
	}
	return nil
}

// Query reports whether all work of the stream is done, without waiting. Work that failed is reported as an error.
func (s *Stream) Query() (done bool, err error) {
	if err := s.enter(); err != nil {
		return false, err
	}
	defer s.leave()
	return s.answer("hipStreamQuery", s.dev.rt.api.HipStreamQuery(s.raw))
}

// Synchronize waits until all work of the stream is done. It holds an OS thread meanwhile.
func (s *Stream) Synchronize() error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	if st := s.dev.rt.api.HipStreamSynchronize(s.raw); st != Success {
		return s.dev.rt.fail("hipStreamSynchronize", st, "%s", s.what)
	}
	return nil
}

// Close waits for the stream's work and releases it; a stream of StreamFromHandle is left as it is. It is idempotent.
func (s *Stream) Close() error {
	return s.shut(func() error {
		if st := s.dev.rt.api.HipStreamDestroy(s.raw); st != Success {
			return s.dev.rt.fail("hipStreamDestroy", st, "%s", s.what)
		}
		return nil
	})
}

// answer turns the status of a query into its result. "Not ready" is an answer, not a failure.
func (h *handle) answer(call string, st Status) (done bool, err error) {
	switch st {
	case Success:
		return true, nil
	case ErrNotReady:
		return false, nil
	}
	return false, h.dev.rt.fail(call, st, "%s", h.what)
}

// Handle returns HIP's own handle of the stream (hipStream_t), for code that uses HIP by other means. It is valid until
// Close.
func (s *Stream) Handle() uintptr { return s.raw }
