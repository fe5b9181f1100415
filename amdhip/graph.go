package amdhip

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// Graph is work that a stream recorded instead of doing it. The caller must Close it.
type Graph struct {
	handle
	raw uintptr
}

// GraphExec is a Graph made ready to be launched, as often as wanted. Its methods are safe for concurrent use. The
// caller must Close it.
type GraphExec struct {
	handle
	raw uintptr
}

// hasGraphs reports whether the library has all functions for graphs.
func (rt *Runtime) hasGraphs() bool {
	a := rt.api
	return a.HipStreamBeginCapture != nil && a.HipStreamEndCapture != nil && a.HipGraphDestroy != nil &&
		a.HipGraphInstantiate != nil && a.HipGraphLaunch != nil && a.HipGraphExecDestroy != nil
}

// Capture calls record and returns, as a Graph, the work that record puts on the stream: none of it is done. Other
// streams take part once they Wait for an event that was recorded on a stream that does; at the end the stream must
// have waited for all of them, else the error matches ErrStreamCaptureUnjoined. Copies must be of page-locked memory,
// and memory that the work is about must exist whenever the graph is launched.
//
// record runs on the calling goroutine, which is locked to its OS thread. On that thread calls that cannot be recorded
// fail while it runs, and spoil the recording: allocating and freeing, Synchronize, Query. Other goroutines may do as
// they like, but must not use the stream. When record fails, its error is returned and there is no Graph. It needs HIP
// 5; else, and when the library has no graphs, the error matches ErrUnsupported.
func (s *Stream) Capture(record func() error) (g *Graph, err error) {
	rt := s.dev.rt
	if !rt.hasGraphs() {
		return nil, rt.missing("hipStreamBeginCapture")
	}
	// HIP wants the recording to end on the thread on which it began, and looks at that thread meanwhile.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := s.call("hipStreamBeginCapture", func() Status {
		return rt.api.HipStreamBeginCapture(s.raw, hip.CaptureThreadLocal)
	}); err != nil {
		return nil, err
	}
	ended := false
	end := func() (raw uintptr, err error) {
		ended = true
		err = s.call("hipStreamEndCapture", func() Status { return rt.api.HipStreamEndCapture(s.raw, &raw) })
		return raw, err
	}
	defer func() {
		if ended {
			return
		}
		// record has panicked, or has ended the goroutine: there is nobody to tell what goes wrong here.
		if raw, _ := end(); raw != 0 {
			_ = rt.destroyGraph(raw)
		}
	}()
	failed := record()
	raw, err := end()
	if err = errors.Join(failed, err); err != nil {
		if raw != 0 {
			err = errors.Join(err, rt.destroyGraph(raw))
		}
		return nil, err
	}
	g = &Graph{raw: raw}
	g.track(s.dev, "graph", 1)
	return g, nil
}

// call makes a call about the stream.
func (s *Stream) call(name string, f func() Status) error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	if st := f(); st != Success {
		return s.dev.rt.fail(name, st, "%s", s.what)
	}
	return nil
}

func (rt *Runtime) destroyGraph(raw uintptr) error {
	if st := rt.api.HipGraphDestroy(raw); st != Success {
		return rt.fail("hipGraphDestroy", st, "")
	}
	return nil
}

// Device returns the device on whose stream the graph was recorded.
func (g *Graph) Device() *Device { return g.dev }

// Handle returns HIP's own handle of the graph (hipGraph_t). It is valid until Close.
func (g *Graph) Handle() uintptr { return g.raw }

// Instantiate makes the graph ready to be launched. The graph may be closed afterwards. What HIP says about a graph
// that it refuses is in the error.
func (g *Graph) Instantiate() (*GraphExec, error) {
	if err := g.enter(); err != nil {
		return nil, err
	}
	defer g.leave()
	var raw, node uintptr
	var log [1024]byte
	err := g.dev.onThread("hipGraphInstantiate", g.what, func() Status {
		return g.dev.rt.api.HipGraphInstantiate(&raw, g.raw, &node, &log[0], uintptr(len(log)))
	})
	if err != nil {
		if text := cString(log[:]); text != "" {
			err = fmt.Errorf("%w: %s", err, text)
		}
		return nil, err
	}
	e := &GraphExec{raw: raw}
	e.track(g.dev, "executable graph", 1)
	return e, nil
}

// Close releases the graph, not what was instantiated from it. It is idempotent.
func (g *Graph) Close() error {
	return g.shut(func() error { return g.dev.rt.destroyGraph(g.raw) })
}

// LaunchGraph starts the work of the graph, in stream order, and returns.
func (s *Stream) LaunchGraph(e *GraphExec) error {
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
	return s.dev.onThread("hipGraphLaunch", s.what, func() Status {
		return s.dev.rt.api.HipGraphLaunch(e.raw, s.raw)
	})
}

// Device returns the device on whose stream the graph was recorded.
func (e *GraphExec) Device() *Device { return e.dev }

// Handle returns HIP's own handle of the executable graph (hipGraphExec_t). It is valid until Close.
func (e *GraphExec) Handle() uintptr { return e.raw }

// Close releases the executable graph. Streams must be done with it. It is idempotent.
func (e *GraphExec) Close() error {
	return e.shut(func() error {
		if st := e.dev.rt.api.HipGraphExecDestroy(e.raw); st != Success {
			return e.dev.rt.fail("hipGraphExecDestroy", st, "%s", e.what)
		}
		return nil
	})
}
