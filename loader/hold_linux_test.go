package loader

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// testHolder is a Holder on a software device of its own, which stands for another process, and its socket.
type testHolder struct {
	*Holder
	soft   *amdhip.Software
	socket string
	stop   func() // ends serving, without grace
}

// hold starts a Holder and fails the test when it leaves anything.
func hold(t *testing.T, o HolderOptions, soft amdhip.SoftwareOptions) *testHolder {
	t.Helper()
	soft.Shared = true
	dev, _ := openDevice(t, soft)
	if o.Load.Chunk == 0 {
		o.Load.Chunk, o.Load.Staging, o.Load.Threads, o.Load.Streams = tight.Chunk, tight.Staging, tight.Threads, tight.Streams
	}
	return holdOn(t, dev, o)
}

// holdOn is hold for a device that is open.
func holdOn(t *testing.T, dev *amdhip.Device, o HolderOptions) *testHolder {
	t.Helper()
	h := &testHolder{Holder: NewHolder(dev, o), soft: dev.Runtime().Software(), socket: filepath.Join(t.TempDir(), "s")}
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
	h.stop = func() { cancel(); <-served }
	t.Cleanup(func() {
		h.stop()
		if err := errors.Join(h.Close(), remove(), h.Close()); err != nil {
			t.Error(err)
		}
	})
	return h
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

// attach attaches and closes the model in the end.
func (h *testHolder) attach(t *testing.T, name string) *Model {
	t.Helper()
	w, err := Attach(t.Context(), h.socket, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mustClose(t, w) })
	return w
}

// eventually waits until a condition comes about that others bring about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 2000 {
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

func TestAttach(t *testing.T) {
	for _, d := range []DType{Raw, F16, F32} {
		t.Run(d.String(), func(t *testing.T) {
			o := tight
			o.DType = d
			h := hold(t, HolderOptions{Load: o}, amdhip.SoftwareOptions{}).with(t, "", sample)
			before := h.soft.Stats()
			w := h.attach(t, "")
			m := openModel(t, sample)
			plan, err := NewPlan(m, o)
			if err != nil {
				t.Fatal(err)
			}
			same(t, plan, contents(t, w), wanted(t, m, o))

			held, err := h.Model("tiny-llama")
			if err != nil {
				t.Fatal(err)
			}
			theirs, ours := held.Tensors(), w.Tensors()
			for i := range ours {
				one, err := w.Tensor(ours[i].Name)
				if err != nil || !cmp.Equal(one, ours[i]) {
					t.Errorf("%+v, %v", one, err)
				}
				if ours[i].Ptr%deviceAlign != 0 {
					t.Errorf("%s is at %#x", ours[i].Name, ours[i].Ptr)
				}
				theirs[i].Ptr, ours[i].Ptr = 0, 0
			}
			if diff := cmp.Diff(theirs, ours); diff != "" {
				t.Error(diff)
			}
			if err := errors.Join(w.WaitAll(t.Context()), w.Wait(t.Context(), ours[0].Name)); err != nil {
				t.Error(err)
			}
			if err := w.Verify(t.Context()); err == nil {
				t.Error("verified without a file")
			}
			if err := errors.Join(w.Use(m), w.Verify(t.Context())); err != nil {
				t.Error(err)
			}
			a, ok := w.Attachment()
			if !ok || a.Name != "tiny-llama" || a.DType != d || a.Architecture != "llama" || len(a.Files) != 1 ||
				a.Files[0].Size != int64(m.Size()) || len(a.Files[0].HeaderSHA256) != 64 || a.FreeBytes == 0 || a.Open <= 0 {
				t.Errorf("attachment %+v, %v", a, ok)
			}
			if _, ok := held.Attachment(); ok || held.Gone() != nil {
				t.Error("the Holder's own model is attached")
			}
			if s := w.Device().Runtime().Software().Stats(); s.Allocations != 0 || s.IPCMappings != 1 {
				t.Errorf("the attached side has %+v", s)
			}
			if s := h.soft.Stats(); s.Allocations != before.Allocations || s.DeviceBytes != before.DeviceBytes {
				t.Errorf("the Holder has %+v, before that %+v", s, before)
			}
			if r := w.Report(); r.DeviceBytes != held.Report().DeviceBytes || r.Tensors != len(ours) || r.ReadBytes != held.Report().ReadBytes {
				t.Errorf("report %+v", r)
			}
			mustClose(t, w)
			if _, err := w.Tensor(ours[0].Name); !errors.Is(err, ErrClosed) {
				t.Errorf("after Close: %v", err)
			}
			if err := w.Wait(t.Context(), ours[0].Name); !errors.Is(err, ErrClosed) {
				t.Errorf("after Close: %v", err)
			}
			if err := w.Verify(t.Context()); !errors.Is(err, ErrClosed) || w.Tensors() != nil {
				t.Errorf("after Close: %v", err)
			}
			<-w.Gone()
			h.wantAttached(t, 0)
		})
	}
}

// TestHolderModel uses a model in the process that holds it: its file is closed, so verifying it needs another.
func TestHolderModel(t *testing.T) {
	h := hold(t, HolderOptions{}, amdhip.SoftwareOptions{}).with(t, "x", sample)
	w, err := h.Model("")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Verify(t.Context()); err == nil {
		t.Error("verified without a file")
	}
	if err := errors.Join(w.Use(openModel(t, sample)), w.Verify(t.Context())); err != nil {
		t.Error(err)
	}
	if _, err := AttachTo(t.Context(), h.dev, h.socket, "x"); !errors.Is(err, amdhip.ErrInvalidContext) {
		t.Errorf("attached to its own memory: %v", err)
	}
	h.wantAttached(t, 0)
}

// TestAttachWhileOpening attaches to a model whose memory is not there yet: that waits for what becomes of it.
func TestAttachWhileOpening(t *testing.T) {
	h := hold(t, HolderOptions{}, amdhip.SoftwareOptions{})
	for _, comes := range []bool{false, true} {
		m, err := newHeld("", sample)
		if err == nil {
			err = h.reserve(m)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(second(h.Model("")), h.Drop(m.name)); !errors.Is(err, ErrUnknownModel) || !strings.Contains(err.Error(), "being opened") {
			t.Errorf("a model that is being opened: %v", err)
		}
		if got := h.Models(); len(got) != 0 {
			t.Errorf("listed are %+v", got)
		}
		soon, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if _, err := Attach(soon, h.socket, ""); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("did not wait: %v", err)
		}
		cancel()
		attached := make(chan error)
		var w *Model
		go func() {
			var err error
			w, err = Attach(t.Context(), h.socket, m.name)
			attached <- err
		}()
		if comes { // another one takes its place, as if it had been opened
			h.with(t, "x", sample)
			h.mu.Lock()
			opened := h.models["x"]
			delete(h.models, "x")
			opened.name = m.name
			h.models[m.name] = opened
			h.mu.Unlock()
		} else {
			h.forget(m)
		}
		close(m.opened)
		switch err := <-attached; {
		case !comes && !errors.Is(err, ErrUnknownModel):
			t.Errorf("attached to what came to nothing: %v", err)
		case comes && err != nil:
			t.Error(err)
		case comes:
			mustClose(t, w)
		}
	}
}

// stalled adds a model whose load stands still in the middle, until the Software's ClearFaults.
func (h *testHolder) stalled(t *testing.T, code amdhip.Status) {
	t.Helper()
	h.soft.Inject(amdhip.Fault{Func: "hipMemcpyAsync", N: 12, Stall: true, Code: code})
	if _, err := h.Add(t.Context(), "", sample); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the load stands still", func() bool { return h.soft.Calls()["hipMemcpyAsync"] >= 12 })
}

// TestAttachWhileLoading attaches when some tensors have arrived and others cannot, yet.
func TestAttachWhileLoading(t *testing.T) {
	o := tight
	o.DType = Raw
	h := hold(t, HolderOptions{Load: o}, amdhip.SoftwareOptions{Poison: true})
	h.stalled(t, amdhip.Success)
	w := h.attach(t, "")
	all := w.Tensors()
	first, last := all[0].Name, all[len(all)-1].Name
	if err := w.Wait(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	stream, err := w.Device().NewStream()
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if err := w.WaitStream(t.Context(), stream, first); err != nil {
		t.Error(err)
	}
	soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := errors.Join(w.Wait(soon, last), w.WaitStream(soon, stream, last), w.WaitAll(soon)); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("what has not arrived: %v", err)
	}
	if m := h.Models()[0]; m.State != "loading" || m.Attached != 1 {
		t.Errorf("listed as %+v", m)
	}
	if err := h.Drop(""); !errors.Is(err, ErrAttached) {
		t.Errorf("dropped: %v", err)
	}
	other := h.attach(t, "") // that closes before the end
	mustClose(t, other)
	if err := other.WaitAll(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	h.soft.ClearFaults()
	if err := errors.Join(w.WaitStream(t.Context(), stream, last), w.Wait(t.Context(), last), w.WaitAll(t.Context())); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Use(openModel(t, sample)), w.Verify(t.Context())); err != nil {
		t.Error(err)
	}
	if err := h.Wait(t.Context(), ""); err != nil {
		t.Error(err)
	}
}

// TestLoadFailsWhileAttached: the attached side is told why, and the memory stays as long as it may have it mapped.
func TestLoadFailsWhileAttached(t *testing.T) {
	h := hold(t, HolderOptions{}, amdhip.SoftwareOptions{})
	h.stalled(t, amdhip.ErrIllegalAddress)
	w := h.attach(t, "")
	last := w.Tensors()[len(w.Tensors())-1].Name
	h.soft.ClearFaults()
	<-w.Gone()
	for what, err := range map[string]error{
		"Wait": w.Wait(t.Context(), last), "WaitAll": w.WaitAll(t.Context()), "Verify": w.WriteSafetensors(t.Context(), discard{}),
		"Tensor": second(w.Tensor(last)),
	} {
		if _, ok := errors.AsType[*HolderError](err); !ok || !strings.Contains(err.Error(), "hipErrorIllegalAddress") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := h.Wait(t.Context(), ""); !errors.Is(err, amdhip.ErrIllegalAddress) {
		t.Errorf("the Holder: %v", err)
	}
	if n := h.soft.Stats().Allocations; n != 1 {
		t.Errorf("%d allocations while a process has the memory mapped", n)
	}
	if _, err := Attach(t.Context(), h.socket, ""); err == nil || !strings.Contains(err.Error(), "could not be loaded") {
		t.Errorf("attached to what failed: %v", err)
	}
	if m := h.Models()[0]; m.State != "failed" || !strings.Contains(m.Error, "hipErrorIllegalAddress") || m.Bytes == 0 {
		t.Errorf("listed as %+v", m)
	}
	mustClose(t, w)
	eventually(t, "the memory is free", func() bool { return h.soft.Stats().Allocations == 0 })
	if m := h.Models()[0]; m.Bytes != 0 {
		t.Errorf("listed as %+v", m)
	}
	if err := h.Drop(""); err != nil || len(h.Models()) != 0 {
		t.Errorf("dropping what failed: %v, %+v", err, h.Models())
	}
}

func second[T any](_ T, err error) error { return err }

// TestHolderGone ends the Holder while a process is attached, one while it waits.
func TestHolderGone(t *testing.T) {
	h := hold(t, HolderOptions{}, amdhip.SoftwareOptions{})
	h.stalled(t, amdhip.Success)
	w := h.attach(t, "")
	all := w.Tensors()
	waiting := make(chan error, 1)
	go func() { waiting <- w.Wait(context.Background(), all[len(all)-1].Name) }()
	h.stop()
	<-w.Gone()
	for what, err := range map[string]error{
		"a wait that was going on": <-waiting, "Wait": w.Wait(t.Context(), all[0].Name), "WaitAll": w.WaitAll(t.Context()),
		"Tensor": second(w.Tensor(all[0].Name)), "WriteSafetensors": w.WriteSafetensors(t.Context(), discard{}),
	} {
		if !errors.Is(err, ErrHolderGone) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if w.Tensors() != nil {
		t.Error("there are still tensors")
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if err := w.WaitAll(t.Context()); !errors.Is(err, ErrHolderGone) {
		t.Errorf("after Close: %v", err)
	}
	if _, err := Attach(t.Context(), h.socket, ""); err == nil || !strings.Contains(err.Error(), "nobody holds models") {
		t.Errorf("attached to nobody: %v", err)
	}
	h.soft.ClearFaults()
}

// TestGrace serves attached processes to their end after the Holder was told to end, and no new ones.
func TestGrace(t *testing.T) {
	dev, _ := openDevice(t, amdhip.SoftwareOptions{Shared: true})
	h := NewHolder(dev, HolderOptions{Load: tight})
	defer h.Close()
	socket := filepath.Join(t.TempDir(), "s")
	l, remove, err := Listen(socket, false)
	if err != nil {
		t.Fatal(err)
	}
	defer remove()
	ctx, end := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- h.Serve(ctx, l, time.Hour) }()
	if _, err := h.Add(ctx, "", sample); err != nil {
		t.Fatal(err)
	}
	w, err := Attach(t.Context(), socket, "")
	if err != nil {
		t.Fatal(err)
	}
	end()
	eventually(t, "nobody is let in", func() bool { _, err := Attach(t.Context(), socket, ""); return err != nil })
	if err := errors.Join(w.WaitAll(t.Context()), w.Use(openModel(t, sample)), w.Verify(t.Context())); err != nil {
		t.Errorf("in the grace time: %v", err)
	}
	select {
	case err := <-served:
		t.Fatalf("ended under an attached process: %v", err)
	default:
	}
	mustClose(t, w)
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestHolderClosed(t *testing.T) {
	h := hold(t, HolderOptions{}, amdhip.SoftwareOptions{})
	h.stalled(t, amdhip.Success)
	w := h.attach(t, "")
	done := make(chan error)
	go func() { done <- h.Close() }()
	<-time.After(time.Millisecond)
	h.soft.ClearFaults()
	if err := <-done; err != nil {
		t.Error(err)
	}
	<-w.Gone()
	if err := w.WaitAll(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("the attached side: %v", err)
	}
	_, add := h.Add(t.Context(), "", sample)
	_, attach := Attach(t.Context(), h.socket, "")
	for what, err := range map[string]error{"Add": add, "Attach": attach, "Drop": h.Drop(""), "Wait": h.Wait(t.Context(), "")} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if len(h.Models()) != 0 {
		t.Error("there are models")
	}
}

func TestUse(t *testing.T) {
	h := hold(t, HolderOptions{}, amdhip.SoftwareOptions{}).with(t, "", sample)
	w := h.attach(t, "")
	other := openModel(t, sparse(t, 2, 256))
	if err := w.Use(other); !errors.Is(err, ErrMismatch) {
		t.Errorf("another file: %v", err)
	}
	b, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-40000] ^= 1
	changed := filepath.Join(t.TempDir(), "changed.gguf")
	if err := os.WriteFile(changed, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.Use(openModel(t, changed)); err != nil {
		t.Errorf("a file with the same header: %v", err)
	}
	if _, ok := errors.AsType[*MismatchError](w.Verify(t.Context())); !ok {
		t.Error("a file with another tensor is the same")
	}
	loaded, err := Load(t.Context(), w.Device(), other, tight)
	if err != nil {
		t.Fatal(err)
	}
	defer loaded.Close()
	if err := loaded.Use(other); err == nil {
		t.Error("a model that has its file took another")
	}
}

func TestMetrics(t *testing.T) {
	h := hold(t, HolderOptions{LinkBytesPerSecond: 1e12}, amdhip.SoftwareOptions{}).with(t, `a "b" \c`, sample)
	h.attach(t, "")
	var b bytes.Buffer
	if err := h.WriteMetrics(&b); err != nil {
		t.Fatal(err)
	}
	sampleLine := regexp.MustCompile(`^[a-z0-9_]+(\{model="([^"\\\n]|\\["\\n])*",dtype="[a-z0-9]+"\})? [0-9.e+-]+$`)
	var names []string
	for line := range strings.Lines(b.String()) {
		line = strings.TrimSuffix(line, "\n")
		name, _, _ := strings.Cut(line, "{")
		name, _, _ = strings.Cut(name, " ")
		switch {
		case strings.HasPrefix(line, "# HELP "):
		case strings.HasPrefix(line, "# TYPE "):
			names = append(names, strings.Fields(line)[2])
		case !sampleLine.MatchString(line) || name != names[len(names)-1]:
			t.Errorf("line %q", line)
		}
	}
	for _, name := range []string{"models", "model_loaded", "model_device_bytes", "model_attached", "model_load_seconds", "model_link_efficiency",
		"attachments_total", "refused_total", "link_bytes_per_second"} {
		if !slices.Contains(names, "gguf2gpu_"+name) {
			t.Errorf("no %s", name)
		}
	}
	for _, line := range []string{"gguf2gpu_models 1\n", `gguf2gpu_model_attached{model="a \"b\" \\c",dtype="f16"} 1` + "\n", "gguf2gpu_attachments_total 1\n"} {
		if !strings.Contains(b.String(), line) {
			t.Errorf("no %s in\n%s", line, &b)
		}
	}
}
