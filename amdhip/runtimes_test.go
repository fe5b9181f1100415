package amdhip_test

import (
	"errors"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
)

// twoDevices opens a software machine with two devices, which ends with the test.
func twoDevices(t *testing.T) (d0, d1 *amdhip.Device) {
	t.Helper()
	rt, err := soft.OpenRuntime(soft.Options{Devices: 2, Memory: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
	d0, err0 := rt.Device(0)
	d1, err1 := rt.Device(1)
	if err := errors.Join(err0, err1); err != nil {
		t.Fatal(err)
	}
	return d0, d1
}

// TestDevicesOfTwoRuntimes: device 1 of one runtime is not device 1 of another, although they have one number.
func TestDevicesOfTwoRuntimes(t *testing.T) {
	t.Parallel()
	d0, d1 := twoDevices(t)
	_, foreign := twoDevices(t)
	s, err1 := d0.NewStream()
	m0, err2 := d0.Malloc(64)
	m1, err3 := d1.Malloc(64)
	e, err4 := d0.NewEvent(amdhip.EventOptions{Timing: true})
	other, err5 := foreign.NewEvent(amdhip.EventOptions{Timing: true})
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		t.Fatal(err)
	}
	_, elapsed := e.Elapsed(other)
	_, can := d0.CanAccessPeer(foreign)
	for _, tt := range []struct {
		name      string
		got, want error
	}{
		{"CanAccessPeer", can, amdhip.ErrInvalidDevice},
		{"EnablePeerAccess", d0.EnablePeerAccess(foreign), amdhip.ErrInvalidDevice},
		{"DisablePeerAccess", d0.DisablePeerAccess(foreign), amdhip.ErrInvalidDevice},
		{"CopyPeer", s.CopyPeer(m0.Ptr(), m1.Ptr(), foreign, 64), amdhip.ErrInvalidDevice},
		{"Wait", s.Wait(other), amdhip.ErrInvalidHandle},
		{"Record", s.Record(other), amdhip.ErrInvalidHandle},
		{"Elapsed", elapsed, amdhip.ErrInvalidHandle},
	} {
		if !errors.Is(tt.got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, tt.got, tt.want)
		}
	}
	// Nothing of it may have reached the device: peer access is off, and the stream is well.
	if err := d0.DisablePeerAccess(d1); !errors.Is(err, amdhip.ErrPeerAccessNotEnabled) {
		t.Errorf("peer access was switched: %v", err)
	}
	if err := errors.Join(s.Synchronize(), s.Close(), m0.Close(), m1.Close(), e.Close(), other.Close()); err != nil {
		t.Error(err)
	}
}

// TestUnsupported: whoever knows only the standard library's error finds out, too.
func TestUnsupported(t *testing.T) {
	t.Parallel()
	for _, err := range []error{
		amdhip.ErrUnsupported, amdhip.ErrNotSupported, amdhip.ErrPeerAccessUnsupported,
		&amdhip.Error{Func: "hipMallocAsync", Code: amdhip.ErrNotSupported},
		&amdhip.Error{Func: "hipDeviceEnablePeerAccess", Code: amdhip.ErrPeerAccessUnsupported},
		&amdhip.CompilerError{},
	} {
		if !errors.Is(err, errors.ErrUnsupported) || !errors.Is(err, amdhip.ErrUnsupported) {
			t.Errorf("%v does not match both errors", err)
		}
	}
	for _, err := range []error{
		amdhip.ErrOutOfMemory, amdhip.ErrClosed, &amdhip.Error{Code: amdhip.ErrUnknown},
		amdhip.ErrRTCInternal,
	} {
		if errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%v matches errors.ErrUnsupported", err)
		}
	}
}
