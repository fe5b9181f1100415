package hold

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// Errors of a Holder, also in the process that talks to it.
var (
	ErrUnknownModel = errors.New("no such model is held")
	ErrModelExists  = errors.New("a model of that name is held already")
	ErrAttached     = errors.New("the model is in use by processes that are attached")
	ErrPinned       = errors.New("the model is pinned")
	ErrAsleep       = errors.New("the model is not in device memory")
)

// Options describes a Holder. The zero value loads models as F16, serves processes of the same user, and takes as much
// device memory as there is and no page-locked memory.
type Options struct {
	Spec    plan.Spec      // what models become, unless a request says otherwise
	Config  loader.Config  // how they are loaded
	Request loader.Request // for models that Holder.Add loads. Of what other processes add, only Check and Prove apply

	// VRAM is how many bytes of each device the models may take together, with what their loads need where devices
	// convert or prove (see loader.Plan.ScratchBytes); 0: as much as is free.
	VRAM uint64
	// RAM is how many bytes of page-locked host memory models may take to sleep in; 0: none, so that models which make
	// room are loaded from their files again.
	RAM    int64
	Share  Share  // how others get at device memory
	Opener Opener // opens models that are not files; nil: all are
	Keep   Keeper // keeps the memory of models when this process ends; nil: nobody does. It needs descriptors
	// Ranks are the ranks whose parts of each model are held, where Spec.Shard says how models are divided among how many;
	// nil: that of Spec.Shard. With several, a model is held in parts: each is a model of its own, named NAME@RANK, and
	// NAME stands for all of them. As many devices as ranks get a part each, in this order; one device gets all.
	Ranks []int

	AllowGroup bool         // processes of the same group may list and attach, too; only the same user may change anything
	Logger     *slog.Logger // nil: silent. Config's logger, unless it has one
	// Changed is called when a model was added, dropped, woken or put to sleep, or its load has ended. Calls may overlap,
	// and must return quickly. Nil: nothing is called.
	Changed func()
	// Scrub is how often the memory of models is looked at again, whether it still is what was loaded; 0: never. What is
	// damaged is written again, see Model.Scrub. Loads are proved then, unless Request.Prove is ProveOff.
	Scrub time.Duration
	// LinkBytesPerSecond is the speed of the link from the host to one device, for the metrics; 0: unknown. Package
	// loader/measure measures it.
	LinkBytesPerSecond float64

	requestTime time.Duration // 0: requestTime; other values are for tests
	maxClients  int           // 0: maxClients; likewise
	slabBytes   int64         // 0: slabBytes; likewise
	root        string        // that limits of memory are read below; "": /; likewise
	keepLook    time.Duration // 0: keepLook; likewise
	// Called when Add has opened a file; nil: nothing is, others are for tests.
	opened func()
	peer   func(conn *net.UnixConn, group bool) (peer, error) // nil: checkPeer; likewise
}

// Holder keeps models in the memory of devices and lets other processes of the host use them. Its methods are safe for
// concurrent use. The caller must Close it.
type Holder struct {
	devices []*amdhip.Device
	options Options
	log     *slog.Logger
	loader  *loader.Loader
	calls   watch.Calls // of the runtime that do not return
	share   Share       // not ShareAuto
	pool    *hostPool   // nil: no model sleeps

	ctx        context.Context // ends with Close
	end        context.CancelFunc
	adding     sync.WaitGroup // calls of Add
	background sync.WaitGroup // filling of images
	filling    chan struct{}  // has one place: images are filled one after the other
	keepers    sync.WaitGroup // keepOn
	keeping    sync.Mutex     // held while the Keeper is told something, and for what it has
	closing    sync.Once
	outcome    error         // of closing
	noRAM      sync.Once     // says that page-locked memory cannot be had
	look       chan struct{} // closed when there is something to look at at once
	looking    sync.Once     // closes it

	// mu is held for looking things up and for counting, never while a method of a model is called: that may have to wait
	// for a device, or for somebody who reads the model.
	mu        sync.Mutex
	models    map[string]*held
	closed    bool
	ending    bool   // Serve ends
	left      uint64 // bytes of device memory that dropped models could not free
	attached  int64  // attachments so far
	refused   int64  // connections that were turned away
	wakes     int64
	wakeTime  time.Duration // of all wakes
	evictions int64         // models that made room
	uses      uint64
	claimed   []uint64      // bytes of device memory that are promised to models, by device
	freeing   []uint64      // of these, bytes that are being freed
	awaited   string        // the Keeper that somebody waited for in vain, in words; it may have answered since
	scratch   []uint64      // bytes that loads which are going on may take besides
	changed   chan struct{} // closed when there may be room that was not there before
}

// New returns a Holder that puts models on devices, which must be different ones of one runtime. On the software device
// that needs soft.Options.Shared. Errors are those of loader.New; with ShareFD, what matches amdhip.ErrUnsupported when
// a device has no virtual memory or it does not work.
func New(devices []*amdhip.Device, o Options) (*Holder, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Config.Logger == nil {
		o.Config.Logger = o.Logger
	}
	o.requestTime, o.maxClients = cmp.Or(o.requestTime, requestTime), cmp.Or(o.maxClients, maxClients)
	if o.peer == nil {
		o.peer = checkPeer
	}
	o.keepLook = cmp.Or(o.keepLook, keepLook)
	o.slabBytes, o.root = cmp.Or(o.slabBytes, slabBytes), cmp.Or(o.root, "/")
	if o.RAM < 0 || o.Scrub < 0 {
		return nil, fmt.Errorf("%w: RAM is %d bytes, Scrub %v", loader.ErrBadOption, o.RAM, o.Scrub)
	}
	if err := o.checkRanks(len(devices)); err != nil {
		return nil, err
	}
	l, err := loader.New(devices, o.Config)
	if err != nil {
		return nil, err
	}
	share, err := o.Share.choose(devices, o.Logger)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	if o.Keep != nil && share != ShareFD {
		o.Logger.Warn("nobody can keep the models when this process ends: that takes device memory that is shared by descriptors")
		o.Keep = nil
	}
	h := &Holder{
		devices: slices.Clone(devices), options: o, log: o.Logger, loader: l, models: make(map[string]*held), share: share,
		filling: make(chan struct{}, 1), claimed: make([]uint64, len(devices)), freeing: make([]uint64, len(devices)),
		scratch: make([]uint64, len(devices)), changed: make(chan struct{}), look: make(chan struct{}),
	}
	h.ctx, h.end = context.WithCancel(context.Background())
	if o.RAM > 0 {
		h.pool = &hostPool{
			make: devices[0].HostMalloc, budget: o.RAM, slab: o.slabBytes, root: o.root,
			limit: func() *watch.Limit { return h.calls.Limit(h.stall()) }, rest: h.rest,
		}
	}
	if err := h.beginScrubbing(); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	if o.Keep != nil {
		h.keepers.Go(h.keepOn)
	}
	return h, nil
}

// Add begins to load the model at path as Options say, and returns once its memory is allocated. Models that nobody
// uses make room for it, see Sleep. name is what others ask for it by. With "" it is the name of the file without its
// ending and the number of the part; Add returns it. A model that was adopted under that name, from the same file and
// as the same type, is taken as it is. What goes wrong until then is an error here: what gguf.Open and the Loader
// return, and what matches ErrModelExists, ErrBadModel, loader.ErrBadOption (for the name),
// loader.ErrInsufficientMemory or loader.ErrClosed. Wait tells how the load ends. The memory of a load that fails later
// is freed once nobody is attached to it, but the model is listed until it is dropped. With several Options.Ranks all
// of that is about the parts, which are all added or none.
func (h *Holder) Add(ctx context.Context, name, path string) (string, error) {
	return h.add(ctx, name, path, h.options.Spec, h.options.Request)
}

// reserve enters m, so that its name is taken and Close waits. The caller must call adding.Done. With ErrModelExists it
// returns the model that is there.
func (h *Holder) reserve(m *held) (*held, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, loader.ErrClosed
	}
	if have := h.models[m.name]; have != nil {
		return have, fmt.Errorf("hold: %q: %w", m.name, ErrModelExists)
	}
	h.models[m.name] = m
	h.adding.Add(1)
	return nil, nil
}

func (h *Holder) forget(m *held) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.models, m.name)
	if m.now != nil {
		h.left += m.now.left
	}
	h.notify()
}

// tell says that something has changed.
func (h *Holder) tell() {
	if h.options.Changed != nil {
		h.options.Changed()
	}
}

// Wait blocks until the load of the model that is going on, if there is one, has ended, and returns its error, or the
// cause of ctx's end.
func (h *Holder) Wait(ctx context.Context, name string) error {
	return h.each(name, func(name string) error { return h.waitFor(ctx, name) })
}

func (h *Holder) waitFor(ctx context.Context, name string) error {
	m, err := h.await(ctx, name)
	if err != nil {
		return err
	}
	h.mu.Lock()
	r := m.now
	h.mu.Unlock()
	if r == nil {
		return nil
	}
	return h.wait(ctx, r)
}

func (h *Holder) wait(ctx context.Context, r *residence) error {
	select {
	case <-r.ended:
		h.mu.Lock()
		defer h.mu.Unlock()
		return r.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Parts returns the names of the parts that a model of that name is held in, by rank; of one that is held whole its
// own.
func (h *Holder) Parts(name string) ([]string, error) {
	all, err := h.meant(name)
	names := make([]string, len(all))
	for i, m := range all {
		names[i] = m.name
	}
	return names, err
}

// Model returns the model of that name, "" for the only one, for use in this process, which cannot attach to its own.
// It is the Holder's to close: Drop, Sleep and Close wait for whoever is reading it back. The error matches ErrAsleep
// when the model is not in device memory.
func (h *Holder) Model(name string) (*loader.Model, error) {
	m, err := h.find(name)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if m.now == nil {
		return nil, fmt.Errorf("hold: %q is %s: %w", m.name, m.state(), ErrAsleep)
	}
	return m.now.model, nil
}

// find returns the model of that name; "" means the only one.
func (h *Holder) find(name string) (*held, error) {
	m, err := h.reserved(name)
	if err != nil {
		return nil, err
	}
	select {
	case <-m.opened:
		h.mu.Lock()
		defer h.mu.Unlock()
		if m.plan == nil { // opening it has failed since
			return nil, fmt.Errorf("hold: %q: %w", m.name, ErrUnknownModel)
		}
		return m, nil
	default:
		return nil, fmt.Errorf("hold: %q: %w yet: it is being opened", m.name, ErrUnknownModel)
	}
}

// await is find, but waits for a model that is being opened.
func (h *Holder) await(ctx context.Context, name string) (*held, error) {
	m, err := h.reserved(name)
	if err != nil {
		return nil, err
	}
	select {
	case <-m.opened:
		return h.find(m.name)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// names lists the models. h.mu is held.
func (h *Holder) names() string {
	var names []string
	for name := range h.models {
		names = append(names, fmt.Sprintf("%q", name))
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

// Drop frees a model's memory, in all tiers. While processes are attached to it the error matches ErrAttached, as the
// device may be using it. When a device hangs, the memory stays taken until the process ends, and the error is a
// *loader.LeftError; the model is not held any more in this case, too. Of a model that is held in parts all go, or
// none.
func (h *Holder) Drop(name string) error {
	if err := h.unused(name); err != nil {
		return err
	}
	return h.each(name, h.drop)
}

// drop is Drop for one model or part.
func (h *Holder) drop(name string) error {
	m, err := h.find(name)
	if err != nil {
		return err
	}
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	h.mu.Lock()
	attached, dropping := m.attached, m.dropping || h.models[m.name] != m
	if attached == 0 {
		m.dropping = true
	}
	h.mu.Unlock()
	switch {
	case dropping: // by another call, since
		return fmt.Errorf("hold: %q: %w", m.name, ErrUnknownModel)
	case attached > 0:
		return fmt.Errorf("hold: %q: %w, %d of them", m.name, ErrAttached, attached)
	}
	err = h.dissolve(m, true)
	h.forget(m)
	h.log.Info("dropped", "model", m.name)
	h.tell()
	return err
}

// dissolve gives back all that m has. m is being dropped, or the Holder closed. Unless forget is set, a Keeper goes on
// keeping the device memory.
func (h *Holder) dissolve(m *held, forget bool) (err error) {
	h.mu.Lock()
	r, noImage, imaging := m.now, m.noImage, m.imaging
	h.mu.Unlock()
	if noImage != nil {
		noImage()
	}
	if r != nil {
		var forgotten <-chan struct{}
		if forget {
			h.mu.Lock()
			h.promise(r)
			h.mu.Unlock()
			forgotten = h.unkeep(m, r)
		}
		err = h.release(m, r)
		<-r.ended
		h.awaitUnkept(m, forgotten)
	}
	if imaging != nil {
		<-imaging
	}
	h.dropImage(m)
	return errors.Join(err, h.giveBack(m))
}

// giveBack gives back the addresses of m.
func (h *Holder) giveBack(m *held) error {
	err, ended := h.rest().Free("giving addresses back", m.ranges.close)
	if !ended {
		return fmt.Errorf("hold: %w: the addresses of %q cannot be given back", loader.ErrStalled, m.name)
	}
	return err
}

// rest is the time that calls which free something may take.
func (h *Holder) rest() *watch.Limit {
	limit := h.calls.Rest(h.stall())
	if h.loader.Hanging() {
		limit.Spend()
	}
	return limit
}

// stall is how long a call of the runtime may take.
func (h *Holder) stall() time.Duration { return cmp.Or(h.options.Config.Stall, time.Minute) }

// Close waits for calls of Add, ends all loads, and frees all models. Processes that are attached through IPC lose
// their memory, so end Serve first, which lets them go. When a device hangs, the error is, or has in it, a
// *loader.LeftError that says how much memory stays taken, of dropped models, too. Close is idempotent: calls after the
// first return the same error.
func (h *Holder) Close() error {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.end()
	h.closing.Do(func() { h.outcome = h.close() })
	return h.outcome
}

func (h *Holder) close() error {
	h.adding.Wait()
	h.keepers.Wait()
	h.mu.Lock()
	models, left := h.models, leftovers{LeftError: loader.LeftError{DeviceBytes: h.left}}
	h.mu.Unlock()
	for _, m := range models {
		m.turn <- struct{}{} // nobody may wake it any more
		left.add(h.dissolve(m, false))
	}
	h.mu.Lock()
	h.models = make(map[string]*held)
	h.mu.Unlock()
	h.background.Wait()
	if h.pool != nil {
		left.add(h.pool.close())
	}
	left.add(h.loader.Close())
	left.add(leftOfProofs(h.devices))
	return left.err()
}
