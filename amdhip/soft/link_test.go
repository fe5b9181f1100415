package soft

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// elapsed runs work between two events of s and returns the time between them.
func elapsed(t *testing.T, s *amdhip.Stream, work func()) time.Duration {
	t.Helper()
	start, stop := newEvent(t, s.Device()), newEvent(t, s.Device())
	noError(t, s.Record(start))
	work()
	noError(t, s.Record(stop))
	noError(t, stop.Synchronize())
	return value(stop.Elapsed(start))(t)
}

// In a synctest bubble the clock stands still while memory is copied, so times are exact.
func TestLink(t *testing.T) {
	const kb = 1000 // at 1 GB/s, 1 kB takes 1 µs
	tests := []struct {
		name    string
		latency time.Duration
		work    func(t *testing.T, s []*amdhip.Stream, m *amdhip.Memory, h *amdhip.HostMemory)
		want    time.Duration
	}{
		{"one copy", 0, func(t *testing.T, s []*amdhip.Stream, m *amdhip.Memory, h *amdhip.HostMemory) {
			noError(t, s[0].CopyToDevice(m.Ptr(), h, 0, 700*kb))
		}, 700 * time.Microsecond},
		{"latency", 30 * time.Microsecond, func(t *testing.T, s []*amdhip.Stream, m *amdhip.Memory, h *amdhip.HostMemory) {
			noError(t, s[0].CopyToDevice(m.Ptr(), h, 0, 700*kb))
			noError(t, s[0].CopyToHost(h, 0, m.Ptr(), 10*kb))
		}, 770 * time.Microsecond},
		{"streams share it", 0, func(t *testing.T, s []*amdhip.Stream, m *amdhip.Memory, h *amdhip.HostMemory) {
			for i := range 8 {
				noError(t, s[i%4].CopyToDevice(m.Ptr(), h, 0, 500*kb))
			}
		}, 4 * time.Millisecond},
		{"streams hide latency", 200 * time.Microsecond, func(t *testing.T, s []*amdhip.Stream, m *amdhip.Memory,
			h *amdhip.HostMemory,
		) {
			for i := range 8 {
				noError(t, s[i%4].CopyToDevice(m.Ptr(), h, 0, 500*kb))
			}
		}, 4*time.Millisecond + 200*time.Microsecond},
		{"directions are apart", 0, func(t *testing.T, s []*amdhip.Stream, m *amdhip.Memory, h *amdhip.HostMemory) {
			noError(t, s[0].CopyToDevice(m.Ptr(), h, 0, 500*kb))
			noError(t, s[1].CopyToHost(h, 500*kb, m.Ptr()+500*kb, 300*kb))
		}, 500 * time.Microsecond},
		{"work on the device is free", time.Millisecond, func(t *testing.T, s []*amdhip.Stream, m *amdhip.Memory,
			_ *amdhip.HostMemory,
		) {
			noError(t, s[0].Memset(m.Ptr(), 1, 500*kb))
		}, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, d := openSoft(t, Options{LinkBytesPerSecond: 1e9, LinkLatency: tt.latency})
				m, h := newMemory(t, d, 1000*kb), newPinned(t, d, 1000*kb)
				streams := []*amdhip.Stream{newStream(t, d), newStream(t, d), newStream(t, d), newStream(t, d)}
				began := time.Now()
				got := elapsed(t, streams[0], func() {
					tt.work(t, streams, m, h)
					synctest.Wait() // the streams have taken up what there is
					for _, s := range streams[1:] {
						e := newEvent(t, d)
						noError(t, s.Record(e))
						noError(t, streams[0].Wait(e))
					}
				})
				// Events count in milliseconds, as float32.
				if diff := got - tt.want; diff.Abs() > time.Microsecond {
					t.Errorf("the events are %v apart, want %v", got, tt.want)
				}
				if diff := time.Since(began) - tt.want; diff.Abs() > time.Microsecond {
					t.Errorf("it took %v, want %v", time.Since(began), tt.want)
				}
			})
		})
	}
}

// On the real clock goroutines oversleep; the model's times must not add that up.
func TestLinkKeepsRate(t *testing.T) {
	_, d := openSoft(t, Options{LinkBytesPerSecond: 1e9})
	const chunk, chunks = 1 * mib, 60
	m, h := newMemory(t, d, chunk), newPinned(t, d, chunk)
	s := newStream(t, d)
	stall(t, s, m.Ptr()) // until all copies are queued
	stop, start := newEvent(t, d), newEvent(t, d)
	noError(t, s.Record(start))
	for range chunks {
		noError(t, s.CopyToDevice(m.Ptr(), h, 0, chunk))
	}
	noError(t, s.Record(stop))
	Of(d.Runtime()).ClearFaults()
	noError(t, stop.Synchronize())
	seconds := value(stop.Elapsed(start))(t).Seconds()
	if rate := chunk * chunks / seconds; rate < 0.995e9 || rate > 1.005e9 {
		t.Errorf("%.4g bytes per second, want 1e9", rate)
	}
}

// The bytes of a long copy are read while the link moves them: half way through, the second half can still change.
func TestLinkReadsLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 32 * mib
		_, d := openSoft(t, Options{LinkBytesPerSecond: n * 10}) // 100 ms
		s, m, h := newStream(t, d), newMemory(t, d, n), newPinned(t, d, n)
		noError(t, s.CopyToDevice(m.Ptr(), h, 0, n))
		time.Sleep(50 * time.Millisecond)
		synctest.Wait()
		fill(h.Bytes(), 1)
		noError(t, s.Synchronize())
		got := readBack(t, m)
		for _, tt := range []struct {
			name string
			at   int
			want byte
		}{{"first", 0, 0}, {"at 49 %", n / 100 * 49, 0}, {"at 51 %", n / 100 * 51, 1}, {"last", n - 1, 1}} {
			if got[tt.at] != tt.want {
				t.Errorf("byte %s: %d, want %d", tt.name, got[tt.at], tt.want)
			}
		}
	})
}

func TestLinkOfPeers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rt, d0 := openSoft(t, Options{Devices: 2, LinkBytesPerSecond: 1e9, LinkLatency: 10 * time.Microsecond})
		d1 := value(rt.Device(1))(t)
		m0, m1 := newMemory(t, d0, 1e6), newMemory(t, d1, 1e6)
		s := newStream(t, d1)
		got := elapsed(t, s, func() { noError(t, s.CopyPeer(m1.Ptr(), m0.Ptr(), d0, 1e6)) })
		if want := 1010 * time.Microsecond; (got - want).Abs() > time.Microsecond {
			t.Errorf("the copy took %v, want %v", got, want)
		}
	})
}

func BenchmarkSoftEnqueue(b *testing.B) {
	_, d := openSoft(b, Options{})
	s, m, h := newStream(b, d), newMemory(b, d, 64), newPinned(b, d, 64)
	for i := 0; b.Loop(); i++ {
		noError(b, s.CopyToDevice(m.Ptr(), h, 0, 64))
		if i%1000 == 0 {
			noError(b, s.Synchronize())
		}
	}
	noError(b, s.Synchronize())
}

func BenchmarkSoftCopy(b *testing.B) {
	_, d := openSoft(b, Options{Memory: 1 << 30})
	const n = 4 * mib
	s, m, h := newStream(b, d), newMemory(b, d, 16*n), newPinned(b, d, n)
	b.SetBytes(n)
	for i := 0; b.Loop(); i++ {
		noError(b, s.CopyToDevice(m.Ptr()+amdhip.DevicePtr(i%16*n), h, 0, n))
		if i%16 == 0 {
			noError(b, s.Synchronize())
		}
	}
	noError(b, s.Synchronize())
}
