package loader

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// ErrHolderGone is matched by the errors of a model that is attached when the process that holds it has ended, or has closed the
// connection. The memory may be gone with it: nothing may use the model's pointers any more.
var ErrHolderGone = errors.New("the process that holds the model is gone")

// Attachment says how a model came to be attached. The durations follow each other.
type Attachment struct {
	Name         string // that the model is held under
	Architecture string
	DType        DType
	Files        []FileIdentity // that it was loaded from
	FreeBytes    uint64         // of the device's memory, before the model was mapped

	Connect time.Duration // to the Holder, and hearing what there is
	Open    time.Duration // starting the runtime and the device in this process
	Map     time.Duration // opening the model's memory
}

// attachment is what an attached Model has besides its memory.
type attachment struct {
	Attachment
	conn    *net.UnixConn
	rt      *amdhip.Runtime // opened for it; nil: the caller's
	leaving atomic.Bool     // this side ends the connection
	gone    chan struct{}   // closed when nothing comes from the Holder any more
	err     error           // why; valid once gone is closed

	// Of the goroutine that listens, and before there is one.

	arrived int // tensors, from the first on
	loaded  bool
}

// Attach maps a model that a Holder keeps, without copying: the result is used like one of Load, and its memory is the Holder's.
// socket is the Holder's, "" for that of SocketPath; model is the name it is held under, "" for the only one. Attach opens the
// runtime and the device itself, and Close closes them. Attaching while the model is still being loaded works: see
// [Model.Wait]. Errors: *HolderError, *amdhip.Error, what matches amdhip.ErrNoDevice when this process does not see the model's
// device, ErrHolderGone, those of connecting, and the cause of ctx's end.
func Attach(ctx context.Context, socket, model string) (*Model, error) {
	return AttachTo(ctx, nil, socket, model)
}

// AttachTo is Attach for a device that is open already. It must be the one that the model is on.
func AttachTo(ctx context.Context, dev *amdhip.Device, socket, model string) (_ *Model, err error) {
	began := time.Now()
	conn, err := dial(ctx, socket)
	if err != nil {
		return nil, err
	}
	a := &attachment{conn: conn, gone: make(chan struct{})}
	w := &Model{attached: a, finished: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer func() {
		stop()
		if err != nil {
			err = errors.Join(err, w.free(), a.close())
		}
	}()
	r, err := ask(conn, request{Op: "attach", Model: model})
	if err != nil {
		return nil, orCause(ctx, err)
	}
	if r.Manifest == nil {
		return nil, errors.New("loader: the Holder sent no manifest")
	}
	plan, err := r.Manifest.plan()
	if err != nil {
		return nil, fmt.Errorf("loader: the Holder's manifest: %w", err)
	}
	connected := time.Now()
	if dev == nil {
		if a.rt, dev, err = openHolders(&r.Manifest.Device); err != nil {
			return nil, err
		}
	} else if err := r.Manifest.Device.same(dev); err != nil {
		return nil, err
	}
	free, _, err := dev.MemInfo() // it also makes the runtime start the device, which some put off until it is needed
	if err != nil {
		return nil, err
	}
	opened := time.Now()
	if err := w.mapArenas(dev, plan, r.Manifest); err != nil {
		return nil, err
	}
	a.Attachment = Attachment{
		Name: r.Manifest.Name, Architecture: r.Manifest.Architecture, DType: plan.opts.DType, Files: r.Manifest.Files,
		FreeBytes: free, Connect: connected.Sub(began), Open: opened.Sub(connected), Map: time.Since(opened),
	}
	w.files = r.Manifest.Files
	w.report = Report{
		Tensors: len(plan.Tensors), ReadBytes: plan.ReadBytes, DeviceBytes: plan.DeviceBytes, Plan: a.Connect, Alloc: a.Map,
		Total: time.Since(began),
	}
	if !stop() {
		return nil, context.Cause(ctx)
	}
	if err := w.hear(r); err != nil {
		return nil, err
	}
	go w.listen()
	return w, nil
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
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("loader: nobody holds models there ('gguf2gpu hold' does): %w", err)
	case err != nil:
		return nil, orCause(ctx, fmt.Errorf("loader: %w", err))
	}
	return conn.(*net.UnixConn), nil
}

// ask sends a request and returns the first reply.
func ask(conn *net.UnixConn, r request) (*reply, error) {
	r.Version = wireVersion
	if err := writeMessage(conn, r); err != nil && !errors.Is(err, syscall.EPIPE) { // else the Holder has said why it does not listen
		return nil, fmt.Errorf("loader: %w", err)
	}
	var answer reply
	if err := readMessage(conn, &answer, maxReply); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			err = fmt.Errorf("loader: %w: %w", ErrHolderGone, err)
		}
		return nil, err
	}
	return &answer, answer.err()
}

// openHolders opens the device that d describes.
func openHolders(d *manifestDevice) (rt *amdhip.Runtime, dev *amdhip.Device, err error) {
	switch d.Kind {
	case "soft":
		rt, err = amdhip.OpenSoftware(amdhip.SoftwareOptions{Devices: d.Index + 1, Shared: true})
	case "hip":
		rt, err = amdhip.Open(amdhip.Options{})
	default:
		err = fmt.Errorf("loader: the Holder's runtime is of an unknown kind %q", d.Kind)
	}
	if err != nil {
		return nil, nil, err
	}
	n, err := rt.DeviceCount()
	for i := 0; err == nil && i < n; i++ {
		if dev, err = rt.Device(i); err == nil && d.same(dev) == nil {
			return rt, dev, nil
		}
	}
	if err == nil {
		err = fmt.Errorf("loader: this process does not see the device that the model is on, %s (%s): %w", d.Name, d.UUID, amdhip.ErrNoDevice)
	}
	return nil, nil, errors.Join(err, rt.Close())
}

// same reports whether dev is the device that d describes. Its number may differ between processes.
func (d *manifestDevice) same(dev *amdhip.Device) error {
	if d.Kind == dev.Runtime().Kind() && d.UUID == dev.UUID() && d.PCI == dev.PCIBusID() {
		return nil
	}
	return fmt.Errorf("loader: the model is on %s %s (%s), not on %s %s (%s): %w", d.Kind, d.Name, d.UUID,
		dev.Runtime().Kind(), dev.Name(), dev.UUID(), amdhip.ErrInvalidDevice)
}

// mapArenas opens the Holder's allocations.
func (w *Model) mapArenas(dev *amdhip.Device, plan *Plan, m *manifest) error {
	w.dev, w.plan, w.index = dev, plan, make(map[string]int, len(plan.Tensors))
	for i := range plan.Tensors {
		w.index[plan.Tensors[i].Name] = i
	}
	for i := range m.Arenas {
		var h amdhip.IPCHandle
		if err := h.UnmarshalBinary(m.Arenas[i].Handle); err != nil {
			return err
		}
		mem, err := dev.OpenIPC(h)
		if errors.Is(err, amdhip.ErrInvalidContext) {
			return fmt.Errorf("loader: a process cannot attach to a model that it holds itself (see Holder.Model): %w", err)
		}
		if err != nil {
			return fmt.Errorf("loader: allocation %d of the Holder's %d: %w", i+1, len(m.Arenas), err)
		}
		w.arenas = append(w.arenas, arena{mem: mem, ptr: mem.Ptr()})
	}
	w.ready.expect(len(plan.Tensors))
	w.issued.expect(len(plan.Tensors))
	return nil
}

// listen hears from the Holder which tensors have arrived, how the load ended, and at last that the Holder is gone.
func (w *Model) listen() {
	a := w.attached
	for {
		var r reply
		err := readMessage(a.conn, &r, maxReply)
		switch {
		case err == nil:
			err = w.hear(&r)
		case a.leaving.Load():
			err = ErrClosed
		default:
			err = fmt.Errorf("loader: %w: %w", ErrHolderGone, err)
		}
		if err != nil {
			a.err = err
			close(a.gone)
			if !a.loaded {
				close(w.finished)
			}
			return
		}
	}
}

// hear takes in what the Holder says: how many tensors have arrived, that all have, or why they never will.
func (w *Model) hear(r *reply) error {
	if err := r.err(); err != nil {
		return err
	}
	a := w.attached
	n := min(r.Ready, len(w.plan.Tensors))
	if r.Loaded {
		n = len(w.plan.Tensors)
	}
	for ; a.arrived < n; a.arrived++ {
		w.issued.passTensor(a.arrived)
		w.ready.passTensor(a.arrived)
	}
	if r.Loaded && !a.loaded {
		a.loaded = true
		close(w.finished)
	}
	return nil
}

// lost is why an attached model must not be used any more; nil while it may, and for a model that is not attached.
func (a *attachment) lost() error {
	if a == nil {
		return nil
	}
	select {
	case <-a.gone:
		return a.err
	default:
		return nil
	}
}

// Gone returns a channel that is closed when the process that holds the model has gone, or has failed to load it, or when the
// model is closed; nil for a model of Load, which depends on nobody. From then on the model's methods return an error that
// matches ErrHolderGone or says why the load failed, and its pointers must not be used. The model is still to be closed.
func (w *Model) Gone() <-chan struct{} {
	if w.attached == nil {
		return nil
	}
	return w.attached.gone
}

// Attachment says how the model was attached. It is false for a model of Load.
func (w *Model) Attachment() (Attachment, bool) {
	if w.attached == nil {
		return Attachment{}, false
	}
	return w.attached.Attachment, true
}

// Use lets a model whose file is not open (one that is attached, or a Holder's) be compared with its file, m: see Verify. The
// error matches ErrMismatch when m has another size or another header than what was loaded; whether its tensors are the same is
// for Verify to say. m must stay open as long as the model is used.
func (w *Model) Use(m *gguf.Model) error {
	if w.files == nil {
		return errors.New("loader: the model has its file")
	}
	files, err := identify(m)
	if err != nil {
		return err
	}
	if len(files) != len(w.files) {
		return fmt.Errorf("loader: %d files, the model was loaded from %d: %w", len(files), len(w.files), ErrMismatch)
	}
	for i, f := range files {
		if was := w.files[i]; f.Size != was.Size || f.HeaderSHA256 != was.HeaderSHA256 {
			return fmt.Errorf("loader: %s is not, or not any more, what was loaded: %w", f.Path, ErrMismatch)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.plan.Tensors {
		t := &w.plan.Tensors[i]
		x, ok := m.Tensor(t.Name)
		if !ok || x.Type != t.Type || x.Size != t.Size {
			return fmt.Errorf("loader: tensor %q is not in the file as it was loaded: %w", t.Name, ErrMismatch)
		}
		t.Tensor = x
	}
	w.plan.model = m
	return nil
}

// detach is Close for an attached model. It unmaps the memory and only then tells the Holder, which may free it from then on.
func (w *Model) detach() error {
	w.mu.Lock() // after reads back have ended
	defer w.mu.Unlock()
	if w.closed {
		return nil
	}
	w.closed = true
	if w.stuck.Load() { // the device may still read the memory, so the Holder must not free it before this process has ended
		return nil
	}
	err := w.free()
	w.attached.leaving.Store(true)
	err = errors.Join(err, w.attached.close())
	<-w.attached.gone
	return err
}

// close ends the connection and gives back what was opened for the attachment.
func (a *attachment) close() error {
	err := a.conn.Close()
	if a.rt != nil {
		err = errors.Join(err, a.rt.Close())
	}
	return err
}
