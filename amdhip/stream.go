package amdhip

// Stream is a queue of work for one device, done in the order in which it was put there. It is created non-blocking:
// HIP's null stream does not wait for it, nor it for the null stream. Its methods are safe for concurrent use. The caller
// must Close it.
type Stream struct {
	handle
	raw uintptr
}

// NewStream creates a stream.
func (d *Device) NewStream() (*Stream, error) {
	var raw uintptr
	err := d.current("hipStreamCreateWithFlags", "", func() Status {
		return d.rt.api.hipStreamCreateWithFlags(&raw, streamNonBlocking)
	})
	if err != nil {
		return nil, err
	}
	s := &Stream{raw: raw}
	s.track(d, "stream", 1)
	return s, nil
}

// Device returns the device that does the stream's work.
func (s *Stream) Device() *Device { return s.dev }

// CopyToDevice starts a copy of n bytes of src, from offset off on, to dst and returns. Until the copy is done those
// bytes must stay as they are and src must stay open. An error of HIP may also belong to earlier work.
func (s *Stream) CopyToDevice(dst DevicePtr, src *HostMemory, off, n int) error {
	return s.copy(dst, src, off, n, memcpyHostToDevice)
}

// CopyToHost starts a copy of n bytes from src to dst, from offset off on, and returns. Until the copy is done the bytes
// of dst must not be touched and dst must stay open.
func (s *Stream) CopyToHost(dst *HostMemory, off int, src DevicePtr, n int) error {
	return s.copy(src, dst, off, n, memcpyDeviceToHost)
}

func (s *Stream) copy(dev DevicePtr, host *HostMemory, off, n int, kind memcpyKind) error {
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
	if kind == memcpyDeviceToHost {
		dst, src = src, dst
	}
	if st := rt.api.hipMemcpyAsync(dst, src, uintptr(n), kind, s.raw); st != Success {
		return rt.fail("hipMemcpyAsync", st, "%d bytes from %#x to %#x, %s", n, src, dst, s.what)
	}
	if !host.pinned || host.dev.rt != rt {
		s.dev.unpinned.Add(1)
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
	if st := s.dev.rt.api.hipMemsetAsync(uintptr(dst), int32(v), uintptr(n), s.raw); st != Success {
		return s.dev.rt.fail("hipMemsetAsync", st, "%d bytes at %#x, %s", n, dst, s.what)
	}
	return nil
}

// Wait makes the work that is put on the stream from now on wait for what e has recorded, without blocking the caller.
// The event may belong to another device. An event that was never recorded is not waited for.
func (s *Stream) Wait(e *Event) error {
	return s.withEvent(e, "hipStreamWaitEvent", func(api *api) Status { return api.hipStreamWaitEvent(s.raw, e.raw, 0) })
}

// Record makes e stand for all work put on the stream so far. Stream and event must belong to one device, else the error
// matches ErrInvalidHandle.
func (s *Stream) Record(e *Event) error {
	return s.withEvent(e, "hipEventRecord", func(api *api) Status { return api.hipEventRecord(e.raw, s.raw) })
}

func (s *Stream) withEvent(e *Event, call string, f func(*api) Status) error {
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
	return s.answer("hipStreamQuery", s.dev.rt.api.hipStreamQuery(s.raw))
}

// Synchronize waits until all work of the stream is done. It holds an OS thread meanwhile.
func (s *Stream) Synchronize() error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	if st := s.dev.rt.api.hipStreamSynchronize(s.raw); st != Success {
		return s.dev.rt.fail("hipStreamSynchronize", st, "%s", s.what)
	}
	return nil
}

// Close waits for the stream's work and releases it. It is idempotent.
func (s *Stream) Close() error {
	return s.shut(func() error {
		if st := s.dev.rt.api.hipStreamDestroy(s.raw); st != Success {
			return s.dev.rt.fail("hipStreamDestroy", st, "%s", s.what)
		}
		return nil
	})
}

// answer turns the status of a query into its result: "not ready" is no failure.
func (h *handle) answer(call string, st Status) (done bool, err error) {
	switch st {
	case Success:
		return true, nil
	case ErrNotReady:
		return false, nil
	}
	return false, h.dev.rt.fail(call, st, "%s", h.what)
}
