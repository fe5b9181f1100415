package hold

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// keeping starts a keeper, and returns its client.
func keeping(t *testing.T) KeeperClient {
	t.Helper()
	socket := socketIn(t)
	l, remove, err := Listen(socket, false)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- ServeKeeper(ctx, l, nil) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-ended, remove()); err != nil {
			t.Error(err)
		}
	})
	return KeeperClient{Socket: socket}
}

// fileInMemory is a descriptor of something that is no device memory.
func fileInMemory(text string) (*os.File, error) {
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "test")
	_, err = f.WriteString(text)
	return f, err
}

// again starts another Holder at h's socket, which stands for a new process; h is ended before.
func (h *testHolder) again(t *testing.T, o Options) *testHolder {
	t.Helper()
	h.stop()
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	next := holdAt(t, h.socket, o, soft.Options{Devices: len(h.devices)})
	return next
}

func wantKept(t *testing.T, k Keeper, n int) {
	t.Helper()
	eventually(t, "so many models are kept", func() bool {
		all, err := k.Kept(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range all {
			closeAll(x.Files)
		}
		return len(all) == n
	})
}

// TestAdopt ends a Holder under attached processes, three times. They go on with the model as it was, attach to the
// next Holder by themselves, and that has the model without copying a byte, also where the file is gone; it can put it
// to sleep and wake it.
func TestAdopt(t *testing.T) {
	t.Parallel()
	for _, by := range []plan.SplitBy{plan.SplitLayers, plan.SplitNone} {
		t.Run(by.String(), func(t *testing.T) {
			t.Parallel()
			k := keeping(t)
			o := Options{
				Share: ShareFD, Keep: k, RAM: 64 << 20, slabBytes: slab,
				Spec: plan.Spec{Policy: plan.Raw, Split: plan.Split{By: by}, Rules: []plan.Rule{rule(t, "attn=f32")}},
			}
			path := copies(t, 1)[0]
			f := openFile(t, sample)
			h := hold(t, o, soft.Options{Devices: 2}).with(t, "m", path)
			wantKept(t, k, 1)
			a, b := h.attach(t, "m"), h.attach(t, "m")
			at := a.Tensors()[0].Ptr
			for i := range 3 {
				if h = h.again(t, o); i == 2 {
					if err := os.Remove(path); err != nil {
						t.Fatal(err)
					}
				}
				names, err := h.Adopt(t.Context())
				if err != nil || !slices.Equal(names, []string{"m"}) {
					t.Fatalf("adopted %v, %v", names, err)
				}
				if s := h.soft.Stats(); s.DeviceBytes != 0 || s.Mappings == 0 { // what is mapped is of the first
					t.Errorf("round %d: the new holder has %+v", i, s)
				}
				eventually(t, "both are attached", func() bool { return h.model(t, "m").Attached == 2 })
				for _, x := range []*Attached{a, b} {
					wantContents(t, x.Model, f)
					if x.Alone() || x.Tensors()[0].Ptr != at {
						t.Errorf("round %d: alone %v, at %#x, before at %#x", i, x.Alone(), x.Tensors()[0].Ptr, at)
					}
				}
				c := h.attach(t, "m")
				wantContents(t, c.Model, f)
				mustClose(t, c)
				if name, err := h.Add(t.Context(), "m", path); err != nil || name != "m" {
					t.Errorf("to add it again: %q, %v", name, err)
				}
				if m := h.wantState(t, "m", stateResident, i < 2); !m.Adopted {
					t.Errorf("%+v", m)
				}
			}
			mustClose(t, a)
			mustClose(t, b)
			h.wantAttached(t, 0)
			if err := h.Sleep(t.Context(), "m"); err != nil {
				t.Error(err)
			}
			wantKept(t, k, 0)
			if err := h.Wake(t.Context(), "m"); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("woken from a file that is gone: %v", err)
			}
		})
	}
}

func rule(t *testing.T, text string) (r plan.Rule) {
	t.Helper()
	if err := r.UnmarshalText([]byte(text)); err != nil {
		t.Fatal(err)
	}
	return r
}

// TestAdoptAndWake: an adopted model gets an image of its file, and is woken from it.
func TestAdoptAndWake(t *testing.T) {
	t.Parallel()
	k := keeping(t)
	o := Options{Share: ShareFD, Keep: k, RAM: 64 << 20, slabBytes: slab, Spec: plan.Spec{Policy: plan.F16}}
	h := hold(t, o, soft.Options{}).with(t, "", sample)
	wantKept(t, k, 1)
	h = h.again(t, o)
	if _, err := h.Adopt(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.wantState(t, "tiny-llama", stateResident, true)
	if err := errors.Join(h.Sleep(t.Context(), ""), h.Wake(t.Context(), "")); err != nil {
		t.Fatal(err)
	}
	m, err := h.Model("")
	if err != nil {
		t.Fatal(err)
	}
	wantContents(t, m, openFile(t, sample))
	wantKept(t, k, 1)
	o.Spec.Policy = plan.Raw // something else is wanted now
	h = h.again(t, o)
	if _, err := h.Adopt(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.with(t, "", sample)
	if m := h.wantState(t, "tiny-llama", stateResident, true); m.Policy != plan.Raw || m.Adopted {
		t.Errorf("%+v", m)
	}
	if err := h.Drop(""); err != nil {
		t.Fatal(err)
	}
	wantKept(t, k, 0)
}

// TestAdoptRefuses gives a new Holder what is kept with something wrong with it. It is given up, and nothing is left.
func TestAdoptRefuses(t *testing.T) {
	t.Parallel()
	k := keeping(t)
	o := Options{Share: ShareFD, Keep: k, Spec: plan.Spec{Policy: plan.Raw}}
	hold(t, o, soft.Options{}).with(t, "m", sample)
	wantKept(t, k, 1)
	all, err := k.Kept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	good := all[0]
	defer closeAll(good.Files)
	other, err := fileInMemory("no memory")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := k.Forget(t.Context(), good.ID); err != nil {
		t.Fatal(err)
	}
	edited := func(old, new string) Kept {
		b := bytes.ReplaceAll(good.Description, []byte(old), []byte(new))
		if bytes.Equal(b, good.Description) || !json.Valid(b) {
			t.Fatalf("%s is not in %.300s", old, good.Description)
		}
		return Kept{ID: good.ID, Description: b, Files: good.Files}
	}
	for what, bad := range map[string]Kept{
		"no JSON object":       {good.ID, []byte(`[]`), good.Files},
		"no manifest":          {good.ID, []byte(`{"version":3}`), good.Files},
		"another version":      edited(`{"version":3`, `{"version":2`),
		"another name":         {"x", good.Description, good.Files},
		"two descriptors":      {good.ID, good.Description, append(slices.Clone(good.Files), other)},
		"another file":         {good.ID, good.Description, []*os.File{other}},
		"a larger size":        edited(`"size":`, `"size":2`),
		"a device that is not": edited(`"uuid":"`, `"uuid":"x`),
		"IPC":                  edited(`"share":"fd"`, `"share":"ipc"`),
		"a bad expression":     edited(`{"version":3`, `{"version":3,"tensors":"("`),
	} {
		if err := k.Keep(t.Context(), bad); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		h := hold(t, o, soft.Options{})
		if names, err := h.Adopt(t.Context()); err != nil || len(names) > 0 {
			t.Errorf("%s: %v, %v", what, names, err)
		}
		if s := h.soft.Stats(); s.Physical+s.Mappings+s.Reservations > 0 || len(h.Models()) > 0 {
			t.Errorf("%s: left are %+v", what, s)
		}
		wantKept(t, k, 0)
	}
}

// TestKeeperRefuses sends a keeper what it should not take.
func TestKeeperRefuses(t *testing.T) {
	t.Parallel()
	k := keeping(t)
	file, err := fileInMemory("x")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for what, x := range map[string]Kept{
		"no name":        {"", []byte(`{}`), []*os.File{file}},
		"a long name":    {strings.Repeat("x", 1000), []byte(`{}`), []*os.File{file}},
		"no descriptors": {"a", []byte(`{}`), nil},
	} {
		if err := k.Keep(t.Context(), x); err == nil || !strings.Contains(err.Error(), "descriptors") {
			t.Errorf("%s: %v", what, err)
		}
	}
	for range 3 { // of one name there is one
		if err := k.Keep(t.Context(), Kept{"a", []byte(`{"x":1}`), []*os.File{file, file}}); err != nil {
			t.Fatal(err)
		}
	}
	wantKept(t, k, 1)
	if _, err := k.ask(t.Context(), keeperRequest{Op: "x"}, []*os.File{file}); err == nil ||
		!strings.Contains(err.Error(), "unknown") {
		t.Error(err)
	}
	if err := (KeeperClient{Socket: k.Socket + "x"}).Forget(t.Context(), "a"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
