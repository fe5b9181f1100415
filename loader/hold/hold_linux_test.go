package hold

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/readback"
)

func TestAttach(t *testing.T) {
	t.Parallel()
	for _, policy := range plan.Policies() {
		t.Run(policy.String(), func(t *testing.T) {
			t.Parallel()
			h := hold(t, Options{Spec: plan.Spec{Policy: policy}}, soft.Options{}).with(t, "", sample)
			before := h.soft.Stats()
			a := h.attach(t, "")
			f := openFile(t, sample)
			wantContents(t, a.Model, f)
			held, err := h.Model("tiny-llama")
			if err != nil {
				t.Fatal(err)
			}
			wantSameTensors(t, held, a.Model)
			all := a.Tensors()
			if err := errors.Join(a.WaitAll(t.Context()), a.Wait(t.Context(), all[0].Name)); err != nil {
				t.Error(err)
			}
			i := a.Info
			if i.Name != "tiny-llama" || i.Policy != policy || i.Architecture != "llama" || len(i.Files) != 1 ||
				i.Files[0].Size != int64(f.Size()) || i.FreeBytes == 0 || i.Open <= 0 || i.Total < i.Connect+i.Open+i.Map {
				t.Errorf("%+v", i)
			}
			if err := SameFile(i.Files, f); err != nil {
				t.Error(err)
			}
			r, err := readback.Verify(t.Context(), a.Model, f)
			if err != nil || r.Tensors != len(all) || r.Of != len(f.Tensors()) {
				t.Errorf("verified %v, %v", r, err)
			}
			if held.Gone() != nil {
				t.Error("the Holder's own model may go")
			}
			if s := soft.Of(a.Devices()[0].Runtime()).Stats(); s.Allocations != 0 || s.IPCMappings != 1 {
				t.Errorf("the attached side has %+v", s)
			}
			if s := h.soft.Stats(); s.Allocations != before.Allocations || s.DeviceBytes != before.DeviceBytes {
				t.Errorf("the Holder has %+v, before that %+v", s, before)
			}
			ours, theirs := a.Report(), held.Report()
			if ours.DeviceBytes != theirs.DeviceBytes || ours.Tensors != len(all) || ours.ReadBytes != theirs.ReadBytes ||
				ours.ModelTensors != theirs.ModelTensors || ours.FileBytes != theirs.FileBytes {
				t.Errorf("report %+v, the Holder's %+v", ours, theirs)
			}
		})
	}
}

// wantSameTensors wants two models to have the same tensors, on devices of the same numbers.
func wantSameTensors(t *testing.T, theirs, ours *loader.Model) {
	t.Helper()
	got, want := ours.Tensors(), theirs.Tensors()
	for i := range got {
		if one, err := ours.Tensor(got[i].Name); err != nil || one.Ptr != got[i].Ptr {
			t.Errorf("%+v, %v", one, err)
		}
		if got[i].Ptr%plan.Align != 0 {
			t.Errorf("%s is at %#x", got[i].Name, got[i].Ptr)
		}
		if i < len(want) && got[i].Device.Index() != want[i].Device.Index() {
			t.Errorf("%s is on device %d, the Holder's on device %d", got[i].Name, got[i].Device.Index(), want[i].Device.Index())
		}
		got[i].Ptr, got[i].Device = 0, nil
	}
	for i := range want {
		want[i].Ptr, want[i].Device = 0, nil
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestAttachClosed: after Close every method says ErrClosed, whatever the Holder does.
func TestAttachClosed(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{}, soft.Options{Devices: 2}).with(t, "", sample)
	a := h.attach(t, "")
	name := a.Tensors()[0].Name
	stream, err := h.devices[0].NewStream()
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	mustClose(t, a)
	<-a.Gone()
	_, read := readback.Verify(t.Context(), a.Model, openFile(t, sample))
	for what, err := range map[string]error{
		"Wait": a.Wait(t.Context(), name), "WaitAll": a.WaitAll(t.Context()), "Tensor": second(a.Tensor(name)), "Verify": read,
		"Allocations": second(a.Allocations()),
	} {
		if !errors.Is(err, loader.ErrClosed) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if a.Tensors() != nil {
		t.Error("there are still tensors")
	}
	h.wantAttached(t, 0)
}

// TestHolderModel uses a model in the process that holds it. That process cannot attach to it.
func TestHolderModel(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{}, soft.Options{}).with(t, "x", sample)
	m, err := h.Model("")
	if err != nil {
		t.Fatal(err)
	}
	wantContents(t, m, openFile(t, sample))
	_, err = Attach(t.Context(), AttachOptions{Socket: h.socket, Devices: h.devices})
	if !errors.Is(err, amdhip.ErrInvalidContext) {
		t.Errorf("attached to its own memory: %v", err)
	}
	if _, err := Attach(t.Context(), AttachOptions{Socket: h.socket}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("without a way to open the runtime: %v", err)
	}
	h.wantAttached(t, 0)
}

// TestAttachWhileOpening attaches to a model whose memory is not there yet: that waits for what becomes of it.
func TestAttachWhileOpening(t *testing.T) {
	t.Parallel()
	garbage := filepath.Join(t.TempDir(), "tiny-llama.gguf")
	if err := os.WriteFile(garbage, make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	opening, goOn := make(chan struct{}), make(chan struct{})
	h := hold(t, Options{opened: func() { close(opening); <-goOn }}, soft.Options{})
	added := make(chan error)
	go func() { added <- second(h.Add(t.Context(), "", sample)) }()
	<-opening
	if err := second(h.Add(t.Context(), "", garbage)); !errors.Is(err, ErrModelExists) {
		t.Fatalf("the name is taken: %v", err)
	}
	for what, err := range map[string]error{"Model": second(h.Model("")), "Drop": h.Drop("tiny-llama")} {
		if !errors.Is(err, ErrUnknownModel) || !strings.Contains(err.Error(), "being opened") {
			t.Errorf("%s of what is being opened: %v", what, err)
		}
	}
	if got := h.Models(); len(got) != 0 {
		t.Errorf("listed are %+v", got)
	}
	soon, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := Attach(soon, h.to(t, "")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("did not wait: %v", err)
	}
	attached := make(chan error)
	var a *Attached
	go func() {
		var err error
		a, err = Attach(t.Context(), h.to(t, "tiny-llama"))
		attached <- err
	}()
	close(goOn)
	if err := errors.Join(<-added, <-attached); err != nil {
		t.Fatal(err)
	}
	wantContents(t, a.Model, openFile(t, sample))
	mustClose(t, a)
}

// TestAttachToNothing attaches to a model that comes to nothing while it is being opened.
func TestAttachToNothing(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{}, soft.Options{})
	m, err := newHeld("m", sample, false)
	if err == nil {
		_, err = h.reserve(m)
	}
	if err != nil {
		t.Fatal(err)
	}
	attached := make(chan error)
	go func() { attached <- second(Attach(t.Context(), h.to(t, "m"))) }()
	h.forget(m)
	close(m.opened)
	h.adding.Done()
	if err := <-attached; !errors.Is(err, ErrUnknownModel) {
		t.Errorf("attached: %v", err)
	}
}

// TestAttachWhileLoading attaches when some tensors have arrived and others cannot yet.
func TestAttachWhileLoading(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{Spec: plan.Spec{Policy: plan.Raw}}, soft.Options{Poison: true})
	h.stalled(t, amdhip.Success)
	a := h.attach(t, "")
	all := a.Tensors()
	first, last := "", all[len(all)-1].Name
	eventually(t, "a tensor arrives", func() bool { // which one is first differs, as several are copied at a time
		i := slices.IndexFunc(all, func(x loader.Tensor) bool {
			soon, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
			defer cancel()
			return a.Wait(soon, x.Name) == nil
		})
		if i >= 0 {
			first = all[i].Name
		}
		return i >= 0
	})
	stream, err := a.Devices()[0].NewStream()
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if err := a.WaitStream(t.Context(), stream, first); err != nil {
		t.Error(err)
	}
	soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	for what, err := range map[string]error{
		"Wait": a.Wait(soon, last), "WaitStream": a.WaitStream(soon, stream, last), "WaitAll": a.WaitAll(soon),
	} {
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s for what has not arrived: %v", what, err)
		}
	}
	if m := h.Models()[0]; m.State != "loading" || m.Attached != 1 || m.Bytes == 0 || m.Tensors != len(all) {
		t.Errorf("listed as %+v", m)
	}
	if err := h.Drop(""); !errors.Is(err, ErrAttached) {
		t.Errorf("dropped: %v", err)
	}
	other := h.attach(t, "") // that closes before the end
	mustClose(t, other)
	if err := other.WaitAll(t.Context()); !errors.Is(err, loader.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	h.soft.ClearFaults()
	ctx := t.Context()
	if err := errors.Join(a.WaitStream(ctx, stream, last), a.Wait(ctx, last), a.WaitAll(ctx)); err != nil {
		t.Fatal(err)
	}
	wantContents(t, a.Model, openFile(t, sample))
	if err := h.Wait(t.Context(), ""); err != nil {
		t.Error(err)
	}
}

// TestLoadFailsWhileAttached: the attached side is told why, and the memory stays as long as it may have it mapped.
func TestLoadFailsWhileAttached(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{}, soft.Options{})
	h.stalled(t, amdhip.ErrIllegalAddress)
	a := h.attach(t, "")
	last := a.Tensors()[len(a.Tensors())-1].Name
	h.soft.ClearFaults()
	<-a.Gone()
	_, read := readback.Verify(t.Context(), a.Model, openFile(t, sample))
	for what, err := range map[string]error{
		"Wait": a.Wait(t.Context(), last), "WaitAll": a.WaitAll(t.Context()), "Verify": read, "Tensor": second(a.Tensor(last)),
	} {
		if _, ok := errors.AsType[*Error](err); !ok || !strings.Contains(err.Error(), "hipErrorIllegalAddress") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := h.Wait(t.Context(), ""); !errors.Is(err, amdhip.ErrIllegalAddress) {
		t.Errorf("the Holder: %v", err)
	}
	if n := h.soft.Stats().Allocations; n != 1 {
		t.Errorf("%d allocations while a process has the memory mapped", n)
	}
	if _, err := Attach(t.Context(), h.to(t, "")); err == nil || !strings.Contains(err.Error(), "could not be loaded") {
		t.Errorf("attached to what failed: %v", err)
	}
	if m := h.Models()[0]; m.State != "failed" || !strings.Contains(m.Error, "hipErrorIllegalAddress") || m.Bytes == 0 {
		t.Errorf("listed as %+v", m)
	}
	mustClose(t, a)
	eventually(t, "the memory is free", func() bool { return h.Models()[0].Bytes == 0 })
	if n := h.soft.Stats().Allocations; n != 0 {
		t.Errorf("%d allocations", n)
	}
	if err := h.Drop(""); err != nil || len(h.Models()) != 0 {
		t.Errorf("dropping what failed: %v, %+v", err, h.Models())
	}
}

// TestHolderGone ends the Holder while a process is attached, and waits.
func TestHolderGone(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{}, soft.Options{})
	h.stalled(t, amdhip.Success)
	a := h.attach(t, "")
	all := a.Tensors()
	waiting := make(chan error, 1)
	go func() { waiting <- a.Wait(context.Background(), all[len(all)-1].Name) }()
	h.stop()
	<-a.Gone()
	_, read := readback.Verify(t.Context(), a.Model, openFile(t, sample))
	for what, err := range map[string]error{
		"a wait that was going on": <-waiting, "Wait": a.Wait(t.Context(), all[0].Name), "WaitAll": a.WaitAll(t.Context()),
		"Tensor": second(a.Tensor(all[0].Name)), "Verify": read,
	} {
		if !errors.Is(err, ErrGone) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if a.Tensors() != nil {
		t.Error("there are still tensors")
	}
	mustClose(t, a)
	if err := a.WaitAll(t.Context()); !errors.Is(err, loader.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if _, err := Attach(t.Context(), h.to(t, "")); err == nil || !strings.Contains(err.Error(), "nobody holds models") {
		t.Errorf("attached to nobody: %v", err)
	}
	h.soft.ClearFaults()
}

// TestGrace serves attached processes to their end after the Holder was told to end, and no new ones.
func TestGrace(t *testing.T) {
	t.Parallel()
	_, devices := openSoft(t, soft.Options{})
	h, err := New(devices, Options{Config: tight(), Share: ShareIPC})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	to := AttachOptions{Socket: socketIn(t), Open: opener(t)}
	l, remove, err := Listen(to.Socket, false)
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
	a, err := Attach(t.Context(), to)
	if err != nil {
		t.Fatal(err)
	}
	end()
	eventually(t, "nobody is let in", func() bool {
		other, err := Attach(t.Context(), to)
		if err == nil {
			mustClose(t, other)
		}
		return err != nil
	})
	wantContents(t, a.Model, openFile(t, sample))
	select {
	case err := <-served:
		t.Fatalf("ended under an attached process: %v", err)
	default:
	}
	mustClose(t, a)
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestHolderClosed(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{}, soft.Options{})
	h.stalled(t, amdhip.Success)
	a := h.attach(t, "")
	done := make(chan error)
	go func() { done <- h.Close() }()
	<-time.After(time.Millisecond)
	h.soft.ClearFaults()
	if err := <-done; err != nil {
		t.Error(err)
	}
	<-a.Gone()
	if err := a.WaitAll(t.Context()); !errors.Is(err, ErrGone) || errors.Is(err, loader.ErrClosed) {
		t.Errorf("the attached side: %v", err)
	}
	for what, err := range map[string]error{
		"Add": second(h.Add(t.Context(), "", sample)), "Drop": h.Drop(""), "Wait": h.Wait(t.Context(), ""), "Model": second(h.Model("")),
	} {
		if !errors.Is(err, loader.ErrClosed) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := Attach(t.Context(), h.to(t, "")); !errors.Is(err, ErrGone) {
		t.Errorf("Attach: %v", err)
	}
	if len(h.Models()) != 0 {
		t.Error("there are models")
	}
}

func TestSameFile(t *testing.T) {
	t.Parallel()
	files, err := identify(openFile(t, sample), "")
	if err != nil {
		t.Fatal(err)
	}
	for what, other := range map[string]string{
		"another file": "../../testdata/gguf/all-types.gguf", "a file in another format": "../../testdata/gguf/v2.gguf",
	} {
		if err := SameFile(files, openFile(t, other)); !errors.Is(err, ErrOtherFile) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, files := range map[string][]FileIdentity{"no file": nil, "two files": append(files[:1:1], files[0])} {
		if err := SameFile(files, openFile(t, sample)); !errors.Is(err, ErrOtherFile) {
			t.Errorf("%s: %v", what, err)
		}
	}
	b, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-40000] ^= 1 // in a tensor
	changed := filepath.Join(t.TempDir(), "changed.gguf")
	if err := os.WriteFile(changed, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := SameFile(files, openFile(t, changed)); err != nil {
		t.Errorf("a file with the same header: %v", err)
	}
	h := hold(t, Options{}, soft.Options{}).with(t, "", sample)
	a := h.attach(t, "")
	if _, err := readback.Verify(t.Context(), a.Model, openFile(t, changed)); !errors.Is(err, readback.ErrMismatch) {
		t.Errorf("a file with another tensor: %v", err)
	}
}
