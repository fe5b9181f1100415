package hold

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader"
)

// TestReaderFreezesNothing reads a model back in the process that holds it, and frees it meanwhile: with Drop, or as
// nobody should, behind the Holder's back. That waits for the reader; all else goes on.
func TestReaderFreezesNothing(t *testing.T) {
	t.Parallel()
	for what, free := range map[string]func(*Holder, *loader.Model) error{
		"Drop":  func(h *Holder, _ *loader.Model) error { return h.Drop("read") },
		"Close": func(_ *Holder, m *loader.Model) error { return m.Close() },
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			h := hold(t, Options{}, soft.Options{}).with(t, "read", sample).with(t, "other", sample)
			m, err := h.Model("read")
			if err != nil {
				t.Fatal(err)
			}
			goOn, read, freed := make(chan struct{}), make(chan error, 1), make(chan error, 1)
			go func() { read <- readSlowly(m, goOn) }()
			<-goOn
			go func() { freed <- free(h.Holder, m) }()
			eventually(t, "it is being freed", func() bool {
				_, err := m.Tensor("output.weight")
				return errors.Is(err, loader.ErrClosed)
			})
			h.wantAlive(t)
			if what == "Drop" {
				if _, err := Attach(t.Context(), h.to(t, "read")); !errors.Is(err, ErrUnknownModel) {
					t.Errorf("attached to what is being dropped: %v", err)
				}
			}
			select {
			case err := <-freed:
				t.Errorf("freed under a reader: %v", err)
			default:
			}
			goOn <- struct{}{}
			if err := errors.Join(<-read, <-freed); err != nil {
				t.Error(err)
			}
		})
	}
}

// readSlowly reads m back. It sends on goOn when it has begun, and goes on when it receives from it.
func readSlowly(m *loader.Model, goOn chan struct{}) error {
	var begin sync.Once
	return m.ReadBack(context.Background(), loader.ReadOptions{}, func() func(loader.Piece) error {
		return func(loader.Piece) error {
			begin.Do(func() {
				goOn <- struct{}{}
				<-goOn
			})
			return nil
		}
	})
}

// wantAlive wants a Holder of a model "other" to list, to add, to tell its metrics and to let a process attach.
func (h *testHolder) wantAlive(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second) // ends the test if something freezes
	defer cancel()
	c := Client{Socket: h.socket}
	if models, err := c.List(ctx); err != nil || len(models) == 0 {
		t.Errorf("%+v, %v", models, err)
	}
	a, err := Attach(ctx, h.to(t, "other"))
	if err != nil {
		t.Fatal(err)
	}
	wantContents(t, a.Model, openFile(t, sample))
	mustClose(t, a)
	if _, err := c.Add(ctx, AddRequest{Path: sample, Name: "third"}); err != nil {
		t.Error(err)
	}
	var metrics bytes.Buffer
	if err := h.WriteMetrics(&metrics); err != nil || !bytes.Contains(metrics.Bytes(), []byte(`model="other"`)) {
		t.Errorf("%v, %s", err, &metrics)
	}
}

// bubble runs a test on a clock of its own, with a Holder that serves no socket.
func bubble(t *testing.T, o Options, test func(t *testing.T, h *Holder, machine *soft.Software)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		rt, err := soft.OpenRuntime(soft.Options{Shared: true})
		if err != nil {
			t.Fatal(err)
		}
		defer rt.Close()
		dev, err := rt.Device(0)
		if err != nil {
			t.Fatal(err)
		}
		o.Config = tight()
		h, err := New([]*amdhip.Device{dev}, o)
		if err != nil {
			t.Fatal(err)
		}
		test(t, h, soft.Of(rt))
	})
}

// TestCloseWaitsForAdd closes a Holder while a model is being opened: when Close has returned, nothing is left on the
// device, and nothing comes later.
func TestCloseWaitsForAdd(t *testing.T) {
	goOn := make(chan chan struct{}, 1)
	bubble(t, Options{opened: func() { <-<-goOn }}, func(t *testing.T, h *Holder, machine *soft.Software) {
		opening := make(chan struct{})
		goOn <- opening
		added, closed := make(chan error, 1), make(chan error, 1)
		go func() { added <- second(h.Add(t.Context(), "", sample)) }()
		synctest.Wait()
		go func() { closed <- h.Close() }()
		synctest.Wait()
		select {
		case err := <-closed:
			t.Errorf("Close returned, with %v, while a model is being added", err)
		default:
		}
		if err := second(h.Add(t.Context(), "late", sample)); !errors.Is(err, loader.ErrClosed) {
			t.Errorf("one more: %v", err)
		}
		close(opening)
		if err := <-added; !errors.Is(err, loader.ErrClosed) {
			t.Errorf("it was added: %v", err)
		}
		if err := errors.Join(<-closed, h.Close()); err != nil {
			t.Error(err)
		}
		if s := machine.Stats(); s.Allocations+s.HostAllocations+s.Registrations+s.Streams+s.Events != 0 {
			t.Errorf("left on the device: %+v", s)
		}
	})
}

// TestStalled lets a copy of a load never end. What stays of it is listed, and is said by Drop and Close.
func TestStalled(t *testing.T) {
	for _, drop := range []bool{true, false} {
		t.Run(map[bool]string{true: "dropped", false: "held"}[drop], func(t *testing.T) {
			bubble(t, Options{}, func(t *testing.T, h *Holder, machine *soft.Software) {
				machine.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 12, Stall: true})
				name, err := h.Add(t.Context(), "", sample)
				if err != nil {
					t.Fatal(err)
				}
				bytes := machine.Stats().DeviceBytes
				if err := h.Wait(t.Context(), name); !errors.Is(err, loader.ErrStalled) {
					t.Errorf("the load: %v", err)
				}
				if m := h.Models()[0]; m.State != "failed" || m.Bytes == 0 {
					t.Errorf("listed as %+v", m)
				}
				if drop {
					e, ok := errors.AsType[*loader.LeftError](h.Drop(name))
					if !ok || e.DeviceBytes == 0 || e.DeviceBytes > bytes {
						t.Errorf("Drop: %+v", e)
					}
					if len(h.Models()) != 0 {
						t.Error("it is held still")
					}
				}
				for range 2 {
					e, ok := errors.AsType[*loader.LeftError](h.Close())
					if !ok || e.DeviceBytes == 0 || e.DeviceBytes > bytes || e.HostBytes == 0 {
						t.Errorf("Close: %+v", e)
					}
				}
				machine.ClearFaults()
			})
		})
	}
}

// TestLeftovers sums up what is left over errors of all shapes.
func TestLeftovers(t *testing.T) {
	t.Parallel()
	other := errors.New("another")
	var l leftovers
	l.add(nil)
	l.add(&loader.LeftError{DeviceBytes: 1})
	joined := errors.Join(&loader.LeftError{DeviceBytes: 2, HostBytes: 4}, other)
	l.add(errors.Join(joined, &loader.LeftError{HostBytes: 8}))
	err := l.err()
	e, ok := errors.AsType[*loader.LeftError](err)
	if !ok || e.DeviceBytes != 3 || e.HostBytes != 12 || !errors.Is(err, other) {
		t.Errorf("%+v, %v", e, err)
	}
	if err := new(leftovers).err(); err != nil {
		t.Error(err)
	}
}
