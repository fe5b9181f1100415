package loader

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// Tensor is a tensor in device memory.
type Tensor struct {
	Name   string
	Device *amdhip.Device
	Ptr    amdhip.DevicePtr // of the first element, aligned to 256 bytes
	Type   gguf.Type        // element type on the device
	Shape  []uint64         // in ggml's order: Shape[0] varies fastest; that of the slice where it is one
	Bytes  uint64
	Slice  *plan.Slice // the part of the file's tensor that this is, with a shard by tensor; nil: all of it
}

// Model is a model in device memory, or on its way there: on one device or on several, loaded by this process or mapped
// from another one. Its methods are safe for concurrent use. The caller must Close it; after that they return
// ErrClosed.
type Model struct {
	plan    *plan.Plan
	devices []*amdhip.Device // by number in the plan
	parts   []*part          // by group of the plan
	config  Config           // of the Loader; of an adopted model, the default
	calls   *watch.Calls     // of the runtime that do not return; shared with the Loader
	adopted *Feed            // the memory is somebody else's; nil: it is this model's own
	share   bool             // others may have the memory mapped

	allocator func(device, i int, n uint64) (Mapping, error) // Request.Allocate

	cancel   context.CancelCauseFunc
	finished chan struct{} // closed when the load has ended, with success or not

	mu     sync.Mutex
	idle   *sync.Cond // users, or those who follow a part, have become 0
	users  int        // who use the memory: Close waits for them
	err    error      // why the load failed; valid once finished
	report Report
	left   LeftError // what could not be freed

	closed  bool
	freed   chan struct{} // closed when Close has freed what it can
	outcome error         // of that
}

// part is what a model has of one group of its plan.
type part struct {
	group  *plan.Group
	index  int         // of the group
	on     []*resident // by device of the group
	ready  *latch      // tensors that have arrived
	issued *latch      // tensors whose copies are enqueued
	hashes *hashes
	prints [][]fingerprints // by device of the group, by tensor; nil: not proved. Under Model.mu until the load has ended.

	// Under Model.mu.

	stuck     bool // a device may still use the memory, so that it is never freed
	following int  // calls that make other streams wait for those of the part
}

// resident is the memory of a group on one device.
type resident struct {
	device *amdhip.Device
	arenas []arena // they stay here when they are freed: a worker that a call holds up may look at them much later

	// Under Model.mu.

	streams []*amdhip.Stream // while the load runs
	freed   bool             // or left for good
}

// ptr is the address of a byte of an allocation on the n-th device of the group.
func (p *part) ptr(n, arena int, off uint64) amdhip.DevicePtr {
	return p.on[n].arenas[arena].ptr + amdhip.DevicePtr(off)
}

// devices are those of the group.
func (p *part) devices() []*amdhip.Device {
	all := make([]*amdhip.Device, len(p.on))
	for i := range p.on {
		all[i] = p.on[i].device
	}
	return all
}

// newModel returns a model without memory.
func newModel(p *plan.Plan, devices []*amdhip.Device) *Model {
	m := &Model{
		plan: p, devices: devices, config: Config{Stall: defaultStall}, calls: new(watch.Calls),
		finished: make(chan struct{}), freed: make(chan struct{}),
	}
	m.idle = sync.NewCond(&m.mu)
	m.report = Report{
		Tensors: p.Len(), ModelTensors: p.ModelTensors, FileBytes: p.FileBytes, ReadBytes: p.ReadBytes(),
		DeviceBytes: p.DeviceBytes(),
		Devices:     make([]DeviceReport, len(devices)),
	}
	for i := range p.Groups {
		g := &p.Groups[i]
		part := &part{group: g, index: i, ready: newLatch(len(g.Tensors)), issued: newLatch(len(g.Tensors))}
		for _, d := range g.Devices {
			part.on = append(part.on, &resident{device: devices[d]})
			m.report.Devices[d] = DeviceReport{
				Device: devices[d], Tensors: len(g.Tensors), ReadBytes: g.ReadBytes, DeviceBytes: g.DeviceBytes,
			}
		}
		m.parts = append(m.parts, part)
	}
	return m
}

// allocate takes device memory for all parts.
func (m *Model) allocate(ctx context.Context, limit *watch.Limit) error {
	start := time.Now()
	for _, p := range m.parts {
		for i := range p.on {
			r := p.on[i]
			for k, n := range p.group.Arenas {
				a, err := watch.Do(ctx, limit, "allocating device memory", func() (arena, error) {
					if m.allocator != nil {
						x, err := m.allocator(p.group.Devices[i], k, n)
						return arena{mem: x.Memory, ptr: x.Ptr}, err
					}
					return newArena(r.device, n, m.share)
				}, func(a arena) { _ = a.mem.Close() })
				if errors.Is(err, amdhip.ErrOutOfMemory) {
					err = fmt.Errorf("%w: %w", ErrInsufficientMemory, err)
				}
				if err != nil {
					return errors.Join(onDevice(r.device, len(m.devices) > 1, err), m.free(limit))
				}
				r.arenas = append(r.arenas, a)
			}
		}
	}
	m.report.Alloc = time.Since(start)
	return nil
}

// free gives back device memory, all but that of parts that are stuck, within the limit. The error has a *LeftError in
// it if anything is left, now or by an earlier call.
func (m *Model) free(limit *watch.Limit) error {
	var things []thing
	m.mu.Lock()
	for _, p := range m.parts {
		for i := range p.on {
			r := p.on[i]
			if r.freed {
				continue
			}
			r.freed = true
			for k, a := range r.arenas {
				x := thing{r.device, a.mem.Close, LeftError{DeviceBytes: p.group.Arenas[k]}}
				if p.stuck {
					m.left.add(x.what)
				} else {
					things = append(things, x)
				}
			}
		}
	}
	m.mu.Unlock()
	left, err := freeAll(limit, "freeing device memory", things)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.left.add(left)
	return errors.Join(err, m.left.orNil())
}

// hangs marks the memory of a part as never to be freed.
func (m *Model) hangs(p *part) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p.stuck = true
	m.calls.Hang()
}

// Guard runs f, which calls the runtime for something that has to do with the model. When f does not return within
// Config.Stall or soon after the end of ctx, Guard returns without it: with ErrStalled, or the cause of ctx's end.
func (m *Model) Guard(ctx context.Context, doing string, f func() error) error {
	return watch.Call(ctx, m.limit(), doing, f)
}

// limit is the time that the calls of one operation may take.
func (m *Model) limit() *watch.Limit { return m.calls.Limit(m.config.Stall) }

// Plan is what the model was loaded by. It must not be changed.
func (m *Model) Plan() *plan.Plan { return m.plan }

// Devices are those that the model is on, in the order that they were given in.
func (m *Model) Devices() []*amdhip.Device { return slices.Clone(m.devices) }

// Report says what the load did so far; it is complete after WaitAll.
func (m *Model) Report() Report {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.report
	r.Devices = slices.Clone(r.Devices)
	return r
}

// Tensors returns all tensors once, in the order of the file; of one that is on several devices, what is on the first.
// They may still be on their way: see Wait. After Close or a load that failed there are none.
func (m *Model) Tensors() []Tensor {
	if m.acquire() != nil {
		return nil
	}
	defer m.release()
	all := make([]Tensor, 0, m.plan.Len())
	for _, t := range m.plan.Tensors() {
		group, _, _ := m.plan.Find(t.Name)
		all = append(all, m.parts[group].tensor(0, t))
	}
	return all
}

// Tensor returns the tensor of that name; of one that is on several devices, what is on the first. It may still be on
// its way: see Wait. After Close, or after a load that failed, the error says so.
func (m *Model) Tensor(name string) (Tensor, error) { return m.TensorOn(nil, name) }

// TensorOn returns the tensor of that name on the given device; nil is the first that has it. It is Tensor otherwise.
func (m *Model) TensorOn(dev *amdhip.Device, name string) (Tensor, error) {
	if err := m.acquire(); err != nil {
		return Tensor{}, err
	}
	defer m.release()
	p, i, err := m.find(name)
	if err != nil {
		return Tensor{}, err
	}
	n := 0
	if dev != nil {
		n = slices.IndexFunc(p.on, func(r *resident) bool { return r.device == dev })
	}
	if n < 0 {
		return Tensor{}, fmt.Errorf("loader: tensor %q is not on device %d (%s), but on device %d: %w", name, dev.Index(), dev.Name(),
			p.on[0].device.Index(), amdhip.ErrInvalidDevice)
	}
	return p.tensor(n, &p.group.Tensors[i]), nil
}

// find returns the part that the tensor of that name is in, and its number there.
func (m *Model) find(name string) (*part, int, error) {
	group, i, ok := m.plan.Find(name)
	if !ok {
		return nil, 0, fmt.Errorf("loader: no tensor %q among the %d loaded", name, m.plan.Len())
	}
	return m.parts[group], i, nil
}

// tensor describes t on the n-th device of the group, which has its memory.
func (p *part) tensor(n int, t *plan.Tensor) Tensor {
	return Tensor{
		Name: t.Name, Device: p.on[n].device, Ptr: p.ptr(n, t.Arena, t.DeviceOffset), Type: t.Target,
		Shape: slices.Clone(t.Shape), Bytes: t.Bytes, Slice: t.Slice.Clone(),
	}
}

// acquire counts a user of the model's memory, for whom Close waits. The caller must release.
func (m *Model) acquire() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.unusable(); err != nil {
		return err
	}
	m.users++
	return nil
}

func (m *Model) release() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.users--; m.users == 0 {
		m.idle.Broadcast()
	}
}

// setStreams tells on which streams of each device the tensors of a part come.
func (m *Model) setStreams(part *part, streams func(n int) []*amdhip.Stream) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for n := range part.on {
		part.on[n].streams = streams(n)
	}
}

// noStreams takes back the streams that were told, and waits until nobody uses them. The result is false when somebody
// still does at the limit.
func (m *Model) noStreams(part *part, limit *watch.Limit) bool {
	m.setStreams(part, func(int) []*amdhip.Stream { return nil })
	_, ended := limit.Free("waiting for who makes streams wait", func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		for part.following > 0 {
			m.idle.Wait()
		}
		return nil
	})
	return ended
}

// check asks f whether the bytes that were loaded are what they should be, if it knows. Tensors can be used already.
func (m *Model) check(ctx context.Context, f *gguf.File) error {
	if f == nil { // an image, whose bytes have been checked when it was made
		return nil
	}
	start := time.Now()
	whole := m.plan.Len() == m.plan.ModelTensors && m.plan.Spec.Shard.By == plan.ShardNone
	err := f.Check(ctx, whole)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.report.Check = time.Since(start)
	if err != nil {
		return fmt.Errorf("loader: %w", err)
	}
	return nil
}

// end marks the load as ended. After an error it frees the memory, where the devices are at rest and nobody else may
// have it mapped.
func (m *Model) end(t *team) {
	m.mu.Lock()
	for _, p := range t.pipes {
		m.report.add(&p.groupReport)
	}
	m.report.Total = time.Since(t.pipes[0].began)
	if m.err = t.err; m.err == nil {
		m.err = m.report.prove(t.prover)
	}
	for m.err != nil && m.users > 0 {
		m.idle.Wait()
	}
	free := m.err != nil && !m.share
	m.mu.Unlock()
	if free {
		err := m.free(t.limit)
		if _, left := errors.AsType[*LeftError](err); !left { // else Close says so
			m.mu.Lock()
			m.err = errors.Join(m.err, err)
			m.mu.Unlock()
		}
	}
	t.cancel(nil)
	close(m.finished)
	t.loader.running.Done()
}

// Close ends a load that is still running, waits until the devices are done with the model's memory and frees it;
// memory that was adopted is given back to whoever it is of. Pointers into it die. When a device hangs, the memory
// cannot be freed, and the error is a *LeftError. Close is idempotent: calls after the first return the same error.
func (m *Model) Close() error {
	m.mu.Lock()
	first := !m.closed
	m.closed = true
	m.mu.Unlock()
	if m.cancel != nil {
		m.cancel(ErrClosed)
	}
	if m.adopted == nil {
		<-m.finished
	}
	if first {
		m.outcome = m.giveUp()
		close(m.freed)
	}
	<-m.freed
	return m.outcome
}

// giveUp waits until nobody uses the memory, and then frees it as far as that can be.
func (m *Model) giveUp() error {
	m.mu.Lock()
	for m.users > 0 {
		m.idle.Wait()
	}
	m.mu.Unlock()
	err := m.free(m.calls.Rest(m.config.Stall))
	if m.adopted != nil {
		_, left := errors.AsType[*LeftError](err)
		err = errors.Join(err, m.adopted.close(left))
	}
	return err
}
