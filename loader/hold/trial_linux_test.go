package hold

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestTrialFails lets the trial of virtual memory fail as AMD's runtimes do: a mapping that is none although the call
// said so, and other calls. Models are shared by IPC handles then, and --share fd says why it cannot be.
func TestTrialFails(t *testing.T) {
	t.Parallel()
	for _, f := range []soft.Fault{
		{Func: "hipMemMap", N: 1, Code: amdhip.ErrUnknown, Async: true},
		{Func: "hipMemSetAccess", N: 2, Code: amdhip.ErrUnknown},
		{Func: "hipMemExportToShareableHandle", N: 1, Code: amdhip.ErrUnknown},
		{Func: "hipMemImportFromShareableHandle", N: 1, Code: amdhip.ErrUnknown},
	} {
		for _, share := range []Share{ShareAuto, ShareFD} {
			log := new(lines)
			rt, devices := openSoft(t, soft.Options{})
			soft.Of(rt).Inject(f)
			h, err := New(devices, Options{
				Config: tight(), Share: share, Logger: log.logger(),
				Spec: plan.Spec{Policy: plan.Raw},
			})
			soft.Of(rt).ClearFaults()
			if share == ShareFD {
				if err == nil {
					t.Errorf("%+v: it can", f)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if n := log.count("does not work"); n != 1 || h.share != ShareIPC {
				t.Errorf("%+v: shared by %v, said %d times", f, h.share, n)
			}
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestTrialHangs lets a call of the trial not come back, as AMD's 6.4.3 does: models are shared by IPC handles, and
// Close says what the call keeps.
func TestTrialHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rt, err := soft.OpenRuntime(soft.Options{Shared: true})
		if err != nil {
			t.Fatal(err)
		}
		dev, err := rt.Device(0)
		if err != nil {
			t.Fatal(err)
		}
		soft.Of(rt).Inject(soft.Fault{Func: "hipMemMap", N: 1, Block: true})
		began := time.Now()
		h, err := New([]*amdhip.Device{dev}, Options{Config: tight()})
		if err != nil || h.share != ShareIPC || time.Since(began) != proofTime {
			t.Fatalf("%v after %v", err, time.Since(began))
		}
		if e, left := errors.AsType[*loader.LeftError](h.Close()); !left || e.DeviceBytes != sharedAlign {
			t.Errorf("Close says %v", e)
		}
		if err := VirtualMemoryWorks(dev); !errors.Is(err, loader.ErrStalled) {
			t.Error(err)
		}
		soft.Of(rt).ClearFaults()
		synctest.Wait()
		if err := leftOfProofs([]*amdhip.Device{dev}); err != nil {
			t.Errorf("it has come back: %v", err)
		}
		if s := soft.Of(rt).Stats(); s.Physical+s.Reservations+s.HostAllocations > 0 {
			t.Errorf("left are %+v", s)
		}
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
}
