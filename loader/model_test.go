package loader

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestClosed: after Close, every method of a model that was loaded well says so.
func TestClosed(t *testing.T) {
	t.Parallel()
	for name, load := range map[string]loadFunc{"Load": load, "LoadSync": loadSync} {
		for n := 1; n <= 2; n++ {
			t.Run(fmt.Sprint(name, n), func(t *testing.T) {
				t.Parallel()
				m := llama(t)
				devs, _ := openDevices(t, n, soft.Options{})
				w, err := load(t.Context(), m, options{Hash: true}, devs...)
				if err != nil {
					t.Fatal(err)
				}
				s := newStream(t, devs[0])
				const tensor = "token_embd.weight"
				err = errors.Join(w.Wait(t.Context(), tensor), w.WaitAll(t.Context()), w.WaitStream(t.Context(), s, tensor))
				if err != nil {
					t.Error(err)
				}
				if len(w.Hashes()) != len(m.Tensors()) || !slices.Equal(w.Devices(), devs) || w.Gone() != nil {
					t.Errorf("%d hashes, devices %v, gone %v", len(w.Hashes()), w.Devices(), w.Gone())
				}
				mustClose(t, w)
				wantClosed(t, w, s, tensor)
				mustClose(t, w)
			})
		}
	}
}

// TestCopies: what a model tells of itself is the caller's to change.
func TestCopies(t *testing.T) {
	t.Parallel()
	m := llama(t)
	devs, _ := openDevices(t, 2, soft.Options{})
	o := options{Shard: plan.Shard{World: 2, By: plan.ShardTensors}}
	w, err := load(t.Context(), m, o, devs...)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, w)
	say := func() string {
		x, err := w.TensorOn(nil, "blk.1.attn_q.weight")
		if err != nil {
			t.Fatal(err)
		}
		r := w.Report()
		return fmt.Sprint(x.Shape, *x.Slice, w.Tensors()[0].Shape, len(w.Devices()), r.Devices[0].Tensors,
			w.Plan().Tensors()[0].Shape)
	}
	before := say()
	x, err := w.Tensor("blk.1.attn_q.weight")
	if err != nil {
		t.Fatal(err)
	}
	x.Shape[0], x.Slice.Ranges[0][0], x.Slice.Shape[1], w.Tensors()[0].Shape[0] = 0, 77, 0, 0
	w.Devices()[0] = nil
	w.Report().Devices[0].Tensors = 0
	if after := say(); after != before {
		t.Errorf("%s, it was %s", after, before)
	}
	if err := verify(t.Context(), w, m); err != nil {
		t.Error(err)
	}
}

// TestEmptyParts: more devices than layers, and what is before and after them, is no error. Those that get nothing say
// so. A model without layers is divided by whole tensors.
func TestEmptyParts(t *testing.T) {
	t.Parallel()
	flat := makeModel(t, nil, []made{
		{"a", gguf.F32, []uint64{4096}}, {"b", gguf.Q8_0, []uint64{4096}}, {"c", gguf.F16, []uint64{4096}},
	})
	for _, x := range []struct {
		name    string
		m       *gguf.File
		devices int
		empty   int
	}{
		{"layers", llama(t), 7, 1}, {"no layers", flat, 3, 0}, {"no layers, many devices", flat, 5, 2},
	} {
		for name, load := range map[string]loadFunc{"Load": load, "LoadSync": loadSync} {
			t.Run(x.name+" "+name, func(t *testing.T) {
				t.Parallel()
				devs, sw := openDevices(t, x.devices, soft.Options{Memory: 64 << 20})
				w, err := load(t.Context(), x.m, options{}, devs...)
				if err != nil {
					t.Fatal(err)
				}
				defer mustClose(t, w)
				if err := verify(t.Context(), w, x.m); err != nil {
					t.Error(err)
				}
				empty, tensors := 0, 0
				for i, d := range w.Report().Devices {
					if d.Device != devs[i] {
						t.Errorf("the report says device %d at %d", d.Device.Index(), i)
					}
					if tensors += d.Tensors; d.Tensors == 0 {
						empty++
						if d.DeviceBytes+d.ReadBytes+d.UploadBytes != 0 {
							t.Errorf("a device without tensors: %+v", d)
						}
					}
				}
				if empty != x.empty || tensors != len(x.m.Tensors()) || len(w.Tensors()) != tensors {
					t.Errorf("%d of %d devices have nothing, want %d; %d tensors", empty, x.devices, x.empty, tensors)
				}
				if n := sw.Stats().Allocations; n != x.devices-empty {
					t.Errorf("%d allocations on %d devices", n, x.devices-empty)
				}
			})
		}
	}
}

// TestProgress: progress counts the bytes of tensors that are on their devices, each once, up to all of them, and never
// falls.
func TestProgress(t *testing.T) {
	t.Parallel()
	for _, by := range bothSplits {
		for n := 1; n <= 3; n++ {
			for name, load := range map[string]loadFunc{"Load": load, "LoadSync": loadSync} {
				for _, d := range []Dequant{DequantCPU, DequantGPU} {
					synctest.Test(t, func(t *testing.T) {
						m := llama(t)
						devs, _ := openDevices(t, n, soft.Options{LinkBytesPerSecond: 20e6})
						o := tight.on(n)
						o.Split.By, o.Dequant = by, d
						var before int64
						want := int64(planned(t, m, o).TensorBytes())
						o.Progress = func(done, total int64) {
							if done <= before || total != want {
								t.Errorf("%s, %v on %d devices: %d of %d after %d, want a total of %d", name, by, n, done, total, before, want)
							}
							before = done
						}
						w, err := load(t.Context(), m, o, devs...)
						if err != nil {
							t.Fatal(err)
						}
						mustClose(t, w)
						if before != want {
							t.Errorf("%s, %v on %d devices: progress ended at %d of %d", name, by, n, before, want)
						}
					})
				}
			}
		}
	}
}

// TestShare: memory that others may have mapped is freed by Close and not before, also when the load fails.
func TestShare(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := llama(t)
		for _, integrated := range []bool{false, true} {
			devs, sw := openDevices(t, 2, soft.Options{Integrated: integrated})
			o := tight.on(2)
			o.Share = true
			w, err := load(t.Context(), m, o, devs...)
			if err != nil {
				t.Fatal(err)
			}
			all, err := w.Allocations()
			if err != nil || len(all) != 2 {
				t.Fatalf("%d allocations, %v", len(all), err)
			}
			for i, a := range all {
				if a.Device != i || a.Memory == nil || a.Bytes != w.Plan().GroupOf(i).DeviceBytes || a.Memory.Size() < a.Bytes ||
					a.Memory.Size()%exportAlign != 0 {
					t.Errorf("allocation %d: %+v", i, a)
				}
			}
			if err := verify(t.Context(), w, m); err != nil {
				t.Error(err)
			}
			mustClose(t, w)

			sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 9, Code: amdhip.ErrUnknown})
			w = start(t.Context(), t, m, o, devs...)
			if err := w.WaitAll(t.Context()); !errors.Is(err, amdhip.ErrUnknown) {
				t.Errorf("%v, want %v", err, amdhip.ErrUnknown)
			}
			if n := sw.Stats().Allocations; n != 2 {
				t.Errorf("%d allocations are left before Close", n)
			}
			if _, err := w.Allocations(); !errors.Is(err, amdhip.ErrUnknown) {
				t.Errorf("Allocations of a failed load: %v", err)
			}
			mustClose(t, w)
			if n := sw.Stats().Allocations; n != 0 {
				t.Errorf("%d allocations are left after Close", n)
			}
		}
	})
}

// TestIssuedInVain: when the copies of a tensor were issued and the attempt that issued them has ended, a stream must
// not go on before the next attempt has brought the tensor, or the load has failed.
func TestIssuedInVain(t *testing.T) {
	t.Parallel()
	for _, failed := range []bool{false, true} {
		for _, restarted := range []bool{false, true} { // the next attempt has streams, and has issued nothing
			synctest.Test(t, func(t *testing.T) {
				devs, _ := openDevices(t, 1, soft.Options{})
				w := newModel(planned(t, openModel(t, small), options{}), devs)
				p, name := w.parts[0], w.Plan().Tensors()[0].Name
				s := newStream(t, devs[0])
				p.issued.passTensor(0)
				err := w.await(t.Context(), p.issued, 0) // as WaitStream does first
				if restarted {
					p.issued.left[0].Store(1)
					w.setStreams(p, func(int) []*amdhip.Stream { return []*amdhip.Stream{s} })
				}
				if done, waits := w.enqueueWait(t.Context(), s, p, 0, 0); done || waits != nil || err != nil {
					t.Errorf("restarted %v: the stream may go on: %v, %v", restarted, waits, err)
				}
				waited := make(chan error, 1)
				go func() { waited <- w.WaitStream(t.Context(), s, name) }()
				synctest.Wait()
				if len(waited) != 0 {
					t.Errorf("restarted %v: WaitStream has returned: %v", restarted, <-waited)
				}
				if failed {
					w.mu.Lock()
					w.err = amdhip.ErrUnknown
					w.mu.Unlock()
				} else {
					p.issued.passTensor(0)
					p.ready.passTensor(0)
				}
				close(w.finished)
				if err := <-waited; failed != errors.Is(err, amdhip.ErrUnknown) || !failed && err != nil {
					t.Errorf("restarted %v, failed %v: %v", restarted, failed, err)
				}
				mustClose(t, w)
			})
		}
	}
}
