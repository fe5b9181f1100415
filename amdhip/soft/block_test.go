package soft

import (
	"errors"
	"testing"
	"testing/synctest"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// TestBlock keeps calls of many kinds from returning until ClearFaults, and until Close.
func TestBlock(t *testing.T) {
	t.Parallel()
	mem := make([]byte, 1<<12) // it is never registered for longer than a call
	for name, call := range map[string]func(d *amdhip.Device, s *amdhip.Stream, m *amdhip.Memory) error{
		"hipGetDeviceCount": func(d *amdhip.Device, _ *amdhip.Stream, _ *amdhip.Memory) error {
			_, err := d.Runtime().DeviceCount()
			return err
		},
		"hipMemGetInfo": func(d *amdhip.Device, _ *amdhip.Stream, _ *amdhip.Memory) error { _, _, err := d.MemInfo(); return err },
		"hipHostRegister": func(d *amdhip.Device, _ *amdhip.Stream, _ *amdhip.Memory) error {
			h, err := d.HostRegister(mem)
			return closed(h, err)
		},
		"hipStreamCreateWithFlags": func(d *amdhip.Device, _ *amdhip.Stream, _ *amdhip.Memory) error {
			s, err := d.NewStream()
			return closed(s, err)
		},
		"hipMemsetAsync": func(_ *amdhip.Device, s *amdhip.Stream, m *amdhip.Memory) error { return s.Memset(m.Ptr(), 1, 1) },
		"hipStreamQuery": func(_ *amdhip.Device, s *amdhip.Stream, _ *amdhip.Memory) error { _, err := s.Query(); return err },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rt, d := openSoft(t, Options{})
				s, m := value(d.NewStream())(t), value(d.Malloc(1))(t) // Close of the runtime ends them
				sw := Of(rt)
				for _, code := range []amdhip.Status{amdhip.Success, amdhip.ErrUnknown} {
					sw.Inject(Fault{Func: name, N: 1, Code: code, Block: true})
					returned := make(chan error, 1)
					go func() { returned <- call(d, s, m) }()
					synctest.Wait()
					select {
					case err := <-returned:
						t.Fatalf("the call has returned: %v", err)
					default:
					}
					noError(t, closed(d.Malloc(1))) // nobody else waits
					sw.ClearFaults()
					if err := <-returned; code == amdhip.Success {
						noError(t, err)
					} else if !errors.Is(err, code) {
						t.Errorf("%v, want %v", err, code)
					}
				}
				sw.Inject(Fault{Func: name, N: 1, Block: true})
				returned := make(chan error, 1)
				go func() { returned <- call(d, s, m) }()
				synctest.Wait()
				noError(t, rt.Close())
				<-returned
			})
		})
	}
}

// closed closes what a call has made.
func closed[T interface{ Close() error }](made T, err error) error {
	if err != nil {
		return err
	}
	return made.Close()
}

// TestWaits frees things while the other device of two works: at once, or when that device has finished.
func TestWaits(t *testing.T) {
	t.Parallel()
	for _, waits := range []Waits{WaitsForDevice, WaitsForAll} {
		synctest.Test(t, func(t *testing.T) {
			rt, d0 := openSoft(t, Options{Devices: 2, Waits: waits})
			d1 := value(rt.Device(1))(t)
			s1, m1 := newStream(t, d1), newMemory(t, d1, 1)
			registered := value(d0.HostRegister(make([]byte, 1<<12)))(t)
			free := map[string]func() error{
				"hipFree":           value(d0.Malloc(1))(t).Close,
				"hipHostFree":       value(d0.HostMalloc(1))(t).Close,
				"hipHostUnregister": registered.Close,
				"hipStreamDestroy":  value(d0.NewStream())(t).Close,
			}
			stall(t, s1, m1.Ptr())
			ended := make(chan string, len(free))
			for name, f := range free {
				go func() {
					if err := f(); err != nil {
						t.Errorf("%s: %v", name, err)
					}
					ended <- name
				}()
			}
			synctest.Wait()
			if got := len(ended); (got == 0) != (waits == WaitsForAll) || got != 0 && got != len(free) {
				t.Errorf("waits %v: %d of %d calls have returned", waits, got, len(free))
			}
			Of(rt).ClearFaults()
			for range free {
				<-ended
			}
			noError(t, s1.Synchronize())
		})
	}
}

// TestWaitsForNothing frees memory and a stream under a copy that lasts, and counts the copy that finds its memory
// gone.
func TestWaitsForNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		rt, d := openSoft(t, Options{Waits: WaitsForNothing})
		s, m, h := value(d.NewStream())(t), value(d.Malloc(64))(t), value(d.HostMalloc(64))(t)
		Of(rt).Inject(Fault{Func: "hipMemcpyAsync", N: 1, Stall: true})
		noError(t, s.CopyToDevice(m.Ptr(), h, 0, 64))
		noError(t, m.Close())
		noError(t, h.Close())
		noError(t, s.Close())
		if s := Of(rt).Stats(); s.Allocations+s.HostAllocations+s.Streams != 0 || s.Stray != 0 {
			t.Errorf("%+v, want that all is freed", s)
		}
		Of(rt).ClearFaults()
		synctest.Wait()
		if n := Of(rt).Stats().Stray; n != 1 {
			t.Errorf("%d stray copies, want 1", n)
		}
	})
}
