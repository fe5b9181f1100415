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
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// Loader loads models onto devices. What is expensive to make (staging memory, streams, events, the devices' kernels)
// is made by its first load and serves all later ones. Its methods are safe for concurrent use: several loads may run
// at once and share all that. The caller must Close it.
type Loader struct {
	devices      []*amdhip.Device
	config       Config
	kernelsOfCPU *kernels.Kernels
	kernels      []*kernelCache // by device
	running      sync.WaitGroup // loads
	calls        *watch.Calls   // of the runtime that do not return
	making       chan struct{}  // has room for one: whoever makes a stage

	mu      sync.Mutex
	closed  bool
	stages  []*stage
	closing []*stage  // that are being freed
	summers []*summer // that no load uses
	trimmed []*summer // that are being freed
	left    LeftError // what devices that hang may use for ever, and was not freed
}

// New returns a Loader for devices, which must be different ones of one runtime. It allocates nothing yet.
func New(devices []*amdhip.Device, c Config) (*Loader, error) {
	if len(devices) == 0 {
		return nil, fmt.Errorf("%w: no devices", ErrBadOption)
	}
	for i, a := range devices {
		switch {
		case a == nil:
			return nil, fmt.Errorf("%w: device %d of the list is nil", ErrBadOption, i)
		case a.Runtime() != devices[0].Runtime():
			return nil, fmt.Errorf("%w: devices of several runtimes", ErrBadOption)
		case slices.Contains(devices[:i], a):
			return nil, fmt.Errorf("%w: device %d is there twice", ErrBadOption, a.Index())
		}
	}
	c, err := c.check()
	if err != nil {
		return nil, err
	}
	l := &Loader{devices: slices.Clone(devices), config: c, calls: new(watch.Calls), making: make(chan struct{}, 1)}
	if l.kernelsOfCPU, err = kernels.For(c.ISA); err != nil {
		return nil, err
	}
	for range devices {
		l.kernels = append(l.kernels, newKernelCache())
	}
	return l, nil
}

// Plan is a plan.Plan for the devices of a Loader, with the file or the Image that it is loaded from.
type Plan struct {
	*plan.Plan
	Free   []uint64   // bytes that a load could take on each device when the plan was made
	file   *gguf.File // nil: it is loaded from image
	image  *Image     // nil: it is loaded from file
	loader *Loader
}

// Plan lays out the tensors of f as s wants them, on the Loader's devices. It reads nothing but the header and
// allocates nothing. Errors match ErrBadOption where s asks for what cannot be. f must stay open until what is loaded
// by the plan has arrived.
func (l *Loader) Plan(f *gguf.File, s plan.Spec) (*Plan, error) {
	free, err := l.free(context.Background(), l.limit())
	if err != nil {
		return nil, err
	}
	p, err := plan.New(f, s, free)
	if err != nil {
		return nil, fmt.Errorf("loader: %w", err)
	}
	if f.Remote() && l.config.IO != IOAuto {
		return nil, fmt.Errorf("%w: reading by %v is for files; %s is read by ranges", ErrBadOption, l.config.IO, f.Parts()[0].Path)
	}
	if _, err := sizesOf(p, l.config.forFile(f), f.Remote(), nil); err != nil { // before anything is allocated
		return nil, err
	}
	return &Plan{Plan: p, Free: free, file: f, loader: l}, nil
}

// Fits compares the plan with what is free on the devices now. The error is a *plan.MemoryError for each device that it
// does not fit on.
func (p *Plan) Fits() error { return p.fits(context.Background(), p.loader.limit()) }

func (p *Plan) fits(ctx context.Context, limit *watch.Limit) error {
	free, err := p.loader.free(ctx, limit)
	if err != nil {
		return err
	}
	var errs []error // all of them: what is to be moved where shows only together
	for d := range free {
		errs = append(errs, p.loader.fits(p, d, free[d], 0))
	}
	return errors.Join(errs...)
}

// fits compares what device d gets, and more bytes besides, with what is free there.
func (l *Loader) fits(p *Plan, d int, free, more uint64) error {
	err := p.Plan.Fits(d, free, more)
	if e, ok := errors.AsType[*plan.MemoryError](err); ok {
		e.Name = l.devices[d].Name()
	}
	return onDevice(l.devices[d], len(l.devices) > 1, err)
}

// free is what a load may take on each device, in bytes. On devices that share the host's memory that is an equal part
// of what the host has available: their own figure is often that of a carve-out which the arenas do not come from.
func (l *Loader) free(ctx context.Context, limit *watch.Limit) ([]uint64, error) {
	var sharing, host uint64
	for _, dev := range l.devices {
		if dev.Integrated() {
			sharing++
		}
	}
	known := false
	if sharing > 0 { // asked once, as the answer differs from moment to moment, and equal devices are to get equal parts
		host, known = hostAvailable()
	}
	all := make([]uint64, len(l.devices))
	for i, dev := range l.devices {
		if known && dev.Integrated() {
			all[i] = host / sharing
			continue
		}
		info := func() (uint64, error) {
			free, _, err := dev.MemInfo()
			return free, err
		}
		var err error
		if all[i], err = watch.Do(ctx, limit, "asking for free device memory", info, func(uint64) {}); err != nil {
			return nil, onDevice(dev, len(l.devices) > 1, err)
		}
	}
	return all, nil
}

// Hanging reports whether a device hangs, as far as is known: a call of the runtime for this Loader or one of its
// models was given up and has not returned, or copies have not ended. What frees something then waits a moment only.
func (l *Loader) Hanging() bool { return l.calls.Hanging() }

// limit is the time that the calls of one operation may take.
func (l *Loader) limit() *watch.Limit { return l.calls.Limit(l.config.Stall) }

// rest is limit for an operation that frees something.
func (l *Loader) rest() *watch.Limit { return l.calls.Rest(l.config.Stall) }

// of returns the devices of a group.
func (l *Loader) of(g *plan.Group) []*amdhip.Device {
	all := make([]*amdhip.Device, len(g.Devices))
	for i, d := range g.Devices {
		all[i] = l.devices[d]
	}
	return all
}

// Load puts the tensors of f on the devices as s wants them, and returns when all of them have arrived. On an error, or
// when ctx ends before that, nothing is left on any device. For several loads make a Loader. Errors match ErrBadOption,
// ErrInsufficientMemory or ErrStalled, are a *TensorError, an *amdhip.Error or a *gguf.FormatError for a file that
// changes while it is read, or are the cause of ctx's end.
func Load(ctx context.Context, f *gguf.File, s plan.Spec, devices ...*amdhip.Device) (*Model, error) {
	return once(f, s, devices, func(l *Loader, p *Plan) (*Model, error) { return l.Load(ctx, p, Request{}) })
}

// LoadSync is Load the plain way: see Loader.LoadSync.
func LoadSync(ctx context.Context, f *gguf.File, s plan.Spec, devices ...*amdhip.Device) (*Model, error) {
	return once(f, s, devices, func(l *Loader, p *Plan) (*Model, error) { return l.LoadSync(ctx, p, Request{}) })
}

// once makes a Loader for one load.
func once(
	f *gguf.File, s plan.Spec, devices []*amdhip.Device, load func(*Loader, *Plan) (*Model, error),
) (*Model, error) {
	l, err := New(devices, Config{})
	if err != nil {
		return nil, err
	}
	p, err := l.Plan(f, s)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	m, err := load(l, p)
	if closing := l.Close(); closing != nil || err != nil {
		if m != nil {
			closing = errors.Join(closing, m.Close())
		}
		return nil, errors.Join(err, closing)
	}
	return m, nil
}

// Load is Start, and waits until all tensors have arrived. On an error, or when ctx ends before that, nothing is left
// on any device.
func (l *Loader) Load(ctx context.Context, p *Plan, r Request) (*Model, error) {
	m, err := l.Start(ctx, p, r)
	if err != nil {
		return nil, err
	}
	<-m.finished // not ctx: what is in flight must be over first
	if err := m.failure(); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// Start begins to put the tensors of p on the devices and returns once device memory is allocated; tensors then arrive
// in the order of the file, all devices at the same time. See [Model.Wait] and [Model.WaitStream]. The load ends early
// when ctx does. A tensor that goes to several devices counts as arrived when it is on all of them.
func (l *Loader) Start(ctx context.Context, p *Plan, r Request) (*Model, error) {
	began := time.Now()
	if err := l.begin(ctx, p); err != nil {
		return nil, err
	}
	limit := l.limit()
	m, x, by, err := l.prepare(ctx, limit, p, r, began, l.config.Dequant)
	if err != nil {
		l.running.Done()
		return nil, err
	}
	t := &team{model: m, loader: l, limit: limit, prover: by}
	if err := t.open(ctx, p, r, x, began); err != nil {
		err = errors.Join(err, t.close(), m.free(limit))
		l.running.Done()
		return nil, err
	}
	t.limit = l.limit() // setting up is over
	t.ctx, t.cancel = context.WithCancelCause(ctx)
	m.cancel = t.cancel
	t.start()
	return m, nil
}

// begin counts a load that is running. It refuses plans of other Loaders.
func (l *Loader) begin(ctx context.Context, p *Plan) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return ErrClosed
	case p == nil || p.loader == nil || !slices.Equal(p.loader.devices, l.devices):
		return fmt.Errorf("%w: the plan is for other devices than the Loader's", ErrBadOption)
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	l.running.Add(1)
	return nil
}

// prepare sees that the plan fits, decides what the devices convert and whether the load is proved, and allocates
// device memory.
func (l *Loader) prepare(ctx context.Context, limit *watch.Limit, p *Plan, r Request, began time.Time, by Dequant) (
	*Model, expansion, *prover, error,
) {
	if err := errors.Join(p.fits(ctx, limit), p.suits(r, false)); err != nil {
		return nil, expansion{}, nil, err
	}
	planned := time.Now()
	x, err := l.expand(ctx, limit, p, by)
	if err != nil {
		return nil, x, nil, err
	}
	proves, err := l.prover(ctx, limit, p, r.Prove, &x)
	if err != nil {
		return nil, x, nil, err
	}
	compiled := time.Now()
	m := newModel(p.Plan, l.devices)
	m.share, m.allocator, m.config, m.calls = r.Share || r.Allocate != nil, r.Allocate, l.config, l.calls
	if err := m.allocate(ctx, limit); err != nil {
		return nil, x, nil, err
	}
	m.report.Plan, m.report.Kernels = planned.Sub(began), compiled.Sub(planned)
	if proves.why != nil {
		m.report.Unproved = proves.why.Error()
	}
	for _, part := range m.parts {
		part.hashes = newHashes(part.group, r)
	}
	return m, x, proves, nil
}

// open makes a pipeline for each group.
func (t *team) open(ctx context.Context, p *Plan, r Request, x expansion, began time.Time) error {
	all, err := p.sizes(t.loader.config, x.tensors)
	if err != nil {
		return err
	}
	t.turns = all[0].turns
	for i, part := range t.model.parts {
		pipe := &pipeline{
			loader: t.loader, model: t.model, part: part, plan: p, file: p.file, request: r, sizes: all[i],
			expand: x.of(i),
			began:  began, team: t,
		}
		if kernels := t.prover.of(part.group); kernels != nil {
			pipe.proof = &proof{loader: t.loader, part: part, kernels: kernels, image: p.image}
		}
		if pipe.expand != nil {
			for _, d := range part.group.Devices {
				pipe.kernels = append(pipe.kernels, x.kernels[d])
			}
		}
		if len(t.model.parts) > 1 {
			pipe.label = fmt.Sprintf("device %d ", part.on[0].device.Index())
		}
		t.pipes = append(t.pipes, pipe)
		if err := pipe.open(ctx); err != nil {
			return onDevice(part.on[0].device, len(t.model.parts) > 1, err)
		}
	}
	return nil
}

// Close refuses further loads, waits until those that run have ended, and frees what the Loader made. Models stay. When
// a device hangs, staging memory cannot be freed, and the error is a *LeftError. It is idempotent.
func (l *Loader) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.running.Wait()
	limit := l.rest()
	err := l.closeIdle(limit, nil, false)
	if l.calls.Hanging() { // the device may be using them
		for _, s := range l.summers {
			l.leave(sum(s.things()))
		}
	} else {
		err = errors.Join(err, l.freeSummers(limit, l.summers))
	}
	l.summers = nil
	var kernels []thing
	for i, k := range l.kernels {
		kernels = append(kernels, k.things(l.devices[i])...)
	}
	if l.calls.Hanging() { // they may be running
		l.leave(sum(kernels))
	} else {
		left, closed := freeAll(limit, "unloading kernels", kernels)
		l.leave(left)
		err = errors.Join(err, closed)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return errors.Join(err, l.left.orNil())
}

// leave counts what was not freed.
func (l *Loader) leave(left LeftError) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.left.add(left)
}
