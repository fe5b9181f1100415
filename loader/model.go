package loader

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
)

// ErrStalled is matched by the error of a load that made no progress for Options.Stall. What the device may still
// read or write (staging buffers, the model's own memory) is then never freed.
var ErrStalled = errors.New("the load makes no progress")

// ErrClosed is returned when a Model is used after Close.
var ErrClosed = errors.New("loader: model is closed")

// TensorError says which tensor an error concerns, and what was being done with which of its bytes.
type TensorError struct {
	Tensor string
	Op     string // "read", "check", "dequantize", "copy", "expand" (copy blocks, and dequantize on the device) or "read back"
	Offset int64  // first byte: in the tensor's (of a slice, in its) bytes in the file for "read", "check" and "dequantize", on the device for the others
	Bytes  int
	Err    error
}

// Error returns tensor, stage, byte range and cause.
func (e *TensorError) Error() string {
	return fmt.Sprintf("tensor %q, %s of bytes %d to %d: %v", e.Tensor, e.Op, e.Offset, e.Offset+int64(e.Bytes), e.Err)
}

// Unwrap returns the cause.
func (e *TensorError) Unwrap() error { return e.Err }

// Tensor is a tensor in device memory.
type Tensor struct {
	Name  string
	Ptr   amdhip.DevicePtr // of the first element, aligned to 256 bytes
	DType gguf.Type        // element type on the device
	Shape []uint64         // in ggml's order: Shape[0] varies fastest; that of the slice where it is one
	Bytes uint64
	Slice *Slice // the part of the file's tensor that this is, with Options.Shard; nil: all of it
}

// Report says what a load did, and how long it took. It is complete once the load has ended.
type Report struct {
	Tensors        int
	FileBytes      uint64 // of all parts
	ReadBytes      uint64 // tensor bytes taken from the file
	MappedBytes    uint64 // of these, through the mapping
	DirectBytes    uint64 // of these, by direct reads
	FetchedBytes   uint64 // by direct reads in all: with what lies between the pieces of a slice, or of an unaligned beginning
	RemoteBytes    uint64 // of these, from a gguf.Source
	UploadBytes    uint64 // copied to the device, padding included
	DeviceBytes    uint64 // allocated on the device
	Streams        int
	Threads        int
	Connections    int // ranges of a remote model that were read at the same time; 0 for other models
	ChunkBytes     int
	Expanded       int    // tensors that the device converted
	ScratchBytes   uint64 // device memory beside the model, for blocks that the device converts
	PinnedBytes    int64
	UnpinnedCopies int64 // copies from memory that could not be pinned

	Plan     time.Duration // laying out and checking
	Kernels  time.Duration // making the device's kernels ready
	Alloc    time.Duration // device memory
	Pin      time.Duration // staging memory, as far as the transfer waited for it
	PinTotal time.Duration // staging memory in all; the rest overlaps the transfer
	Transfer time.Duration // from the first read to the end of the last copy
	Total    time.Duration
}

// Model is a model in device memory, or on its way there. Its methods are safe for concurrent use. The caller must Close it.
type Model struct {
	dev    *amdhip.Device
	plan   *Plan
	index  map[string]int // in plan.Tensors
	arenas []arena
	chunks []chunk
	sums   [][sha256.Size]byte // of the tensors, with Options.Hash

	attached *attachment    // the memory is another process's; else nil
	files    []FileIdentity // of a model that is attached or that a Holder has; else nil

	ready, issued latch
	cancel        context.CancelCauseFunc
	finished      chan struct{} // closed when the load has ended, with success or not

	mu      sync.RWMutex
	streams []*amdhip.Stream // while the load runs
	err     error            // why the load failed; valid once finished
	report  Report
	closed  bool
	stuck   atomic.Bool // the device may still use memory: nothing may be freed
}

// converters are who may turn the file's types into others: the CPU, and the device where it does.
type converters struct {
	cpu *kernels.Kernels
	gpu *gpu.Set // nil: nothing is converted on the device
}

// prepare chooses who converts, plans the load, checks that it fits and allocates device memory. The Model's load has not
// begun. The caller must close conv.gpu.
func prepare(ctx context.Context, dev *amdhip.Device, m *gguf.Model, o Options) (w *Model, conv converters, err error) {
	defer func() {
		if err != nil && conv.gpu != nil {
			err = errors.Join(err, conv.gpu.Close())
		}
	}()
	start := time.Now()
	if ctx.Err() != nil {
		return nil, conv, context.Cause(ctx)
	}
	if conv.cpu, err = kernels.For(o.ISA); err != nil {
		return nil, conv, err
	}
	plan, err := NewPlan(m, o)
	if err != nil {
		return nil, conv, err
	}
	if err := plan.suitRemote(o); err != nil {
		return nil, conv, err
	}
	if err := plan.Check(dev); err != nil {
		return nil, conv, err
	}
	planned := time.Now()
	if conv.gpu, err = plan.expandOn(ctx, dev); err != nil {
		return nil, conv, err
	}
	compiled := time.Now()
	plan.grow(o)
	if w, err = plan.allocate(dev); err != nil {
		return nil, conv, err
	}
	w.report.Plan, w.report.Kernels = planned.Sub(start), compiled.Sub(planned)
	return w, conv, nil
}

// allocate takes device memory for the plan's tensors. The Model's load has not begun.
func (p *Plan) allocate(dev *amdhip.Device) (*Model, error) {
	start := time.Now()
	w := &Model{dev: dev, plan: p, index: make(map[string]int, len(p.Tensors)), finished: make(chan struct{}), sums: newSums(p)}
	for i := range p.Tensors {
		w.index[p.Tensors[i].Name] = i
	}
	for _, n := range p.arenas {
		a, err := newArena(dev, n, p.opts.exported)
		if errors.Is(err, amdhip.ErrOutOfMemory) {
			err = fmt.Errorf("%w: %w", ErrInsufficientMemory, err)
		}
		if err != nil {
			return nil, errors.Join(err, w.free())
		}
		w.arenas = append(w.arenas, a)
	}
	w.report = Report{
		Tensors: len(p.Tensors), FileBytes: p.model.Size(), ReadBytes: p.ReadBytes, DeviceBytes: p.DeviceBytes,
		Threads: p.opts.Threads, Alloc: time.Since(start),
	}
	return w, nil
}

// free gives back device memory.
func (w *Model) free() error {
	var errs []error
	for _, a := range w.arenas {
		errs = append(errs, a.mem.Close())
	}
	w.arenas = nil
	return errors.Join(errs...)
}

// Device is where the model is.
func (w *Model) Device() *amdhip.Device { return w.dev }

// Report says what the load did so far; it is complete after Wait("") or Load.
func (w *Model) Report() Report {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.report
}

// Tensors returns all tensors, in the order of the file. They may still be on their way: see Wait.
func (w *Model) Tensors() []Tensor {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.arenas == nil || w.err != nil || w.attached.lost() != nil {
		return nil
	}
	all := make([]Tensor, len(w.plan.Tensors))
	for i := range all {
		all[i] = w.tensor(i)
	}
	return all
}

// Tensor returns the tensor of that name. It may still be on its way: see Wait. After Close, or after a load that failed,
// the error says so.
func (w *Model) Tensor(name string) (Tensor, error) {
	i, err := w.lookup(name)
	if err != nil {
		return Tensor{}, err
	}
	w.mu.RLock()
	defer w.mu.RUnlock()
	switch {
	case w.closed:
		return Tensor{}, ErrClosed
	case w.err != nil:
		return Tensor{}, w.err
	case w.attached.lost() != nil:
		return Tensor{}, w.attached.lost()
	}
	return w.tensor(i), nil
}

func (w *Model) lookup(name string) (int, error) {
	i, ok := w.index[name]
	if !ok {
		return 0, fmt.Errorf("loader: no tensor %q among the %d loaded", name, len(w.plan.Tensors))
	}
	return i, nil
}

// tensor describes tensor i; w.arenas must be there.
func (w *Model) tensor(i int) Tensor {
	t := &w.plan.Tensors[i]
	return Tensor{Name: t.Name, Ptr: w.ptr(t.arena, t.offset), DType: t.Target, Shape: t.Shape, Bytes: t.Bytes, Slice: t.Slice}
}

func (w *Model) ptr(arena int, off uint64) amdhip.DevicePtr {
	return w.arenas[arena].ptr + amdhip.DevicePtr(off)
}

// Wait blocks until the tensor of that name is in device memory. It returns the load's error if it failed before that, and
// the cause of ctx's end if that comes first; the load then goes on.
func (w *Model) Wait(ctx context.Context, name string) error {
	i, err := w.lookup(name)
	if err != nil {
		return err
	}
	return w.await(ctx, &w.ready, i)
}

// WaitAll blocks until the load has ended, and returns its error.
func (w *Model) WaitAll(ctx context.Context) error {
	select {
	case <-w.finished:
		return w.failure()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// failure is why the load failed, or why the memory of an attached model must not be used any more.
func (w *Model) failure() error {
	if w.attached != nil {
		return w.attached.lost()
	}
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.err
}

// await blocks until tensor i has passed l.
func (w *Model) await(ctx context.Context, l *latch, i int) error {
	passed := l.done(i)
	select {
	case <-passed:
		return w.attached.lost() // a tensor that has arrived may be gone again
	default:
	}
	select {
	case <-passed:
		return w.attached.lost() // a tensor that has arrived may be gone again
	case <-w.finished:
		return w.failure() // nil means that the load has ended well, so tensor i has arrived
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// WaitStream makes the work that is enqueued on s afterwards wait on the device until the tensor of that name has arrived. The
// host is held up only as long as the tensor's copies have not been issued yet, never by their transfer: HIP cannot
// make a stream wait for a copy that is not enqueued. s must belong to the model's device.
func (w *Model) WaitStream(ctx context.Context, s *amdhip.Stream, name string) error {
	i, err := w.lookup(name)
	if err != nil {
		return err
	}
	if err := w.await(ctx, &w.issued, i); err != nil {
		return err
	}
	w.mu.RLock()
	defer w.mu.RUnlock()
	select {
	case <-w.finished:
		return errors.Join(w.err, w.attached.lost())
	case <-w.ready.done(i):
		return nil
	default:
	}
	if w.err != nil {
		return w.err
	}
	for _, from := range w.streams {
		if err := follow(s, from); err != nil {
			return err
		}
	}
	return nil
}

// follow makes what is enqueued on s afterwards wait for all that is on from now.
func follow(s, from *amdhip.Stream) error {
	ev, err := from.Device().NewEvent(amdhip.EventOptions{})
	if err != nil {
		return err
	}
	if err = from.Record(ev); err == nil {
		err = s.Wait(ev)
	}
	return errors.Join(err, ev.Close()) // what waits for the event keeps it alive
}

// Close ends a load that is still running, waits until the device is done with the model's memory and frees it. Pointers into
// it die. Memory of an attached model is unmapped; its Holder keeps it. It is idempotent.
func (w *Model) Close() error {
	if w.attached != nil {
		return w.detach()
	}
	if w.cancel != nil {
		w.cancel(ErrClosed)
	}
	<-w.finished
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	if w.stuck.Load() {
		return nil
	}
	return w.free()
}
