package amdhip

import (
	"time"
	"unsafe"
)

// EventOptions says what an event must be able to do. The zero value is the cheapest: it only tells when work is done.
type EventOptions struct {
	Timing       bool // needed by Elapsed
	BlockingSync bool // Synchronize sleeps; without it HIP waits actively and keeps a core busy
}

// Event marks a point in a stream. Its methods are safe for concurrent use, but do not Query an event while another
// goroutine is in its Synchronize: some versions of HIP let the query wait, too. The caller must Close it.
type Event struct {
	handle
	raw uintptr
}

// NewEvent creates an event for streams of this device.
func (d *Device) NewEvent(o EventOptions) (*Event, error) {
	flags := eventDefault
	if !o.Timing {
		flags |= eventDisableTiming
	}
	if o.BlockingSync {
		flags |= eventBlockingSync
	}
	var raw uintptr
	err := d.current("hipEventCreateWithFlags", "", func() Status {
		return d.rt.api.hipEventCreateWithFlags(&raw, flags)
	})
	if err != nil {
		return nil, err
	}
	e := &Event{raw: raw}
	e.track(d, "event", 1)
	return e, nil
}

// Device returns the device whose streams can record the event.
func (e *Event) Device() *Device { return e.dev }

// Query reports whether the recorded work is done, without waiting; true if nothing was recorded. Work that failed is
// reported as an error.
func (e *Event) Query() (done bool, err error) {
	if err := e.enter(); err != nil {
		return false, err
	}
	defer e.leave()
	return e.answer("hipEventQuery", e.dev.rt.api.hipEventQuery(e.raw))
}

// Synchronize waits until the recorded work is done. It holds an OS thread meanwhile: to wait for many events, poll them
// with Query.
func (e *Event) Synchronize() error {
	if err := e.enter(); err != nil {
		return err
	}
	defer e.leave()
	if st := e.dev.rt.api.hipEventSynchronize(e.raw); st != Success {
		return e.dev.rt.fail("hipEventSynchronize", st, "%s", e.what)
	}
	return nil
}

// Elapsed returns the time on the device between since and e. Both need EventOptions.Timing and one device. When one of
// them is not done yet the error matches ErrNotReady.
func (e *Event) Elapsed(since *Event) (time.Duration, error) {
	// In one order for every caller, see handle; and once only, if it is the same event.
	first, second := e, since
	if uintptr(unsafe.Pointer(first)) > uintptr(unsafe.Pointer(second)) {
		first, second = second, first
	}
	if err := first.enter(); err != nil {
		return 0, err
	}
	defer first.leave()
	if first != second {
		if err := second.enter(); err != nil {
			return 0, err
		}
		defer second.leave()
		if err := e.sameRuntime(&since.handle); err != nil {
			return 0, err
		}
	}
	var ms float32
	if st := e.dev.rt.api.hipEventElapsedTime(&ms, since.raw, e.raw); st != Success {
		return 0, e.dev.rt.fail("hipEventElapsedTime", st, "%s since %s", e.what, since.what)
	}
	return time.Duration(float64(ms) * float64(time.Millisecond)), nil
}

// Close releases the event. Work that was recorded goes on. It is idempotent.
func (e *Event) Close() error {
	return e.shut(func() error {
		if st := e.dev.rt.api.hipEventDestroy(e.raw); st != Success {
			return e.dev.rt.fail("hipEventDestroy", st, "%s", e.what)
		}
		return nil
	})
}
