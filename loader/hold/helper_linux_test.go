package hold

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// tight is a pipeline with as little staging memory as there can be, so that every buffer is used again and again.
func tight() loader.Config {
	return loader.Config{Chunk: 64 << 10, Staging: 3 * 64 << 10, Threads: 4, Streams: 3}
}

// openSoft opens a software machine of its own, whose memory others can map, and fails the test when anything is left
// on it.
func openSoft(t *testing.T, o soft.Options) (*amdhip.Runtime, []*amdhip.Device) {
	t.Helper()
	o.Shared = true
	rt, err := soft.OpenRuntime(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		wantNothing(t, rt)
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
	var devices []*amdhip.Device
	for i := range max(1, o.Devices) {
		dev, err := rt.Device(i)
		if err != nil {
			t.Fatal(err)
		}
		devices = append(devices, dev)
	}
	return rt, devices
}

// wantNothing fails the test when something is left on a machine.
func wantNothing(t *testing.T, rt *amdhip.Runtime) {
	t.Helper()
	s := soft.Of(rt).Stats()
	left := s.Allocations + s.HostAllocations + s.Registrations + s.Streams + s.Events + s.IPCMappings + s.Modules +
		s.Physical +
		s.Mappings + s.Reservations
	if left != 0 {
		t.Errorf("left on the device: %+v", s)
	}
}

// testHolder is a Holder on a software machine of its own, which stands for another process, and its socket.
type testHolder struct {
	*Holder
	soft   *soft.Software
	socket string
	stop   func() // ends Serve, without grace
}

// hold starts a Holder and fails the test when it leaves anything.
func hold(t *testing.T, o Options, machine soft.Options) *testHolder {
	t.Helper()
	_, devices := openSoft(t, machine)
	return holdOn(t, devices, o)
}

// holdAt is hold at a socket that was another Holder's.
func holdAt(t *testing.T, socket string, o Options, machine soft.Options) *testHolder {
	t.Helper()
	_, devices := openSoft(t, machine)
	return serving(t, devices, socket, o)
}

// holdOn is hold for devices that are open.
func holdOn(t *testing.T, devices []*amdhip.Device, o Options) *testHolder {
	t.Helper()
	return serving(t, devices, socketIn(t), o)
}

// serving is hold for devices that are open, at a socket.
func serving(t *testing.T, devices []*amdhip.Device, socket string, o Options) *testHolder {
	t.Helper()
	if o.Config.Chunk == 0 {
		o.Config = tight()
		o.Config.Staging *= int64(len(devices))
	}
	if o.Share == ShareAuto { // tests of descriptors say so
		o.Share = ShareIPC
	}
	made, err := New(devices, o)
	if err != nil {
		t.Fatal(err)
	}
	h := &testHolder{Holder: made, soft: soft.Of(devices[0].Runtime()), socket: socket}
	l, remove, err := Listen(h.socket, false)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan struct{})
	go func() {
		defer close(served)
		if err := h.Serve(ctx, l, 0); err != nil {
			t.Error(err)
		}
	}()
	h.stop = func() { cancel(); <-served; remove() }
	t.Cleanup(func() {
		h.stop()
		if err := errors.Join(h.Close(), remove(), h.Close()); err != nil {
			t.Error(err)
		}
	})
	return h
}

// socketIn is the path of a socket in a directory of its own, short enough whatever the test is called.
func socketIn(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hold")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// with adds a model and waits until it is loaded.
func (h *testHolder) with(t *testing.T, name, path string) *testHolder {
	t.Helper()
	if _, err := h.Add(t.Context(), name, path); err != nil {
		t.Fatal(err)
	}
	if err := h.Wait(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	return h
}

// to are the options that attach to a model. Each attachment has a software machine of its own, as in another process;
// with the last one's Close nothing may be left on it.
func (h *testHolder) to(t *testing.T, name string) AttachOptions {
	return AttachOptions{Socket: h.socket, Model: name, Open: opener(t)}
}

// opener opens software machines as AttachOptions.Open. What is left on them after the test is an error.
func opener(t *testing.T) func(string, int) (*amdhip.Runtime, error) {
	return func(kind string, count int) (*amdhip.Runtime, error) {
		if kind != "soft" {
			return nil, fmt.Errorf("there is no kind %q", kind)
		}
		rt, err := soft.OpenRuntime(soft.Options{Devices: count, Shared: true})
		if err == nil {
			t.Cleanup(func() { wantNothing(t, rt) })
		}
		return rt, err
	}
}

// attach attaches and closes the model in the end.
func (h *testHolder) attach(t *testing.T, name string) *Attached {
	t.Helper()
	a, err := Attach(t.Context(), h.to(t, name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mustClose(t, a) })
	return a
}

func mustClose(t *testing.T, a *Attached) {
	t.Helper()
	if err := a.Close(); err != nil {
		t.Error(err)
	}
}

// eventually waits until a condition comes about that another goroutine brings about over a socket.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 4000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("it never came about: %s", what)
}

func (h *testHolder) wantAttached(t *testing.T, n int) {
	t.Helper()
	eventually(t, "the number of attached processes", func() bool { return h.Models()[0].Attached == n })
}

// stalled adds a model whose load stands still in the middle, until the Software's ClearFaults.
func (h *testHolder) stalled(t *testing.T, code amdhip.Status) {
	t.Helper()
	h.soft.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 12, Stall: true, Code: code})
	if _, err := h.Add(t.Context(), "", sample); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the load stands still", func() bool { return h.soft.Calls()["hipMemcpyAsync"] >= 12 })
}

// place is one copy of a tensor.
type place struct {
	device int // number in the plan
	name   string
}

// contents reads all tensors back from all devices that they are on.
func contents(t *testing.T, m *loader.Model) map[place][]byte {
	t.Helper()
	number := make(map[*amdhip.Device]int)
	for i, dev := range m.Devices() {
		number[dev] = i
	}
	var mu sync.Mutex
	got := make(map[place][]byte)
	err := m.ReadBack(t.Context(), loader.ReadOptions{EveryCopy: true}, func() func(loader.Piece) error {
		return func(p loader.Piece) error {
			mu.Lock()
			defer mu.Unlock()
			at := place{number[p.Device], p.Tensor.Name}
			if got[at] == nil {
				got[at] = make([]byte, p.Tensor.Bytes)
			}
			copy(got[at][p.Offset:], p.Bytes)
			return nil
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// wanted is what contents should find: what the generic kernels make of the file, or the file's own bytes.
func wanted(t *testing.T, f *gguf.File, p *plan.Plan) map[place][]byte {
	t.Helper()
	k, err := kernels.For(kernels.Generic)
	if err != nil {
		t.Fatal(err)
	}
	want := make(map[place][]byte)
	for i := range p.Groups {
		for j := range p.Groups[i].Tensors {
			x := &p.Groups[i].Tensors[j]
			whole, ok := f.Tensor(x.Name)
			if !ok || x.Slice != nil {
				t.Fatalf("tensor %q", x.Name)
			}
			b := bytes.Clone(f.Data(whole))
			if x.Target != x.Type {
				b = make([]byte, x.Bytes)
				if err := k.Dequantize(b, x.Target, f.Data(whole), x.Type); err != nil {
					t.Fatal(err)
				}
			}
			for _, d := range p.Groups[i].Devices {
				want[place{d, x.Name}] = b
			}
		}
	}
	return want
}

// wantContents compares what is on the devices with the file.
func wantContents(t *testing.T, m *loader.Model, f *gguf.File) {
	t.Helper()
	got, want := contents(t, m), wanted(t, f, m.Plan())
	if len(got) != len(want) || len(want) == 0 {
		t.Errorf("%d tensors, want %d", len(got), len(want))
	}
	for at, b := range want {
		if !bytes.Equal(got[at], b) {
			t.Errorf("%s on device %d differs", at.name, at.device)
		}
	}
}

// second is the second of two results.
func second[T any](_ T, err error) error { return err }
