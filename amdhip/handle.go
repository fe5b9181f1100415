package amdhip

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
)

// handle is what all objects of HIP have in common here: the device they belong to, and the way they are closed.
// Memory, HostMemory, Stream, Event, Module, Graph and the others embed it.
//
// A call of HIP may last for ever when a device hangs. So no lock is held during calls: they are counted, calls that
// come after Close has begun are refused, and only Close itself waits, for the calls that are under way.
type handle struct {
	dev     *Device
	what    string // "stream on device 0", for errors
	cleanup runtime.Cleanup

	borrowed bool // HIP's handle belongs to somebody else

	mu     sync.Mutex    // never held during a call of HIP
	users  int           // calls under way
	closed bool          // Close has begun
	idle   chan struct{} // closed when users becomes 0; set by Close if it has to wait
	shutOK chan struct{} // closed when Close has ended; set by the first Close
}

// leak is what is left of a handle that was collected unclosed.
type leak struct {
	rt         *Runtime
	what, site string
}

// track sets up a handle for an object of HIP that this package made. The caller of the package gets the Go object in
// which h is embedded; depth is the number of functions of this package between that caller and track.
func (h *handle) track(dev *Device, what string, depth int) {
	h.dev, h.what = dev, fmt.Sprintf("%s on device %d", what, dev.index)
	l := leak{rt: dev.rt, what: h.what}
	if dev.rt.log.Enabled(context.Background(), slog.LevelDebug) {
		if _, file, line, ok := runtime.Caller(depth + 1); ok {
			l.site = fmt.Sprintf("%s:%d", file, line)
		}
	}
	dev.rt.open.Add(1)
	h.cleanup = runtime.AddCleanup(h, leak.report, l)
}

// borrow sets up a handle for an object of HIP that somebody else made. Close does not destroy the object, and a handle
// that is collected unclosed is not a leak.
func (h *handle) borrow(dev *Device, what string) {
	h.dev, h.what = dev, fmt.Sprintf("%s on device %d", what, dev.index)
	h.borrowed = true
}

// report counts the leak. It frees nothing: the GPU may still be using the memory.
func (l leak) report() {
	l.rt.leaked.Add(1)
	l.rt.open.Add(-1)
	l.rt.log.Debug("amdhip: handle was never closed", "handle", l.what, "created_in", l.site)
}

// enter begins a call that uses the handle, and leave ends it. Close waits until every call that has entered has left.
func (h *handle) enter() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return fmt.Errorf("amdhip: %s: %w", h.what, ErrClosed)
	}
	h.users++
	return nil
}

func (h *handle) leave() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.users--; h.users == 0 && h.idle != nil {
		close(h.idle)
	}
}

// shut waits for the calls in progress and then runs release. Later calls wait until that has ended, and do nothing.
// The handle is closed even if release fails, because HIP does not say what such an object is still good for.
func (h *handle) shut(release func() error) error {
	h.mu.Lock()
	if h.closed {
		ended := h.shutOK
		h.mu.Unlock()
		<-ended
		return nil
	}
	h.closed = true
	h.shutOK = make(chan struct{})
	defer close(h.shutOK)
	var idle chan struct{}
	if h.users > 0 {
		idle = make(chan struct{})
		h.idle = idle
	}
	h.mu.Unlock()
	if idle != nil {
		<-idle
	}
	if h.borrowed {
		return nil
	}
	h.cleanup.Stop()
	h.dev.rt.open.Add(-1)
	return release()
}

// sameRuntime refuses a handle of another runtime: the number that HIP knows the object by means nothing here, and may
// crash the library.
func (h *handle) sameRuntime(other *handle) error {
	if h.dev.rt != other.dev.rt {
		return fmt.Errorf("amdhip: %s and %s belong to different runtimes: %w", h.what, other.what, ErrInvalidHandle)
	}
	return nil
}
