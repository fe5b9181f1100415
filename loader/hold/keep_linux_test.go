package hold

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// keeping starts a keeper, and returns its client.
func keeping(t *testing.T) KeeperClient {
	t.Helper()
	socket := socketIn(t)
	keepingAt(t, socket)
	return KeeperClient{Socket: socket}
}

// keepingAt starts a keeper at a socket. It runs until the function that is returned is called, or the test ends.
func keepingAt(t *testing.T, socket string) (stop func()) {
	t.Helper()
	l, remove, err := Listen(socket, false)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- ServeKeeper(ctx, l, nil) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-ended, remove()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// TestKeeperRestarts ends the keeper under a Holder. It is said once, models are loaded and dropped all the same, and
// the next keeper gets what there is by then, from which a new Holder adopts it.
func TestKeeperRestarts(t *testing.T) {
	t.Parallel()
	log := new(lines)
	k := KeeperClient{Socket: socketIn(t)}
	stop := keepingAt(t, k.Socket)
	o := Options{Share: ShareFD, Keep: k, Spec: plan.Spec{Policy: plan.Raw}, Logger: log.logger()}
	o.keepLook = 5 * time.Millisecond
	h := hold(t, o, soft.Options{})
	h.with(t, "a", sample).with(t, "b", sample)
	wantKept(t, k, 2)
	for range 2 {
		stop()
		eventually(t, "that it is gone is said", func() bool { return log.count("nobody keeps the model") > 0 })
		h.with(t, "c", sample)
		if err := errors.Join(h.Drop("a"), h.Sleep(t.Context(), "b")); err != nil {
			t.Fatal(err)
		}
		stop = keepingAt(t, k.Socket)
		wantKept(t, k, 1)
		h.with(t, "a", sample)
		if err := errors.Join(h.Wake(t.Context(), "b"), h.Wait(t.Context(), "b")); err != nil {
			t.Fatal(err)
		}
		wantKept(t, k, 3)
		if err := h.Drop("c"); err != nil {
			t.Fatal(err)
		}
		wantKept(t, k, 2)
	}
	eventually(t, "it is kept again", func() bool { return log.count("the model is kept again") == 2 }) // c, in each round
	h = h.again(t, o)
	names, err := h.Adopt(t.Context())
	slices.Sort(names)
	if err != nil || !slices.Equal(names, []string{"a", "b"}) {
		t.Fatalf("adopted %v, %v", names, err)
	}
	stop()
	keepingAt(t, k.Socket)
	wantKept(t, k, 2)
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

// TestAdoptShard: a rank's part that was divided by rules of the caller's is the same one to the next Holder, and
// another one when the rules have changed.
func TestAdoptShard(t *testing.T) {
	t.Parallel()
	k := keeping(t)
	const path = "../../testdata/gguf/all-types.gguf"
	divided := func(as plan.Division) Options {
		return Options{Share: ShareFD, Keep: k, Spec: plan.Spec{Policy: plan.Raw, Shard: plan.Shard{
			By: plan.ShardTensors, Rank: 1, World: 2, Rules: []plan.ShardRule{{Name: regexp.MustCompile("^type"), As: as}},
		}}}
	}
	h := hold(t, divided(plan.DivideColumns), soft.Options{}).with(t, "m", path)
	for i, as := range []plan.Division{plan.DivideColumns, plan.Replicate, plan.Replicate} {
		wantKept(t, k, 1)
		h = h.again(t, divided(as))
		if _, err := h.Adopt(t.Context()); err != nil {
			t.Fatal(err)
		}
		h.with(t, "m", path)
		if m := h.wantState(t, "m", stateResident, false); m.Adopted != (i != 1) {
			t.Errorf("round %d: adopted %t", i, m.Adopted)
		}
	}
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

// TestKeeperDescriptors: a keeper keeps no more descriptors than leave it some to talk with.
func TestKeeperDescriptors(t *testing.T) {
	t.Parallel()
	k := newKeeper(slog.New(slog.DiscardHandler), 8)
	file, err := fileInMemory("x")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, tt := range []struct {
		id    string
		files int
		ok    bool
	}{
		{"a", 5, false}, {"a", 3, true}, {"b", 2, false}, {"a", 4, true}, {"a", 1, true}, {"b", 3, true}, {"c", 1, false},
	} {
		err := k.keep(Kept{tt.id, []byte(`{}`), slices.Repeat([]*os.File{file}, tt.files)[:tt.files:tt.files]})
		if (err == nil) != tt.ok || err != nil && !strings.Contains(err.Error(), "ulimit -n") {
			t.Errorf("%d of %q: %v", tt.files, tt.id, err)
		}
	}
	if most := newKeeper(nil, 20000).most; most != 20000-keeperFiles {
		t.Errorf("of 20000 it keeps %d", most)
	}
}
