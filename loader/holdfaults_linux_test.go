package loader

import (
	"errors"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// TestEveryCallFailsHeld is TestEveryCallFails for holding a model and for attaching to one.
func TestEveryCallFailsHeld(t *testing.T) {
	m := openModel(t, sample)
	// Which of its devices a Holder uses decides which device is attached to, and that is the second one.
	rt, err := amdhip.OpenSoftware(amdhip.SoftwareOptions{Devices: 2, Shared: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
	dev, err := rt.Device(1)
	if err != nil {
		t.Fatal(err)
	}
	h := holdOn(t, dev, HolderOptions{Load: rawTight()}).with(t, "", sample)
	n := failEveryCall(t, m, []sweep{
		{name: "hold", ipc: true, work: func(j *job) error {
			h := NewHolder(j.dev, HolderOptions{Load: rawTight()})
			name, err := h.Add(j.ctx, "", sample)
			if err == nil {
				err = h.Wait(j.ctx, name)
			}
			return errors.Join(err, h.Close())
		}},
		{name: "attach", ipc: true, few: true, work: func(j *job) error {
			w, err := AttachTo(j.ctx, j.dev, h.socket, "")
			if err != nil {
				return err
			}
			return errors.Join(w.Use(j.file), w.Verify(j.ctx), w.Close())
		}},
	})
	t.Logf("%d faults", n)
	if models := h.Models(); len(models) != 1 || models[0].State != "loaded" {
		t.Errorf("the Holder has %+v", models)
	}
}
