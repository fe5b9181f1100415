package soft

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// Flip is damage that no call reports: one bit that changes, on the way to a device or later. Either Copy or Rest says
// when.
type Flip struct {
	// Copy is the number of a copy from the host to any device, from when the Flip is given on; the first is 1. The bit
	// is wrong in what the copy delivers. Its source stays as it is.
	Copy int
	// Rest flips the bit in memory of the device once nothing has been allocated there and nothing been copied there for
	// so long.
	Rest time.Duration
	// Device is the number of the device of Rest.
	Device int
	// Byte is where: from the beginning of what the copy delivers, or of the largest piece of memory that the device has
	// when Rest is over. Behind the end it is counted from the beginning again.
	Byte uint64
	Bit  uint8 // 0 to 7
}

// String returns the flip as UnmarshalText takes it.
func (f Flip) String() string {
	when := strconv.Itoa(f.Copy)
	if f.Copy == 0 {
		when = f.Rest.String()
	}
	text := fmt.Sprintf("%s:%d:%d", when, f.Byte, f.Bit)
	if f.Device != 0 {
		text += ":" + strconv.Itoa(f.Device)
	}
	return text
}

// UnmarshalText reads WHEN:BYTE:BIT or WHEN:BYTE:BIT:DEVICE. WHEN is the number of a copy, such as 3, or how long the
// device has been at rest, such as 500ms.
func (f *Flip) UnmarshalText(text []byte) error {
	want := errors.New("allowed is WHEN:BYTE:BIT[:DEVICE], such as 3:4096:7 for the third copy to a device, or 500ms:4096:7 for " +
		"device 0 when it has been at rest for so long")
	words := strings.Split(string(text), ":")
	if len(words) != 3 && len(words) != 4 {
		return want
	}
	var read Flip
	var errs [4]error
	if read.Copy, errs[0] = strconv.Atoi(words[0]); errs[0] != nil {
		read.Rest, errs[0] = time.ParseDuration(words[0])
	}
	read.Byte, errs[1] = strconv.ParseUint(words[1], 10, 64)
	bit, err := strconv.ParseUint(words[2], 10, 8)
	read.Bit, errs[2] = uint8(bit), err
	if len(words) == 4 {
		read.Device, errs[3] = strconv.Atoi(words[3])
	}
	if errors.Join(errs[:]...) != nil || read.check(maxDevices) != nil {
		return want
	}
	*f = read
	return nil
}

// check says what is wrong with f on a machine that has so many devices.
func (f Flip) check(devices int) error {
	switch {
	case f.Bit > 7:
		return fmt.Errorf("flip bit %d of a byte", f.Bit)
	case f.Copy < 0 || f.Rest < 0 || (f.Copy == 0) == (f.Rest == 0):
		return fmt.Errorf("flip a bit of copy %d, and after a rest of %v: want one of them", f.Copy, f.Rest)
	case f.Device < 0 || f.Device >= devices:
		return fmt.Errorf("flip a bit of device %d of %d", f.Device, devices)
	}
	return nil
}

// Flip arranges for a bit to be flipped. Stats.Flips counts those that were.
func (sw *Software) Flip(f Flip) error {
	if err := f.check(len(sw.devices)); err != nil {
		return fmt.Errorf("software device: %w", err)
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if sw.closed {
		return hip.ErrDeinitialized
	}
	if f.Copy > 0 {
		sw.flips = append(sw.flips, f)
		return nil
	}
	sw.ended.Go(func() { sw.flipAtRest(f) })
	return nil
}

// FlipBit inverts one bit (0 to 7) of the byte at p, an address of device memory or of pinned host memory, at once.
func (sw *Software) FlipBit(p amdhip.DevicePtr, bit uint8) error {
	if bit > 7 {
		return fmt.Errorf("flip bit %d of a byte", bit)
	}
	b, st := sw.hold(uintptr(p), 1, func(*region) bool { return true })
	if st != hip.Success {
		return fmt.Errorf("flip a bit at %#x: %w", uintptr(p), st)
	}
	defer sw.release(b.block)
	b.mem[0] ^= 1 << bit
	sw.flipped.Add(1)
	return nil
}

// deliver is called when a copy from the host has written mem, which is memory of dev, and flips what is due.
func (sw *Software) deliver(dev *device, mem []byte) {
	sw.mu.Lock()
	defer sw.mu.Unlock()
	sw.touch(dev)
	kept := sw.flips[:0]
	for _, f := range sw.flips {
		if f.Copy--; f.Copy > 0 {
			kept = append(kept, f)
			continue
		}
		mem[f.Byte%uint64(len(mem))] ^= 1 << f.Bit
		sw.flipped.Add(1)
	}
	sw.flips = kept
}

// touch notes that something was allocated on dev or copied there. sw.mu is held.
func (sw *Software) touch(dev *device) { dev.touched = sw.now() + 1 }

// restPoll is how often flipAtRest looks whether its device has memory at all.
const restPoll = time.Millisecond

// flipAtRest waits until the device of f has been at rest, and flips the bit.
func (sw *Software) flipAtRest(f Flip) {
	dev := sw.devices[f.Device]
	for {
		sw.mu.Lock()
		left := restPoll
		if dev.touched > 0 {
			left = dev.touched + f.Rest - sw.now()
		}
		var b held
		if dev.touched > 0 && left <= 0 {
			left = restPoll
			if r := sw.largest(dev); r != nil {
				r.block.refs++
				b = held{r.block.mem[f.Byte%uint64(r.size()):][:1], r.block}
			}
		}
		sw.mu.Unlock()
		if b.block != nil {
			b.mem[0] ^= 1 << f.Bit
			sw.release(b.block)
			sw.flipped.Add(1)
			return
		}
		select {
		case <-time.After(left):
		case <-sw.quit:
			return
		}
	}
}

// largest returns the largest piece of the device's memory; of an integrated one that is memory of the host. sw.mu is
// held.
func (sw *Software) largest(dev *device) (most *region) {
	look := func(l regionList, of func(*region) bool) {
		for _, r := range l {
			if of(r) && (most == nil || r.size() > most.size()) {
				most = r
			}
		}
	}
	look(dev.regions, func(r *region) bool { return r.kind == deviceRegion })
	look(sw.virtual, func(r *region) bool { return r.physical.dev == dev && !r.physical.imported })
	if sw.opts.Integrated {
		look(sw.host, func(r *region) bool { return r.dev == dev && r.given })
	}
	return most
}
