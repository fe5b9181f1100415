package amdhip

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
)

// handle is what Memory, HostMemory, Stream, Event and Module share: the device they belong to, and the way they are closed.
//
// A call that uses two handles enters the stream first, then the event, the host memory or the module; two events are
// entered in the order of their addresses. So a Close that waits for one of them cannot close a circle.
type handle struct {
	dev     *Device
	what    string       // "stream on device 0", for errors
	mu      sync.RWMutex // held for reading during each call on the handle, for writing by Close
	closed  bool
	cleanup runtime.Cleanup
}

// leak is what is left of a handle that was collected unclosed.
type leak struct {
	rt         *Runtime
	what, site string
}

// track starts the life of h, which is embedded in the object that the caller of the package gets. depth is the number
// of this package's functions between that caller and track.
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

// report counts the leak. It frees nothing: the GPU may still be using the memory.
func (l leak) report() {
	l.rt.leaked.Add(1)
	l.rt.open.Add(-1)
	l.rt.log.Debug("amdhip: handle was never closed", "handle", l.what, "created_in", l.site)
}

// enter begins a call that uses the handle; leave ends it. Close waits in between.
func (h *handle) enter() error {
	h.mu.RLock()
	if h.closed {
		h.mu.RUnlock()
		return fmt.Errorf("amdhip: %s: %w", h.what, ErrClosed)
	}
	return nil
}

func (h *handle) leave() { h.mu.RUnlock() }

// shut waits for the calls in progress and runs release, once; later calls do nothing. The handle is closed even when
// release fails, because HIP does not say what such a handle is still good for.
func (h *handle) shut(release func() error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil
	}
	h.closed = true
	h.cleanup.Stop()
	h.dev.rt.open.Add(-1)
	return release()
}

// sameRuntime refuses a handle of another runtime: its raw value means nothing here, and may crash the library.
func (h *handle) sameRuntime(other *handle) error {
	if h.dev.rt != other.dev.rt {
		return fmt.Errorf("amdhip: %s and %s belong to different runtimes: %w", h.what, other.what, ErrInvalidHandle)
	}
	return nil
}
