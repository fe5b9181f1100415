package hold

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// ErrGone is matched by the errors of an attached model when the process that holds it has ended, has closed the
// connection or does not speak the protocol, and by those of a Client that asked it for something. The memory of a
// model may be gone, too: nothing may use the model's pointers any more.
var ErrGone = errors.New("the process that holds the model is gone")

// AttachOptions says what to attach to. The zero value is the only model of the Holder at the usual place.
type AttachOptions struct {
	Socket string // the Holder's; "": SocketPath
	Model  string // the name that it is held under; "": the only one
	// Rank is whose part to attach to, where a model is held in parts; World is the number of ranks, which has to be
	// right, 0: unknown. Package loader/rank finds out both. What is held whole is for all ranks. Nil: Model names a part,
	// or what is not divided.
	Rank  *int
	World int
	// Devices are open already, and the model's are among them. They stay the caller's, and must stay open until the model
	// is closed. Nil: Attach opens the runtime and the devices, and Close closes them.
	Devices []*amdhip.Device
	// Open opens a runtime of another kind than "hip" that has at least count devices. For the kind "soft" that is
	// soft.OpenRuntime with Options.Shared. Nil: such models are refused. It has no effect with Devices.
	Open func(kind string, count int) (*amdhip.Runtime, error)
	// Stall is how long a call of the runtime may take, and reading back may make no progress, before it is given up
	// with loader.ErrStalled; 0: one minute.
	Stall time.Duration
	// Waiting is told, every two seconds, for whom or what Attach waits: a model that is being loaded, room in device
	// memory, a Holder that is stopped. It is called by another goroutine, one call at a time. Nil: nobody is told.
	Waiting func(what string)

	messageTime, silentTime time.Duration // 0: messageTime and silentTime; other values are for tests
}

// Info says what is attached, and how that came about. Connect, Open and Map follow each other.
type Info struct {
	Name         string // that the model is held under
	Architecture string
	Policy       plan.Policy
	Files        []FileIdentity // that it was loaded from, at least one; see SameFile
	// HF is what the tensors are in Hugging Face's transformers, by their names in the files. Where that is not known
	// it is nil, and HFError says why; that matches plan.ErrUnknownNames.
	HF        map[string][]plan.HFTensor
	HFError   error
	Share     Share  // how this process gets at the memory; with ShareFD it does not depend on the Holder
	FreeBytes uint64 // of the memory of the model's devices together, before the model was mapped

	Connect time.Duration // to the Holder, and hearing what there is
	Open    time.Duration // starting the runtime and the devices in this process, and decoding what is held meanwhile
	Map     time.Duration // opening the model's memory
	Total   time.Duration
}

// Attached is a model that another process holds. It is used as one that this process has loaded. With Info.Share
// ShareIPC its memory is the Holder's: see [loader.Model.Gone] for how to learn that the Holder has ended. With ShareFD
// the memory stays, whatever becomes of the Holder, and Gone is closed only when the load fails or by Close: when the
// Holder ends, the Attached looks for the next one by itself. The caller must Close it.
type Attached struct {
	*loader.Model
	Info Info

	socket      string
	runtime     *amdhip.Runtime // opened for it; nil: the caller's
	feed        *loader.Feed
	ranges      ranges
	messageTime time.Duration
	residence   string
	loaded      bool          // listen only
	stall       time.Duration // AttachOptions.Stall
	calls       watch.Calls   // of the runtime that do not return
	leaving     atomic.Bool   // this side ends the connection
	quit        chan struct{} // closed with that
	ended       chan struct{} // closed when listen has returned
	ending      chan struct{} // closed when the Holder has said that it ends
	endOnce     sync.Once

	mu   sync.Mutex
	conn *net.UnixConn // nil: there is no Holder
}

// Attach maps a model that a Holder keeps, without copying. Attaching while the model is still being loaded works: see
// [loader.Model.Wait]. Errors are *Error for what the Holder answers, *amdhip.Error, those of connecting and of
// AttachOptions.Open, the cause of ctx's end, and what matches ErrGone, or amdhip.ErrNoDevice or
// amdhip.ErrInvalidDevice when this process does not have the model's devices.
func Attach(ctx context.Context, o AttachOptions) (_ *Attached, err error) {
	if o.Stall < 0 {
		return nil, fmt.Errorf("%w: Stall is %v: use a positive time, or 0 for the default", loader.ErrBadOption, o.Stall)
	}
	began := time.Now()
	conn, err := dial(ctx, o.Socket)
	if err != nil {
		return nil, err
	}
	a := &Attached{
		conn: conn, socket: o.Socket, messageTime: o.messageTime, quit: make(chan struct{}), ended: make(chan struct{}),
		ending: make(chan struct{}), stall: cmp.Or(o.Stall, time.Minute),
	}
	if a.messageTime == 0 {
		a.messageTime = messageTime
	}
	limit := a.calls.Limit(a.stall)
	mapping := false // a call that maps memory has not returned
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer func() {
		stop()
		if err != nil && !mapping { // else mapped disconnects
			err = errors.Join(err, a.disconnect())
		}
	}()
	q := request{Op: "attach", Model: o.Model, Rank: o.Rank, World: o.World}
	r, files, err := ask(ctx, conn, q, cmp.Or(o.silentTime, silentTime), a.messageTime, o.Waiting)
	if err != nil {
		return nil, orCause(ctx, err)
	}
	defer func() { closeAll(files) }() // those that are not taken over
	m := r.Manifest
	if m == nil {
		return nil, errors.New("hold: the holder sent no manifest")
	}
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("hold: the holder's manifest: %w", err)
	}
	connected := time.Now()
	var devices []*amdhip.Device
	var failed error
	var opening sync.WaitGroup // while the manifest is decoded
	opening.Go(func() { devices, failed = a.open(ctx, limit, m.Devices, o) })
	p, err := m.plan()
	opening.Wait()
	if err != nil {
		return nil, fmt.Errorf("hold: the holder's manifest: %w", err)
	}
	if failed != nil {
		return nil, failed
	}
	sum := func() (uint64, error) { return freeBytes(devices) }
	free, err := watch.Do(ctx, limit, "asking for free device memory", sum, func(uint64) {})
	if err != nil {
		return nil, err
	}
	opened := time.Now()
	memory, err := a.mapped(ctx, limit, m, devices, files)
	files = nil // it has taken them
	if err != nil {
		mapping = watch.Lost(err)
		return nil, err
	}
	if !stop() {
		_, _ = limit.Free("unmapping memory", func() error { return unmap(memory) })
		return nil, context.Cause(ctx)
	}
	a.Model, a.feed = loader.Adopt(p, devices, memory, o.Stall, a.disconnect)
	a.Info = Info{
		Name: m.Name, Architecture: m.Architecture, Policy: m.Policy, Files: m.Files, Share: m.Share, FreeBytes: free,
		Connect: connected.Sub(began), Open: opened.Sub(connected), Map: time.Since(opened), Total: time.Since(began),
	}
	a.Info.HF, a.Info.HFError = m.namesHF()
	a.residence = m.Residence
	a.take(r)
	go a.listen()
	return a, nil
}

// orCause is err, or the cause of ctx's end where that led to it.
func orCause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// dial connects to a Holder.
func dial(ctx context.Context, socket string) (*net.UnixConn, error) {
	socket, err := socketOrDefault(socket)
	if err != nil {
		return nil, err
	}
	if len(socket) > maxSocketPath {
		return nil, tooLong(socket)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	switch {
	case err != nil && unreachable(err):
		return nil, fmt.Errorf("hold: nobody holds models there: %w", err)
	case err != nil:
		return nil, orCause(ctx, fmt.Errorf("hold: %w", err))
	}
	return conn.(*net.UnixConn), nil
}

// open returns the devices that the manifest names: of the caller's, or of a runtime that it opens.
func (a *Attached) open(ctx context.Context, limit *watch.Limit, named []manifestDevice, o AttachOptions) (
	[]*amdhip.Device, error,
) {
	have, missing := o.Devices, amdhip.ErrInvalidDevice
	if have == nil {
		missing = amdhip.ErrNoDevice
		rt, err := watch.Do(ctx, limit, "opening the runtime", func() (*amdhip.Runtime, error) {
			return openRuntime(named,
				o)
		},
			func(rt *amdhip.Runtime) { _ = rt.Close() })
		if err != nil {
			return nil, err
		}
		a.runtime = rt
		have, err = watch.Do(ctx, limit, "asking for the devices", func() ([]*amdhip.Device, error) { return allDevices(rt) },
			func([]*amdhip.Device) {})
		if err != nil {
			return nil, err
		}
	}
	devices := make([]*amdhip.Device, 0, len(named))
	for i := range named {
		dev := named[i].among(have)
		if dev == nil {
			return nil, fmt.Errorf("hold: the model is on the %s device %.100q (%.100q), which is not among the %d devices here: %w",
				named[i].Kind, named[i].Name, named[i].UUID, len(have), missing)
		}
		devices = append(devices, dev)
	}
	return devices, nil
}

func allDevices(rt *amdhip.Runtime) ([]*amdhip.Device, error) {
	n, err := rt.DeviceCount()
	if err != nil {
		return nil, err
	}
	devices := make([]*amdhip.Device, n)
	for i := range devices {
		if devices[i], err = rt.Device(i); err != nil {
			return nil, err
		}
	}
	return devices, nil
}

// openRuntime opens the runtime that the devices are of.
func openRuntime(named []manifestDevice, o AttachOptions) (*amdhip.Runtime, error) {
	kind, count := named[0].Kind, 0
	for i := range named {
		count = max(count, named[i].Index+1)
	}
	switch {
	case kind == "hip":
		return amdhip.Open(amdhip.Options{})
	case o.Open == nil:
		return nil, fmt.Errorf("hold: the model is on a device of the kind %.100q, and AttachOptions.Open cannot open that: %w", kind,
			amdhip.ErrUnsupported)
	}
	return o.Open(kind, count)
}

// among returns the device that d describes, nil if it is not there. Its number may differ between processes.
func (d *manifestDevice) among(devices []*amdhip.Device) *amdhip.Device {
	for _, dev := range devices {
		if d.Kind == dev.Runtime().Kind() && d.UUID == dev.UUID() && d.PCI == dev.PCIBusID() {
			return dev
		}
	}
	return nil
}

// freeBytes is the free memory of the devices together. Asking makes a runtime start the devices, which it may have put
// off.
func freeBytes(devices []*amdhip.Device) (sum uint64, err error) {
	for _, dev := range devices {
		free, _, err := dev.MemInfo()
		if err != nil {
			return 0, err
		}
		sum += free
	}
	return sum, nil
}

// mapped maps the model's memory within the limit. When a call does not return, the connection stays open until it
// does, and until what it has mapped is unmapped: while the connection is open, the Holder does not free the memory. It
// closes the files that it does not take over.
func (a *Attached) mapped(ctx context.Context, limit *watch.Limit, m *manifest, devices []*amdhip.Device,
	files []*os.File,
) ([][]loader.Mapping, error) {
	over := make(chan struct{}) // nothing is mapped, or ever will be
	memory, err := watch.Do(ctx, limit, "mapping the model's memory", func() (memory [][]loader.Mapping, err error) {
		defer func() { closeAll(files) }()
		if m.Share == ShareFD {
			memory, err = a.mapDescriptors(m, devices, &files)
		} else {
			memory, err = mapMemory(m.Allocations, devices)
		}
		if err != nil {
			defer close(over)
			return nil, errors.Join(err, unmap(memory))
		}
		return memory, nil
	}, func(memory [][]loader.Mapping) {
		defer close(over)
		_ = unmap(memory)
	})
	if watch.Lost(err) {
		go func() {
			<-over
			_ = a.disconnect()
		}()
	}
	return memory, err
}

// listen hears from the Holder which tensors have arrived, how the load ended, and at last that the Holder is gone.
// Where the memory stays without it, it then looks for the next one.
func (a *Attached) listen() {
	defer close(a.ended)
	for {
		err := a.hear()
		switch said, _ := errors.AsType[*Error](err); {
		case a.leaving.Load():
			err = loader.ErrClosed
		case a.Info.Share == ShareFD && a.loaded: // whatever the Holder said, the memory is there
			if a.rejoin() {
				continue
			}
			err = loader.ErrClosed
		case said != nil:
		default:
			err = fmt.Errorf("hold: %w: %w", ErrGone, err)
		}
		a.feed.Lose(err)
		return
	}
}

// hear takes what the Holder says until the connection ends, or the Holder says that the load has failed.
func (a *Attached) hear() error {
	a.mu.Lock()
	conn := a.conn
	a.mu.Unlock()
	for {
		var r reply
		files, err := receive(context.Background(), conn, &r, 0, a.messageTime)
		closeAll(files)
		if err == nil {
			err = r.err()
		}
		if err != nil {
			return err
		}
		a.take(&r)
	}
}

// take passes on what the Holder says.
func (a *Attached) take(r *reply) {
	a.feed.Arrived(r.Ready)
	if r.Loaded {
		a.loaded = true
		a.feed.Loaded()
	}
	if r.Ending {
		a.endOnce.Do(func() { close(a.ending) })
	}
}

// Ending returns a channel that is closed when the Holder has said that it is about to end. Models that it shares by
// IPC handles should be closed then: it waits for that, but not for ever.
func (a *Attached) Ending() <-chan struct{} { return a.ending }

// Alone reports whether the Holder has ended, and no other has taken over yet. The model can be used all the same.
func (a *Attached) Alone() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.conn == nil
}

// Close unmaps the memory, tells the Holder, and closes the runtime if Attach has opened it. It waits for whoever is
// reading the model back. Pointers into the model die. When a device hangs, the memory stays mapped and the connection
// open, so that the Holder does not free it, and the error is a *loader.LeftError. Close is idempotent: calls after the
// first return the same error.
func (a *Attached) Close() error {
	err := a.Model.Close()
	if a.leaving.Load() {
		<-a.ended // Gone is closed
	}
	return err
}

// disconnect ends the connection, and closes what was opened. Until then the Holder does not free the memory, so that
// it must be unmapped before.
func (a *Attached) disconnect() error {
	a.leaving.Store(true)
	close(a.quit)
	err, ended := a.calls.Rest(a.stall).Free("giving addresses back", a.ranges.close)
	if !ended {
		err = fmt.Errorf("hold: %w: addresses of the model cannot be given back", loader.ErrStalled)
	}
	a.mu.Lock()
	if a.conn != nil {
		err = errors.Join(err, a.conn.Close())
	}
	a.mu.Unlock()
	if a.runtime != nil {
		err = errors.Join(err, a.runtime.Close())
	}
	return err
}
