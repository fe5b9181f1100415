package amdhip

import (
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
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
	flags := hip.EventDefault
	if !o.Timing {
		flags |= hip.EventDisableTiming
	}
	if o.BlockingSync {
		flags |= hip.EventBlockingSync
	}
	var raw uintptr
	err := d.current("hipEventCreateWithFlags", "", func() Status {
		return d.rt.api.HipEventCreateWithFlags(&raw, flags)
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
	return e.answer("hipEventQuery", e.dev.rt.api.HipEventQuery(e.raw))
}

// Synchronize waits until the recorded work is done. It holds an OS thread meanwhile: to wait for many events, poll
// them with Query.
func (e *Event) Synchronize() error {
	if err := e.enter(); err != nil {
		return err
	}
	defer e.leave()
	if st := e.dev.rt.api.HipEventSynchronize(e.raw); st != Success {
		return e.dev.rt.fail("hipEventSynchronize", st, "%s", e.what)
	}
	return nil
}

// Elapsed returns the time on the device between since and e. Both need EventOptions.Timing and one device. When one of
// them is not done yet the error matches ErrNotReady.
func (e *Event) Elapsed(since *Event) (time.Duration, error) {
	for _, h := range []*handle{&e.handle, &since.handle} {
		if err := h.enter(); err != nil {
			return 0, err
		}
		defer h.leave()
	}
	if err := e.sameRuntime(&since.handle); err != nil {
		return 0, err
	}
	var ms float32
	if st := e.dev.rt.api.HipEventElapsedTime(&ms, since.raw, e.raw); st != Success {
		return 0, e.dev.rt.fail("hipEventElapsedTime", st, "%s since %s", e.what, since.what)
	}
	return time.Duration(float64(ms) * float64(time.Millisecond)), nil
}

// Close releases the event. Work that was recorded goes on. It is idempotent.
func (e *Event) Close() error {
	return e.shut(func() error {
		if st := e.dev.rt.api.HipEventDestroy(e.raw); st != Success {
			return e.dev.rt.fail("hipEventDestroy", st, "%s", e.what)
		}
		return nil
	})
}

// Handle returns HIP's own handle of the event (hipEvent_t), for code that uses HIP by other means. It is valid until
// Close.
func (e *Event) Handle() uintptr { return e.raw }
