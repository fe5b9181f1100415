package soft

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// Fault makes calls of one function of HIP or hipRTC fail.
type Fault struct {
	Func string // its own name, "hipMemcpyAsync" or "hiprtcCompileProgram"
	N    int    // the Nth call from now, the first is 1; 0 means every call
	// Code is what the call answers or, with Async, what the operation fails with. For functions of hipRTC it is the
	// number of an RTCStatus.
	Code hip.Status

	// Async lets the call succeed and the operation fail when its stream executes it. The stream is broken from then
	// on: later queries and waits of it, and of events recorded on it afterwards, report Code. hipMemMap says Success
	// and maps nothing, so that hipMemSetAccess fails.
	Async bool
	// Stall lets the call succeed and the operation never end, until ClearFaults or the Close of the Runtime. After
	// ClearFaults the operation is executed, or fails with Code if that is set.
	Stall bool
	// Block keeps the call itself from returning, until ClearFaults or the Close of the Runtime. After that it does what
	// it would have done, or answers Code if that is set. Any function can block.
	Block bool
}

// streamFuncs are the functions that put an operation on a stream, those that Async and Stall make sense for.
var streamFuncs = []string{
	"hipMemcpyAsync", "hipMemcpyPeerAsync", "hipMemsetAsync", "hipStreamWaitEvent", "hipEventRecord", "hipFreeAsync",
	"hipModuleLaunchKernel", "hipGraphLaunch",
}

// call counts the calls of one function and holds the faults that wait for one.
type call struct {
	count  atomic.Int64
	armed  atomic.Int32 // len(faults), readable without the lock
	faults []*armedFault
}

type armedFault struct {
	Fault
	left    int           // calls until it strikes
	release chan struct{} // of Stall and Block: closed by ClearFaults
}

// delayed is what a Fault does to an operation when it executes.
type delayed struct {
	code  hip.Status
	stall <-chan struct{} // nil: no stall
}

// Inject adds a fault. Several may be waiting, also for one function. It panics when f cannot work: Func is not a
// function of the table that answers a code, Async or Stall is asked of a function that puts nothing on a stream, Code
// is Success without Stall and Block, or N is negative.
func (sw *Software) Inject(f Fault) {
	c := sw.names[f.Func]
	switch {
	case c == nil || f.Func == "hipGetErrorName" || strings.HasSuffix(f.Func, "GetErrorString"):
		panic(fmt.Sprintf("soft: Inject: no function %q in the table that could fail", f.Func))
	case (f.Async || f.Stall) && !slices.Contains(streamFuncs, f.Func) && (f.Stall || f.Func != "hipMemMap"):
		panic(fmt.Sprintf("soft: Inject: %s puts nothing on a stream, so it cannot fail there", f.Func))
	case f.Block && (f.Async || f.Stall):
		panic("soft: Inject: Block is for the call, Async and Stall are for its operation")
	case f.Code == hip.Success && !f.Stall && !f.Block:
		panic("soft: Inject: a fault needs a Code, Stall or Block")
	case f.N < 0:
		panic(fmt.Sprintf("soft: Inject: call number %d", f.N))
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	armed := &armedFault{Fault: f, left: f.N}
	if f.Stall || f.Block {
		armed.release = make(chan struct{})
		sw.stalls = append(sw.stalls, armed.release)
	}
	c.faults = append(c.faults, armed)
	c.armed.Store(int32(len(c.faults)))
}

// ClearFaults disarms all faults and lets calls and operations that do not end go on. Streams that failed stay so.
func (sw *Software) ClearFaults() {
	sw.mu.Lock()
	defer sw.mu.Unlock()
	for _, c := range sw.names {
		c.faults = nil
		c.armed.Store(0)
	}
	for _, release := range sw.stalls {
		close(release)
	}
	sw.stalls = nil
}

// enter counts a call of the named function and applies faults that were injected. If st is not Success, it is what the
// call answers.
func (sw *Software) enter(name string) (late delayed, st hip.Status) {
	c := sw.names[name]
	c.count.Add(1)
	if c.armed.Load() == 0 {
		return delayed{}, hip.Success
	}
	late, blocks, st := sw.due(c)
	for _, release := range blocks {
		select {
		case <-release:
		case <-sw.quit:
		}
	}
	return late, st
}

// due takes the faults that strike a call of c now: what becomes of its operation, what it has to wait for, and what it
// answers.
func (sw *Software) due(c *call) (late delayed, blocks []<-chan struct{}, st hip.Status) {
	sw.mu.Lock()
	defer sw.mu.Unlock()
	for i := 0; i < len(c.faults); {
		f := c.faults[i]
		if f.left > 1 {
			f.left--
			i++
			continue
		}
		if f.left == 1 {
			c.faults = slices.Delete(c.faults, i, i+1)
			c.armed.Store(int32(len(c.faults)))
		} else {
			i++
		}
		switch {
		case f.Stall:
			late = delayed{code: f.Code, stall: f.release}
			continue
		case f.Async:
			late = delayed{code: f.Code}
			continue
		case f.Block:
			blocks = append(blocks, f.release)
		}
		if st == hip.Success {
			st = f.Code
		}
	}
	return late, blocks, st
}

// call is enter for functions that put nothing on a stream.
func (sw *Software) call(name string) hip.Status {
	_, st := sw.enter(name)
	return st
}
