package soft

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// upload copies src to the device and waits for that.
func upload(t *testing.T, d *amdhip.Device, to *amdhip.Memory, src *amdhip.HostMemory) {
	t.Helper()
	s := value(d.NewStream())(t)
	noError(t, s.CopyToDevice(to.Ptr(), src, 0, len(src.Bytes())))
	noError(t, s.Synchronize())
	noError(t, s.Close())
}

func TestFlipOfCopies(t *testing.T) {
	rt, d := openSoft(t, Options{Flips: []Flip{
		{Copy: 2, Byte: 5, Bit: 7}, {Copy: 2, Byte: 16 + 6}, {Copy: 3, Byte: 1, Bit: 1},
	}})
	m, h := newMemory(t, d, 16), newPinned(t, d, 16)
	for n, want := range [][16]byte{{}, {5: 128, 6: 1}, {1: 2}, {}} {
		upload(t, d, m, h)
		if got := readBack(t, m); [16]byte(got) != want {
			t.Errorf("copy %d delivered % x, want % x", n+1, got, want)
		}
	}
	noError(t, Of(rt).Flip(Flip{Copy: 1, Byte: 3}))
	upload(t, d, m, h)
	if got := readBack(t, m); got[3] != 1 {
		t.Errorf("the copy after Flip delivered % x", got)
	}
	if [16]byte(h.Bytes()) != [16]byte{} {
		t.Errorf("the source is % x now", h.Bytes())
	}
	if n := Of(rt).Stats().Flips; n != 4 {
		t.Errorf("%d flips, want 4", n)
	}
}

func TestFlipAtRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rest = time.Second
		rt, _ := openSoft(t, Options{Devices: 2, Flips: []Flip{{Rest: rest, Byte: 20, Bit: 3, Device: 1}}})
		d := value(rt.Device(1))(t)
		time.Sleep(2 * rest) // there is nothing yet
		small, large, h := newMemory(t, d, 16), newMemory(t, d, 24), newPinned(t, d, 24)
		time.Sleep(rest / 2)
		upload(t, d, large, h)
		time.Sleep(rest - time.Millisecond)
		if n := Of(rt).Stats().Flips; n != 0 {
			t.Fatalf("%d flips after less than the rest", n)
		}
		time.Sleep(2 * time.Millisecond)
		if got := readBack(t, large); got[20] != 8 {
			t.Errorf("at rest: % x, want bit 3 of byte 20", got)
		}
		if got := readBack(t, small); [16]byte(got) != [16]byte{} {
			t.Errorf("the smaller piece of memory: % x", got)
		}
	})
}

func TestFlipAtRestOfIntegrated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, d := openSoft(t, Options{Integrated: true, Flips: []Flip{{Rest: time.Second, Byte: 1}}})
		h := newPinned(t, d, 16)
		_ = value(h.DevicePtr())(t)
		time.Sleep(2 * time.Second)
		if h.Bytes()[1] != 1 {
			t.Errorf("% x", h.Bytes())
		}
	})
}

func TestFlipText(t *testing.T) {
	for text, want := range map[string]Flip{
		"3:4096:7":    {Copy: 3, Byte: 4096, Bit: 7},
		"500ms:9:0:2": {Rest: 500 * time.Millisecond, Byte: 9, Device: 2},
	} {
		var f Flip
		if err := f.UnmarshalText([]byte(text)); err != nil || f != want || f.String() != text {
			t.Errorf("%s is %+v, %v", text, f, err)
		}
	}
	for _, text := range []string{"", "1", "1:2", "0:1:1", "-1:1:1", "1:-1:1", "1:1:8", "1s:1:1:64", "1:1:1:1:1", "x:1:1", "1:1:x"} {
		var f Flip
		if err := f.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is %+v", text, f)
		}
	}
	for _, f := range []Flip{{}, {Copy: 1, Rest: 1}, {Copy: 1, Bit: 8}, {Copy: 1, Device: 1}} {
		if rt, err := OpenRuntime(Options{Flips: []Flip{f}}); err == nil {
			t.Errorf("%+v was taken; %v", f, rt.Close())
		}
	}
}
