package loader

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// ErrHolderGone is matched by the errors of a model that is attached when the process that holds it has ended, or has closed the
// connection. The memory may be gone with it: nothing may use the model's pointers any more.
var ErrHolderGone = errors.New("the process that holds the model is gone")

// SocketPath is where a Holder of this user listens unless told otherwise: gguf2gpu.sock in the user's runtime directory, or
// in a directory of the user's own under the temporary one where there is none.
func SocketPath() string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "gguf2gpu.sock")
	}
	uid := strconv.Itoa(os.Getuid())
	if dir := filepath.Join("/run/user", uid); isDir(dir) {
		return filepath.Join(dir, "gguf2gpu.sock")
	}
	return filepath.Join(os.TempDir(), "gguf2gpu-"+uid, "gguf2gpu.sock")
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// attachment is what an attached Model has besides its memory.
type attachment struct {
	conn  *net.UnixConn
	rt    *amdhip.Runtime // opened for it; nil: the caller's
	files []FileIdentity
	gone  chan struct{} // closed when the Holder is
	ended chan struct{} // the goroutine that listens to the Holder has
}

// Attach maps a model that a Holder keeps, without copying: the result is used like one of Load, and its memory is the Holder's.
// socket is the Holder's, "" for that of SocketPath; model is the name it is held under, "" for the only one. Attach opens the
// runtime and the device itself, and Close closes them. Attaching while the model is still being loaded works: see
// [Model.Wait]. Errors: *HolderError, *amdhip.Error, ErrHolderGone, those of connecting, and the cause of ctx's end.
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
	a := &attachment{conn: conn, gone: make(chan struct{}), ended: make(chan struct{})}
	w := &Model{attached: a, finished: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.free(), a.close())
		}
	}()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })()
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
	planned := time.Now()
	if dev == nil {
		if a.rt, dev, err = openHolders(&r.Manifest.Device); err != nil {
			return nil, err
		}
	}
	opened := time.Now()
	if err := r.Manifest.Device.same(dev); err != nil {
		return nil, err
	}
	a.files = r.Manifest.Files
	if err := w.mapArenas(dev, plan, r.Manifest); err != nil {
		return nil, err
	}
	w.report = Report{
		Tensors: len(plan.Tensors), DeviceBytes: plan.DeviceBytes, Plan: planned.Sub(began), Alloc: time.Since(opened),
		Total: time.Since(began),
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
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
	if socket == "" {
		socket = SocketPath()
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("loader: nobody holds models there ('gguf2gpu hold' does): %w", err)
	}
	return conn.(*net.UnixConn), nil
}

// ask sends a request and returns the first reply.
func ask(conn *net.UnixConn, r request) (*reply, error) {
	r.Version = wireVersion
	if err := writeMessage(conn, r); err != nil {
		return nil, err
	}
	var answer reply
	if err := readMessage(conn, &answer, maxReply); err != nil {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("%w: %w", ErrHolderGone, err)
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
		err = fmt.Errorf("loader: this process does not see device %s (%s) that the model is on: %w", d.UUID, d.Name, amdhip.ErrInvalidDevice)
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
		if err != nil {
			return err
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
	defer close(a.ended)
	loaded, passed := false, 0
	for {
		var r reply
		err := readMessage(a.conn, &r, maxReply)
		if err != nil {
			err = fmt.Errorf("loader: %w: %w", ErrHolderGone, err)
		} else {
			err = r.err()
		}
		w.mu.Lock()
		if err != nil {
			w.err = err
			w.mu.Unlock()
			if !loaded {
				close(w.finished)
			}
			close(a.gone)
			return
		}
		w.mu.Unlock()
		for ; passed < min(r.Ready, len(w.plan.Tensors)); passed++ {
			w.issued.passTensor(passed)
			w.ready.passTensor(passed)
		}
		if r.Loaded && !loaded {
			loaded = true
			close(w.finished)
		}
	}
}

// Gone returns a channel that is closed when the process that holds the model has gone, or has failed to load it; nil for a
// model of Load, which depends on nobody. From then on the model's methods return an error that matches ErrHolderGone or says
// why the load failed, and its pointers must not be used.
func (w *Model) Gone() <-chan struct{} {
	if w.attached == nil {
		return nil
	}
	return w.attached.gone
}

// Files tells which files the model was loaded from, for a model that is attached; nil for a model of Load.
func (w *Model) Files() []FileIdentity {
	if w.attached == nil {
		return nil
	}
	return w.attached.files
}

// Use lets an attached model be compared with its file, m: see Verify. The error matches ErrMismatch when m is not what was
// loaded, or has changed since. m must stay open as long as the model is used.
func (w *Model) Use(m *gguf.Model) error {
	if w.attached == nil {
		return errors.New("loader: the model is not attached")
	}
	files, err := identify(m)
	if err != nil {
		return err
	}
	if len(files) != len(w.attached.files) {
		return fmt.Errorf("loader: %d files, the model was loaded from %d: %w", len(files), len(w.attached.files), ErrMismatch)
	}
	for i, f := range files {
		if was := w.attached.files[i]; f.Size != was.Size || f.ModTime != was.ModTime || f.HeaderSHA256 != was.HeaderSHA256 {
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

// hangUp ends the connection and waits until nobody listens any more.
func (a *attachment) hangUp() {
	_ = a.conn.Close() // it may be closed already
	<-a.ended
}

// close gives back what was opened for the attachment.
func (a *attachment) close() error {
	_ = a.conn.Close()
	if a.rt == nil {
		return nil
	}
	return a.rt.Close()
}
