package pinned_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

// devices opens a software machine with several devices.
func devices(t *testing.T, n int, o soft.Options) ([]*amdhip.Device, *soft.Software) {
	t.Helper()
	o.Devices = n
	dev, sw := device(t, o)
	devs := []*amdhip.Device{dev}
	for i := 1; i < n; i++ {
		d, err := dev.Runtime().Device(i)
		must(t, err)
		devs = append(devs, d)
	}
	return devs, sw
}

// TestSeveralDevices copies each buffer to two devices, one behind a slow link: a buffer set free when the first copy
// has ended would show on the other device.
func TestSeveralDevices(t *testing.T) { inBubble(t, testSeveralDevices) }

func testSeveralDevices(t *testing.T) {
	const n = 60
	devs, _ := devices(t, 2, soft.Options{LinkBytesPerSecond: 1e9, Poison: true})
	p := newPool(t, devs[0], pinned.Options{Budget: 2 * buf, BufferBytes: buf, Timing: true, More: devs[1:]})
	mem := []*amdhip.Memory{newMemory(t, devs[0], n*buf), newMemory(t, devs[1], n*buf)}
	streams := []*amdhip.Stream{newStream(t, devs[0]), newStream(t, devs[1])}
	ballast := newMemory(t, devs[1], buf)
	rec := newRecorder()
	for i := range n {
		b := acquire(t, p)
		fill(b, byte(i+1))
		for range 2 * (i % 2) { // the other device is later every second time
			must(t, b.CopyToDevice(streams[1], ballast.Ptr(), buf))
		}
		for d, s := range streams {
			must(t, b.CopyToDevice(s, mem[d].Ptr()+amdhip.DevicePtr(i*buf), buf))
		}
		must(t, b.ReleaseAfterAll(streams, rec, i))
	}
	for range n {
		<-rec.told
	}
	for i, err := range rec.errs {
		if err != nil || rec.took[i] < buf*time.Nanosecond-time.Microsecond { // at 10^9 bytes per second
			t.Errorf("copy %d took %v: %v", rec.tags[i], rec.took[i], err)
		}
	}
	for d, s := range streams {
		for i := range n {
			if !holds(t, p, s, mem[d].Ptr()+amdhip.DevicePtr(i*buf), byte(i+1)) {
				t.Fatalf("device %d: copy %d arrived with other bytes", d, i)
			}
		}
	}
	must(t, p.Close())
}

// TestSeveralDevicesFail: a copy to the second device fails. The error says so, and comes when the other copy has
// ended.
func TestSeveralDevicesFail(t *testing.T) { inBubble(t, testSeveralDevicesFail) }

func testSeveralDevicesFail(t *testing.T) {
	devs, sw := devices(t, 2, soft.Options{})
	p := newPool(t, devs[0], pinned.Options{Budget: buf, BufferBytes: buf, More: devs[1:]})
	sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 1, Stall: true})
	sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 2, Code: amdhip.ErrIllegalAddress, Async: true})
	b := acquire(t, p)
	var streams []*amdhip.Stream
	for _, dev := range devs {
		s := newStream(t, dev)
		must(t, b.CopyToDevice(s, newMemory(t, dev, buf).Ptr(), buf))
		streams = append(streams, s)
	}
	rec := newRecorder()
	must(t, b.ReleaseAfterAll(streams, rec, 7))
	for err := error(nil); err == nil; { // the second copy has failed
		_, err = streams[1].Query()
		synctest.Wait()
	}
	time.Sleep(time.Minute)
	select {
	case <-rec.told:
		t.Fatal("the buffer is free although the first device still reads it")
	default:
	}
	sw.ClearFaults()
	<-rec.told
	if !errors.Is(rec.errs[0], amdhip.ErrIllegalAddress) || !strings.HasPrefix(rec.errs[0].Error(), "device 1: ") {
		t.Errorf("%v, want %v of device 1", rec.errs[0], amdhip.ErrIllegalAddress)
	}
	must(t, p.Close())
}

// TestSubsets sends buffers of one pool to every choice of its devices, with the streams named in either order. Each
// buffer must be watched on exactly the devices it goes to: one whose copy stalls keeps it in flight, any other does
// not.
func TestSubsets(t *testing.T) { inBubble(t, testSubsets) }

func testSubsets(t *testing.T) {
	const n = 3
	devs, sw := devices(t, n, soft.Options{})
	// Device 2 comes first, and one is named twice: the place in the list must not matter.
	p := newPool(t, devs[2], pinned.Options{
		Budget: 2 * buf, BufferBytes: buf, Timing: true, More: []*amdhip.Device{devs[0], devs[1], devs[2], devs[0]},
	})
	if got := sw.Stats().Events; got != 2*2*n {
		t.Errorf("%d events, want two of each buffer and device", got)
	}
	var mem []*amdhip.Memory
	var streams []*amdhip.Stream
	for _, dev := range devs {
		mem, streams = append(mem, newMemory(t, dev, buf)), append(streams, newStream(t, dev))
	}
	for set := 1; set < 1<<n; set++ {
		for slow := range n {
			for _, backwards := range []bool{false, true} {
				b, rec := acquire(t, p), newRecorder()
				fill(b, byte(16*set+slow))
				var on []*amdhip.Stream
				for i := range n {
					d := i
					if backwards {
						d = n - 1 - i
					}
					if set>>d&1 == 0 {
						continue
					}
					if d == slow {
						sw.Inject(soft.Fault{Func: "hipMemcpyAsync", N: 1, Stall: true})
					}
					must(t, b.CopyToDevice(streams[d], mem[d].Ptr(), buf))
					on = append(on, streams[d])
				}
				must(t, b.ReleaseAfterAll(on, rec, set))
				time.Sleep(time.Second)
				synctest.Wait()
				if waits := set>>slow&1 == 1; waits != (len(rec.told) == 0) {
					t.Fatalf("copies to devices %03b, that to device %d stalls: in flight is %v", set, slow, !waits)
				}
				sw.ClearFaults()
				<-rec.told
				must(t, rec.errs...)
				for d := range n {
					if set>>d&1 == 1 && !holds(t, p, streams[d], mem[d].Ptr(), byte(16*set+slow)) {
						t.Fatalf("copies to devices %03b: device %d has other bytes", set, d)
					}
				}
			}
		}
	}
	b, rec := acquire(t, p), newRecorder()
	must(t, b.ReleaseAfterAll(nil, rec, 0)) // nothing to wait for
	<-rec.told
	must(t, rec.errs[0], p.Close())
}

// TestForeignStream: a stream of a device that the pool was not made for, of another runtime, or a second one of a
// device is refused and named.
func TestForeignStream(t *testing.T) {
	t.Parallel()
	devs, sw := devices(t, 3, soft.Options{})
	elsewhere, _ := device(t, soft.Options{})
	p := newPool(t, devs[0], pinned.Options{Budget: 8 * buf, BufferBytes: buf, More: devs[1:2]})
	own := newStream(t, devs[1])
	for _, test := range []struct {
		name   string
		stream *amdhip.Stream
		is     error
		says   string
	}{
		{"another device", newStream(t, devs[2]), amdhip.ErrInvalidDevice, "device 2: the pool was made for device 0, 1"},
		{"another runtime", newStream(t, elsewhere), amdhip.ErrInvalidDevice, "another runtime"},
		{"twice", newStream(t, devs[1]), amdhip.ErrInvalidValue, "two streams of device 1"},
	} {
		b := acquire(t, p)
		if test.is == amdhip.ErrInvalidDevice {
			for call, err := range map[string]error{
				"CopyToDevice": b.CopyToDevice(test.stream, 0, buf), "CopyToHost": b.CopyToHost(test.stream, 0, buf),
			} {
				if !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.says) {
					t.Errorf("%s: %s: %v, want an error that says %q", test.name, call, err, test.says)
				}
			}
		}
		err := b.ReleaseAfterAll([]*amdhip.Stream{own, test.stream}, nil, 0)
		if !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: ReleaseAfterAll: %v, want an error that says %q", test.name, err, test.says)
		}
	}
	if got := sw.Calls(); got["hipMemcpyAsync"]+got["hipEventRecord"] != 0 {
		t.Errorf("calls %v, want no copy and no event", got)
	}
	if _, err := pinned.New(devs[0], pinned.Options{More: []*amdhip.Device{elsewhere}}); err == nil ||
		!strings.Contains(err.Error(), "another runtime") {
		t.Errorf("a pool for two runtimes: %v, want an error", err)
	}
	must(t, p.Close())
}

// TestManyUsers lets several users share a small pool at once, each with its own streams and Completion, on one device
// or on two. Every user must hear of its own buffers and of no other, and find its bytes.
func TestManyUsers(t *testing.T) { inBubble(t, testManyUsers) }

func testManyUsers(t *testing.T) {
	const users, n = 5, 30
	devs, _ := devices(t, 2, soft.Options{LinkBytesPerSecond: 1e9, Poison: true})
	p := newPool(t, devs[0], pinned.Options{Budget: 3 * buf, BufferBytes: buf, More: devs[1:]})
	for round := range 2 {
		var all sync.WaitGroup
		fails := make(chan error, users)
		for u := range users {
			on := devs[u%2 : u%2+1]
			if u == 4 {
				on = devs
			}
			var streams []*amdhip.Stream
			var mem []*amdhip.Memory
			for _, dev := range on {
				streams, mem = append(streams, newStream(t, dev)), append(mem, newMemory(t, dev, n*buf))
			}
			rec := newRecorder()
			all.Go(func() { fails <- send(t, p, streams, mem, rec, n, byte(10*u+round)) })
		}
		all.Wait()
		close(fails)
		for err := range fails {
			must(t, err)
		}
	}
	if st := p.Stats(); st.InFlight != 0 || st.Lost != 0 || st.Buffers != 3 {
		t.Errorf("stats %+v, want 3 buffers, all free", st)
	}
	must(t, p.Close())
}

// send is one user: it sends n buffers to each of the memories and looks at what has arrived.
func send(
	t *testing.T, p *pinned.Pool, streams []*amdhip.Stream, mem []*amdhip.Memory, rec *recorder, n int, v byte,
) error {
	for i := range n {
		b, err := p.Acquire(t.Context())
		if err != nil {
			return err
		}
		fill(b, v+byte(100*(i%2)))
		for d, s := range streams {
			if err := b.CopyToDevice(s, mem[d].Ptr()+amdhip.DevicePtr(i*buf), buf); err != nil {
				return err
			}
		}
		if err := b.ReleaseAfterAll(streams, rec, i); err != nil {
			return err
		}
	}
	for range n {
		<-rec.told
	}
	for i, tag := range rec.tags { // on the same streams, so in order
		if tag != i || rec.errs[i] != nil {
			return fmt.Errorf("told of buffers %v with %v", rec.tags, rec.errs)
		}
	}
	for d, s := range streams {
		for i := range n {
			if !holds(t, p, s, mem[d].Ptr()+amdhip.DevicePtr(i*buf), v+byte(100*(i%2))) {
				return fmt.Errorf("memory %d: buffer %d arrived with other bytes", d, i)
			}
		}
	}
	return nil
}
