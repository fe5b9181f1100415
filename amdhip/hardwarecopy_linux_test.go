package amdhip

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"testing"
	"time"
)

// TestHardwareCopies copies to the device and back, from every kind of host memory: a few bytes, odd sizes and odd
// places, and more than one packet of AMD's copy engine, which holds 4 MiB.
func TestHardwareCopies(t *testing.T) {
	d := openHardware(t)
	const n = 9<<20 + 5
	m := closing(t, must(d.Malloc(n))(t), nil)
	s := closing(t, must(d.NewStream())(t), nil)
	back := closing(t, must(d.HostMalloc(n))(t), nil)
	page := os.Getpagesize()
	all := make([]byte, n+2*page)
	kinds := map[string]*HostMemory{
		"hipHostMalloc":   closing(t, must(d.HostMalloc(n))(t), nil),
		"hipHostRegister": closing(t, must(d.HostRegister(all))(t), nil),
		"pageable":        closing(t, must(d.HostPlain(n))(t), nil),
	}
	random := rand.NewChaCha8([32]byte{})
	for kind, h := range kinds {
		random.Read(h.Bytes())
		for _, c := range []struct{ at, n int }{{0, 1}, {3, 64}, {0, page}, {page - 1, page + 2}, {1, 5<<20 + 3}, {0, n}} {
			clear(back.Bytes())
			check(t, s.CopyToDevice(m.Ptr()+DevicePtr(c.at), h, c.at, c.n))
			check(t, s.CopyToHost(back, c.at, m.Ptr()+DevicePtr(c.at), c.n))
			check(t, s.Synchronize())
			if got, want := back.Bytes()[c.at:c.at+c.n], h.Bytes()[c.at:c.at+c.n]; !bytes.Equal(got, want) {
				t.Errorf("%s: %d bytes at %d are not what was copied", kind, c.n, c.at)
			}
			if other := append(bytes.Clone(back.Bytes()[:c.at]), back.Bytes()[c.at+c.n:]...); len(bytes.Trim(other, "\x00")) > 0 {
				t.Errorf("%s: a copy of %d bytes at %d wrote beside them", kind, c.n, c.at)
			}
		}
	}
	if base, size, err := d.AddressRangeOf(m.Ptr() + 100); err != nil || base != m.Ptr() || size != n {
		t.Errorf("%d bytes at %#x, %v; allocated were %d at %#x", size, base, err, n, m.Ptr())
	}
}

// TestHardwareOrder lets two streams write the same memory in turns, ordered by events only.
func TestHardwareOrder(t *testing.T) {
	d := openHardware(t)
	const n, rounds = 1 << 16, 40
	a, b := newBench(t, d), newBench(t, d)
	m := closing(t, must(d.Malloc(n))(t), nil)
	from := closing(t, must(d.HostMalloc(rounds*n))(t), nil)
	to := closing(t, must(d.HostMalloc(rounds*n))(t), nil)
	rand.NewChaCha8([32]byte{1}).Read(from.Bytes())
	for i := range rounds {
		check(t, a.s.Wait(b.e))
		check(t, a.s.CopyToDevice(m.Ptr(), from, i*n, n))
		check(t, a.s.Record(a.e))
		check(t, b.s.Wait(a.e))
		check(t, b.s.CopyToHost(to, i*n, m.Ptr(), n))
		check(t, b.s.Record(b.e))
	}
	check(t, b.e.Synchronize())
	for _, e := range []*Event{a.e, b.e} {
		if done, err := e.Query(); !done || err != nil {
			t.Errorf("event: got %v, %v, want done", done, err)
		}
	}
	if !bytes.Equal(to.Bytes(), from.Bytes()) {
		t.Error("the streams did not wait for one another")
	}
}

// TestHardwareMemory fills the device's memory, and takes more than there is.
func TestHardwareMemory(t *testing.T) {
	d := openHardware(t)
	before, total, err := d.MemInfo()
	check(t, err)
	if before > total || total != d.TotalMemory() {
		t.Errorf("%d bytes free of %d; the device says that it has %d", before, total, d.TotalMemory())
	}
	_, err = d.Malloc(1 << 50)
	wantCode(t, err, "hipMalloc", ErrOutOfMemory)
	m := must(d.Malloc(64 << 20))(t)
	if during, _, err := d.MemInfo(); err != nil || before-during < 64<<20 {
		t.Errorf("%d bytes are free after allocating, %d before, %v", during, before, err)
	}
	check(t, m.Close())
	if after, _, err := d.MemInfo(); err != nil || after < before {
		t.Errorf("%d bytes are free at the end, %d before, %v", after, before, err)
	}
}

// TestModelDefers overwrites the source of a copy that was started and not executed: the device must get the later
// bytes. Only the model of testdata/rigs/hsa-model can hold a copy up: as long as the file exists that HSAMODEL_GATE
// names.
func TestModelDefers(t *testing.T) {
	gate := os.Getenv("HSAMODEL_GATE")
	if gate == "" {
		t.Skip("HSAMODEL_GATE names no file: this test needs the model of testdata/rigs/hsa-model")
	}
	b := newBench(t, openHardware(t))
	if done, err := b.e.Query(); !done || err != nil {
		t.Errorf("never recorded: got %v, %v, want done", done, err)
	}
	for round := range 3 {
		first, later := bytes.Repeat([]byte{byte(round)}, 64), bytes.Repeat([]byte{byte(round + 10)}, 64)
		check(t, os.WriteFile(gate, nil, 0o600))
		copy(b.h.Bytes(), first)
		check(t, b.s.CopyToDevice(b.m.Ptr(), b.h, 0, 64))
		check(t, b.s.Record(b.e))
		if done, err := b.e.Query(); done || err != nil {
			t.Errorf("event: got %v, %v, want not done", done, err)
		}
		if done, err := b.s.Query(); done || err != nil {
			t.Errorf("stream: got %v, %v, want not done", done, err)
		}
		_, err := b.e.Elapsed(b.e)
		wantCode(t, err, "hipEventElapsedTime", ErrNotReady)
		copy(b.h.Bytes(), later)
		check(t, os.Remove(gate))
		check(t, b.e.Synchronize())
		clear(b.h.Bytes())
		check(t, errors.Join(b.s.CopyToHost(b.h, 0, b.m.Ptr(), 64), b.s.Synchronize()))
		if !bytes.Equal(b.h.Bytes(), later) {
			t.Errorf("round %d: the device has % x, want the bytes at the time of execution", round, b.h.Bytes())
		}
		if d, err := b.e.Elapsed(b.e); err != nil || d != 0*time.Second {
			t.Errorf("elapsed from an event to itself: %v, %v", d, err)
		}
	}
}
