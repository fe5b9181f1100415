package pinned_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

// TestSeveralDevices copies each buffer to two devices, one behind a slow link: a buffer set free when the first copy has ended would
// show on the other device.
func TestSeveralDevices(t *testing.T) {
	const n = 60
	dev, _ := device(t, amdhip.SoftwareOptions{Devices: 2, LinkBytesPerSecond: 1e9, Poison: true})
	other, err := dev.Runtime().Device(1)
	if err != nil {
		t.Fatal(err)
	}
	p, err := pinned.New(dev, pinned.Options{Budget: 2 * buf, BufferBytes: buf, Timing: true, More: []*amdhip.Device{other}})
	if err != nil {
		t.Fatal(err)
	}
	mem := []*amdhip.Memory{newMemory(t, dev, n*buf), newMemory(t, other, n*buf)}
	streams := []*amdhip.Stream{newStream(t, dev), newStream(t, other)}
	ballast := newMemory(t, other, buf)
	rec := newRecorder()
	for i := range n {
		b, err := p.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for j := range b.Bytes() {
			b.Bytes()[j] = byte(i + 1)
		}
		for range 2 * (i % 2) { // the other device is later every second time
			if err := b.CopyToDevice(streams[1], ballast.Ptr(), buf); err != nil {
				t.Fatal(err)
			}
		}
		for d, s := range streams {
			if err := b.CopyToDevice(s, mem[d].Ptr()+amdhip.DevicePtr(i*buf), buf); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.ReleaseAfterAll(streams, rec, i); err != nil {
			t.Fatal(err)
		}
	}
	for range n {
		<-rec.told
	}
	for i, err := range rec.errs {
		if err != nil || rec.took[i] < buf*time.Nanosecond-time.Microsecond { // at 10^9 bytes per second
			t.Errorf("copy %d took %v: %v", rec.tags[i], rec.took[i], err)
		}
	}
	b, err := p.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for d, s := range streams {
		for i := range n {
			if err := errors.Join(b.CopyToHost(s, mem[d].Ptr()+amdhip.DevicePtr(i*buf), buf), s.Synchronize()); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(b.Bytes(), bytes.Repeat([]byte{byte(i + 1)}, buf)) {
				t.Fatalf("device %d: copy %d arrived with other bytes", d, i)
			}
		}
	}
	b.Release()
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// TestSeveralDevicesFail: a copy to the second device fails. The error says so, and comes when the other copy has ended, too.
func TestSeveralDevicesFail(t *testing.T) {
	dev, sw := device(t, amdhip.SoftwareOptions{Devices: 2})
	other, err := dev.Runtime().Device(1)
	if err != nil {
		t.Fatal(err)
	}
	p, err := pinned.New(dev, pinned.Options{Budget: buf, BufferBytes: buf, More: []*amdhip.Device{other}})
	if err != nil {
		t.Fatal(err)
	}
	mem := []*amdhip.Memory{newMemory(t, dev, buf), newMemory(t, other, buf)}
	streams := []*amdhip.Stream{newStream(t, dev), newStream(t, other)}
	sw.Inject(amdhip.Fault{Func: "hipMemcpyAsync", N: 1, Stall: true})
	sw.Inject(amdhip.Fault{Func: "hipMemcpyAsync", N: 2, Code: amdhip.ErrIllegalAddress, Async: true})
	b, err := p.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for d, s := range streams {
		if err := b.CopyToDevice(s, mem[d].Ptr(), buf); err != nil {
			t.Fatal(err)
		}
	}
	rec := newRecorder()
	if err := b.ReleaseAfterAll(streams, rec, 7); err != nil {
		t.Fatal(err)
	}
	for done := false; !done; { // the second copy has failed
		if done, err = streams[1].Query(); err != nil {
			break
		}
	}
	select {
	case <-rec.told:
		t.Fatal("the buffer is free although the first device still reads it")
	case <-time.After(5 * time.Millisecond):
	}
	sw.ClearFaults()
	<-rec.told
	if !errors.Is(rec.errs[0], amdhip.ErrIllegalAddress) || !strings.HasPrefix(rec.errs[0].Error(), "device 1: ") {
		t.Errorf("%v, want %v of device 1", rec.errs[0], amdhip.ErrIllegalAddress)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}
