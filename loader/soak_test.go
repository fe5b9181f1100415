package loader

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestEightLoads runs eight loads at once, with all policies, on one device and on two.
func TestEightLoads(t *testing.T) {
	t.Parallel()
	for n := 1; n <= 2; n++ {
		t.Run(fmt.Sprintf("%d devices", n), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := openModel(t, sample)
				devs, sw := openDevices(t, 2, soft.Options{LinkBytesPerSecond: 2e9, Poison: true})
				var loads sync.WaitGroup
				for i := range 8 {
					loads.Go(func() {
						o := tight
						o.Policy = plan.Policies()[i/2]
						w, err := load(t.Context(), m, o, devs[i%n])
						if err != nil {
							t.Error(err)
							return
						}
						if err := verify(t.Context(), w, m); err != nil {
							t.Errorf("load %d: %v", i, err)
						}
						mustClose(t, w)
					})
				}
				loads.Wait()
				wantBack(t, sw, resources{})
			})
		})
	}
}

// TestThousandLoads opens, loads, verifies and closes a small model again and again, half of the times with one Loader
// and half with a new one. After the last time no more may be in use than after the tenth.
func TestThousandLoads(t *testing.T) {
	t.Parallel()
	if !alone(t) {
		return
	}
	devs, sw := openDevices(t, 2, soft.Options{})
	loads := 1000
	if testing.Short() {
		loads = 50
	}
	shared := newLoader(t, tight, devs[0])
	var tenth resources
	var files, mapped [2]int64
	var heap [2]uint64
	for i := 1; i <= loads; i++ {
		m, err := gguf.Open(small)
		if err != nil {
			t.Fatal(err)
		}
		o := tight
		o.IO = IO(i % 3)
		var w *Model
		if i%2 == 0 {
			w, err = shared.Load(t.Context(), mustPlan(t, shared, m, o), o.request())
		} else {
			w, err = load(t.Context(), m, o, devs[1])
		}
		if err != nil {
			t.Fatal(err)
		}
		if i%10 == 0 {
			if err := verify(t.Context(), w, m); err != nil {
				t.Fatal(err)
			}
		}
		mustClose(t, w)
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if i == 10 {
			tenth, heap[0] = using(sw), liveHeap()
			files[0], mapped[0] = mappings()
		}
	}
	wantBack(t, sw, tenth)
	heap[1] = liveHeap()
	files[1], mapped[1] = mappings()
	const slack = 128 << 10 // the runtime's own; a hundredth of it per load would show
	if heap[1] > heap[0]+slack {
		t.Errorf("%d bytes are live after %d loads, %d after ten", heap[1], loads, heap[0])
	}
	if files[1] > files[0] || mapped[1] > mapped[0]+mapSlack {
		t.Errorf("%d files and %d bytes are mapped after %d loads, %d and %d after ten", files[1], mapped[1], loads, files[0], mapped[0])
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

// mapSlack is the room for what the C library and the Go runtime map besides; a staging slab is 2 MiB and more.
const mapSlack = 1 << 20

// underRace: the race detector maps memory of its own, so that the mappings cannot be told apart.
var underRace = func() bool {
	info, _ := debug.ReadBuildInfo()
	return info != nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}()

// mappings returns the number of mapped files, and the writable anonymous memory that is not Go's heap. Both are 0
// where /proc is missing.
func mappings() (files, bytesOutside int64) {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return 0, 0
	}
	const guardPage, stack, arena = 4096, 8 << 20, 64 << 20 // of threads in C; an arena of its malloc begins aligned
	guarded := int64(-1)                                    // where a guard page ends, and the stack of a C thread begins
	for line := range strings.Lines(string(maps)) {
		f := strings.Fields(line) // range, permissions, offset, device, inode, path
		if len(f) > 5 && strings.HasPrefix(f[5], "/") {
			files++
		}
		from, to, _ := strings.Cut(f[0], "-")
		lo, _ := strconv.ParseInt(from, 16, 64)
		hi, _ := strconv.ParseInt(to, 16, 64)
		switch {
		case f[4] != "0":
		case strings.HasPrefix(f[1], "---") && hi-lo == guardPage:
			guarded = hi
		case strings.HasPrefix(f[1], "rw") && lo == guarded:
			bytesOutside += max(0, hi-lo-stack)
		case strings.HasPrefix(f[1], "rw") && (lo%arena != 0 || hi-lo > mapSlack):
			bytesOutside += hi - lo
		}
	}
	if underRace {
		return files, 0
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return files, bytesOutside - int64(m.Sys)
}

// TestLoadsRacingWithClose closes models at random points of their loads, while others wait for their tensors and read
// them back. All loads are by one Loader for each device.
func TestLoadsRacingWithClose(t *testing.T) {
	t.Parallel()
	synctest.Test(t, testLoadsRacingWithClose)
}

func testLoadsRacingWithClose(t *testing.T) {
	m := openModel(t, sample)
	devs, sw := openDevices(t, 2, soft.Options{LinkBytesPerSecond: 2e9})
	rounds := 100
	if testing.Short() {
		rounds = 20
	}
	allowed := func(what string, err error) {
		if err != nil && !errors.Is(err, ErrClosed) {
			t.Errorf("%s of a model that is being closed: %v", what, err)
		}
	}
	o := rawTight()
	var loaders [2]*Loader
	for i := range loaders {
		var err error
		if loaders[i], err = New(devs[i:i+1], o.config()); err != nil {
			t.Fatal(err)
		}
	}
	for i := range rounds {
		l, dev := loaders[i%2], devs[i%2]
		w, err := l.Start(t.Context(), mustPlan(t, l, m, o), o.request())
		if err != nil {
			t.Fatal(err)
		}
		tensors := w.Plan().Tensors()
		last := tensors[len(tensors)-1].Name
		var users sync.WaitGroup
		users.Go(func() { allowed("Wait", w.Wait(t.Context(), last)) })
		users.Go(func() { allowed("WaitAll", w.WaitAll(t.Context())) })
		users.Go(func() { allowed("ReadBack", verify(t.Context(), w, m)) })
		users.Go(func() {
			_, err := w.Tensor(last)
			allowed("Tensor", err)
			w.Tensors()
			w.Report()
			w.Hashes()
		})
		users.Go(func() {
			s, err := dev.NewStream()
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
				time.Sleep(rand.N(2 * time.Millisecond)) // about as long as a load on the modelled link
				mustClose(t, w)
			})
		}
		users.Wait()
	}
	for _, l := range loaders {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	wantBack(t, sw, resources{})
}

// TestRuntimeClosed closes the whole runtime under loads. They must end, with an error unless they were done already,
// and nothing of them goes on.
func TestRuntimeClosed(t *testing.T) {
	t.Parallel()
	path := ownCopy(t, sample)
	before := opened(path)
	for i := range 20 {
		synctest.Test(t, func(t *testing.T) {
			m := openModel(t, path)
			devs, _ := leakyDevices(t, 1, soft.Options{LinkBytesPerSecond: 2e9})
			var users sync.WaitGroup
			users.Go(func() {
				w, err := load(t.Context(), m, rawTight(), devs...)
				switch {
				case err == nil:
					w.Close() // may fail: its memory went with the runtime
				case !errors.Is(err, amdhip.ErrClosed) && !errors.Is(err, amdhip.ErrDeinitialized):
					t.Errorf("load: %v", err)
				}
			})
			users.Go(func() {
				time.Sleep(time.Duration(i) * 60 * time.Microsecond) // of a load that takes a millisecond
				if err := devs[0].Runtime().Close(); err != nil {
					t.Error(err)
				}
			})
			users.Wait()
		})
	}
	closedAgain(t, path, before)
}

// TestFlippedBits inverts a bit of device memory after a load, and a bit of a staging buffer between the call that
// starts its copy and the copy. Reading back must find either, and say where.
func TestFlippedBits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, testFlippedBits)
}

func testFlippedBits(t *testing.T) {
	m := openModel(t, sample)
	dev, sw := openDevice(t, soft.Options{})
	o := options{Policy: plan.Raw, Chunk: minChunk, Staging: minChunk, Threads: 1, Streams: 1}
	l := newLoader(t, o, dev)
	p := mustPlan(t, l, m, o)
	w, err := l.Load(t.Context(), p, o.request())
	if err != nil {
		t.Fatal(err)
	}
	mustClose(t, w)
	buf, err := l.stages[0].pool.Acquire(t.Context()) // that of the next load, too: there is one only
	if err != nil {
		t.Fatal(err)
	}
	staging := amdhip.DevicePtr(uintptr(unsafe.Pointer(&buf.Bytes()[0])))
	buf.Release()

	const spoiled = 9 // the chunk
	sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: spoiled + 1, Stall: true})
	if w, err = l.Start(t.Context(), p, o.request()); err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, w)
	time.Sleep(time.Second) // until everything waits for that copy
	if err := sw.FlipBit(staging, 6); err != nil {
		t.Fatal(err)
	}
	sw.ClearFaults()
	if err := w.WaitAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantFlip := func(at amdhip.DevicePtr) {
		t.Helper()
		e, ok := errors.AsType[*unequal](verify(t.Context(), w, m))
		if !ok {
			t.Fatalf("the flipped bit at %#x was not found", at)
		}
		x, err := w.Tensor(e.tensor)
		if err != nil {
			t.Fatal(err)
		}
		if got := x.Ptr + amdhip.DevicePtr(e.at); got != at {
			t.Errorf("%v: that is at %#x, want %#x", e, got, at)
		}
	}
	c := p.Groups[0].Cut(plan.CutOptions{Bytes: minChunk, Ramp: 1})[spoiled]
	at := w.parts[0].ptr(0, c.Arena, c.Offset)
	wantFlip(at)
	if err := sw.FlipBit(at, 6); err != nil { // puts it right
		t.Fatal(err)
	}
	if err := verify(t.Context(), w, m); err != nil {
		t.Errorf("with the bit put right: %v", err)
	}
	at = w.Tensors()[3].Ptr + 5
	if err := sw.FlipBit(at, 0); err != nil {
		t.Fatal(err)
	}
	wantFlip(at)
}
