package readback

import (
	"errors"
	"io/fs"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// fullDisk takes room bytes.
type fullDisk struct {
	mu   sync.Mutex
	room int
}

func (d *fullDisk) WriteAt(b []byte, _ int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := min(d.room, len(b))
	if d.room -= n; n < len(b) {
		return n, &fs.PathError{Op: "write", Path: "out.safetensors", Err: syscall.ENOSPC}
	}
	return n, nil
}

// TestFullDisk exports onto disks of all sizes that do not suffice. Nothing that the export took is left, and the model
// stays whole.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	f := open(t, sample)
	devs := devices(t, 1)
	const chunk = 64 << 10
	l, err := loader.New(devs, loader.Config{Chunk: chunk, Staging: 3 * chunk})
	if err != nil {
		t.Fatal(err)
	}
	p, err := l.Plan(f, plan.Spec{Policy: plan.Raw})
	if err != nil {
		t.Fatal(err)
	}
	m, err := l.Load(t.Context(), p, loader.Request{})
	if err := errors.Join(err, l.Close()); err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	whole := new(memory)
	if err := WriteSafetensors(t.Context(), m, whole); err != nil {
		t.Fatal(err)
	}
	need := len(whole.b)
	sw := soft.Of(devs[0].Runtime())
	before := sw.Stats()
	for room := 0; room <= need; room += min(chunk, max(need-room, 1)) {
		err := WriteSafetensors(t.Context(), m, &fullDisk{room: room})
		if full := room < need; full != errors.Is(err, syscall.ENOSPC) || !full && err != nil {
			t.Errorf("room for %d of %d bytes: %v", room, need, err)
		}
		now := sw.Stats()
		if now.HostAllocations+now.Registrations != before.HostAllocations+before.Registrations ||
			now.Streams != before.Streams ||
			now.Events != before.Events || now.Allocations != before.Allocations {
			t.Fatalf("in use afterwards: %+v\nbefore: %+v", now, before)
		}
	}
	if r, err := Verify(t.Context(), m, f); err != nil || r.Tensors != len(f.Tensors()) {
		t.Errorf("the model after all that: %v, %v", r, err)
	}
}

// TestMismatchNamesDevice: of several devices, the error says on which one the memory differs.
func TestMismatchNamesDevice(t *testing.T) {
	t.Parallel()
	f := open(t, sample)
	for _, by := range []plan.SplitBy{plan.SplitLayers, plan.SplitNone} {
		devs := devices(t, 2)
		m := load(t, f, plan.Spec{Policy: plan.Raw, Split: plan.Split{By: by}}, devs...)
		x, err := m.TensorOn(devs[1], "output_norm.weight")
		if err != nil {
			t.Fatal(err)
		}
		flip(t, devs[1], x.Ptr, 3)
		if _, err := Verify(t.Context(), m, f); !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), "device 1: ") {
			t.Errorf("%v: %v, want %v on device 1", by, err, ErrMismatch)
		}
	}
}
