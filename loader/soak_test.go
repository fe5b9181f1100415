package loader

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// small is a model of a few tensors.
const small = "../testdata/gguf/align8.gguf"

// openTwo opens two software devices and returns the first and the second.
func openTwo(t *testing.T, o amdhip.SoftwareOptions) (devs [2]*amdhip.Device, sw *amdhip.Software) {
	t.Helper()
	o.Devices = 2
	devs[0], sw = openDevice(t, o)
	var err error
	if devs[1], err = devs[0].Runtime().Device(1); err != nil {
		t.Fatal(err)
	}
	return devs, sw
}

// TestEightLoads runs eight loads at once, of all dtypes, on one device and on two.
func TestEightLoads(t *testing.T) {
	m := openModel(t, sample)
	for n := 1; n <= 2; n++ {
		t.Run(fmt.Sprintf("%d devices", n), func(t *testing.T) {
			devs, sw := openTwo(t, amdhip.SoftwareOptions{LinkBytesPerSecond: 2e9, Poison: true})
			before := measure(sw)
			var loads sync.WaitGroup
			for i := range 8 {
				loads.Go(func() {
					o := tight
					o.DType = DTypes()[i/2]
					w, err := Load(t.Context(), devs[i%n], m, o)
					if err != nil {
						t.Error(err)
						return
					}
					if err := w.Verify(t.Context()); err != nil {
						t.Errorf("load %d: %v", i, err)
					}
					mustClose(t, w)
				})
			}
			loads.Wait()
			wantBack(t, sw, before)
		})
	}
}

// TestThousandLoads opens, loads, verifies and closes a small model again and again. After the last time no more may be in
// use than after the tenth.
func TestThousandLoads(t *testing.T) {
	devs, sw := openTwo(t, amdhip.SoftwareOptions{})
	loads := 1000
	if testing.Short() {
		loads = 50
	}
	var tenth resources
	var heap uint64
	for i := 1; i <= loads; i++ {
		m, err := gguf.Open(small)
		if err != nil {
			t.Fatal(err)
		}
		o := tight
		o.IO = IO(i % 3)
		w, err := Load(t.Context(), devs[i%2], m, o)
		if err != nil {
			t.Fatal(err)
		}
		if i%10 == 0 {
			if err := w.Verify(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		mustClose(t, w)
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if i == 10 {
			tenth, heap = measure(sw), liveHeap()
		}
	}
	wantBack(t, sw, tenth)
	const slack = 128 << 10 // the runtime's own; a hundredth of it per load would show
	if now := liveHeap(); now > heap+slack {
		t.Errorf("%d bytes are live after %d loads, %d after ten", now, loads, heap)
	}
	if n := devs[0].Runtime().Leaked(); n != 0 {
		t.Errorf("%d handles were never closed", n)
	}
}

// liveHeap is what Go's heap holds after two collections: the first one runs the clean-ups of what it finds.
func liveHeap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestLoadsRacingWithClose closes models at random points of their loads, while others wait for their tensors and read
// them back.
func TestLoadsRacingWithClose(t *testing.T) {
	m := openModel(t, sample)
	devs, sw := openTwo(t, amdhip.SoftwareOptions{LinkBytesPerSecond: 2e9})
	before := measure(sw)
	rounds := 100
	if testing.Short() {
		rounds = 20
	}
	allowed := func(what string, err error) {
		if err != nil && !errors.Is(err, ErrClosed) {
			t.Errorf("%s of a model that is being closed: %v", what, err)
		}
	}
	for i := range rounds {
		w, err := Start(t.Context(), devs[i%2], m, rawTight())
		if err != nil {
			t.Fatal(err)
		}
		last := w.plan.Tensors[len(w.plan.Tensors)-1].Name
		var users sync.WaitGroup
		users.Go(func() { allowed("Wait", w.Wait(t.Context(), last)) })
		users.Go(func() { allowed("WaitAll", w.WaitAll(t.Context())) })
		users.Go(func() { allowed("Verify", w.Verify(t.Context())) })
		users.Go(func() {
			_, err := w.Tensor(last)
			allowed("Tensor", err)
			w.Tensors()
			w.Report()
		})
		users.Go(func() {
			s, err := w.Device().NewStream()
			if err != nil {
				t.Error(err)
				return
			}
			allowed("WaitStream", w.WaitStream(t.Context(), s, last))
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
		for range 2 {
			users.Go(func() {
				time.Sleep(rand.N(4 * time.Millisecond)) // about as long as a load
				mustClose(t, w)
			})
		}
		users.Wait()
	}
	wantBack(t, sw, before)
}

// TestRuntimeClosed closes the whole runtime under loads. They must end, with an error unless they were done already.
func TestRuntimeClosed(t *testing.T) {
	m := openModel(t, sample)
	before := measure(nil)
	for i := range 20 {
		rt, err := amdhip.OpenSoftware(amdhip.SoftwareOptions{LinkBytesPerSecond: 2e9})
		if err != nil {
			t.Fatal(err)
		}
		dev, err := rt.Device(0)
		if err != nil {
			t.Fatal(err)
		}
		var users sync.WaitGroup
		users.Go(func() {
			w, err := Load(t.Context(), dev, m, rawTight())
			switch {
			case err == nil:
				w.Close() // may fail: its memory went with the runtime
			case !errors.Is(err, amdhip.ErrClosed) && !errors.Is(err, amdhip.ErrDeinitialized):
				t.Errorf("load: %v", err)
			}
		})
		users.Go(func() {
			time.Sleep(time.Duration(i) * 200 * time.Microsecond)
			if err := rt.Close(); err != nil {
				t.Error(err)
			}
		})
		users.Wait()
	}
	before.MapBytes += 1 << 30 // staging memory that may be registered still is not unmapped
	wantBack(t, nil, before)
}

// TestFlippedBits inverts a bit of device memory after a load, and a bit of a staging buffer between the call that starts
// its copy and the copy. Verify must find either, and say where.
func TestFlippedBits(t *testing.T) {
	m := openModel(t, sample)
	dev, sw := openDevice(t, amdhip.SoftwareOptions{})
	w, p := started(t, dev, m, Options{DType: Raw, Chunk: minChunk, Staging: minChunk, Threads: 1, Streams: 1})
	defer mustClose(t, w)
	buf, err := p.way.(*staged).pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	staging := amdhip.DevicePtr(uintptr(unsafe.Pointer(&buf.Bytes()[0]))) // there is one buffer only
	buf.Release()
	const spoiled = 9 // the chunk
	sw.Inject(amdhip.Fault{Func: "hipMemcpyAsync", N: spoiled + 1, Stall: true})
	go p.run(t.Context())
	for sw.Calls()["hipEventRecord"] <= spoiled { // the call that follows the copy
		time.Sleep(100 * time.Microsecond)
	}
	if err := sw.FlipBit(staging, 6); err != nil {
		t.Fatal(err)
	}
	sw.ClearFaults()
	if err := w.WaitAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantFlip := func(at amdhip.DevicePtr) {
		t.Helper()
		e, ok := errors.AsType[*MismatchError](w.Verify(t.Context()))
		if !ok {
			t.Fatalf("the flipped bit at %#x was not found", at)
		}
		x, err := w.Tensor(e.Tensor)
		if err != nil {
			t.Fatal(err)
		}
		if got := x.Ptr + amdhip.DevicePtr(e.Offset); got > at || got+8 <= at {
			t.Errorf("%v: that is at %#x, want %#x", e, got, at)
		}
	}
	c := &w.chunks[spoiled]
	at := w.ptr(c.arena, c.off)
	wantFlip(at)
	if err := sw.FlipBit(at, 6); err != nil { // puts it right
		t.Fatal(err)
	}
	if err := w.Verify(t.Context()); err != nil {
		t.Errorf("with the bit put right: %v", err)
	}
	at = w.Tensors()[3].Ptr + 5
	if err := sw.FlipBit(at, 0); err != nil {
		t.Fatal(err)
	}
	wantFlip(at)
}

// started is Start up to where the load begins.
func started(t *testing.T, dev *amdhip.Device, m *gguf.Model, o Options) (*Model, *pipeline) {
	t.Helper()
	w, conv, err := prepare(t.Context(), dev, m, o)
	if err != nil {
		t.Fatal(err)
	}
	p := newPipeline(w, conv, time.Now())
	if err := p.open(); err != nil {
		t.Fatal(err)
	}
	w.cancel = func(error) {}
	return w, p
}
