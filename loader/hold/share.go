package hold

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/loader"
)

// Share says how other processes get at the device memory of a Holder.
type Share uint8

// Ways to share device memory. ShareFD is virtual memory, passed on as descriptors: the addresses are the same in all
// processes and each time that the model is woken, and the memory stays for as long as one process has it, whatever
// becomes of the Holder. ShareIPC is HIP's IPC handles: the memory is the Holder's and goes with it. ShareAuto takes
// descriptors where all devices have virtual memory and a trial shows that it works.
const (
	ShareAuto Share = iota
	ShareFD
	ShareIPC
)

var shareNames = []string{ShareAuto: "auto", ShareFD: "fd", ShareIPC: "ipc"}

// String returns "auto", "fd" or "ipc".
func (s Share) String() string {
	if int(s) >= len(shareNames) {
		return fmt.Sprintf("number %d", uint8(s))
	}
	return shareNames[s]
}

// MarshalText returns the name.
func (s Share) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText sets the way from its name.
func (s *Share) UnmarshalText(text []byte) error {
	i := slices.Index(shareNames, strings.ToLower(string(text)))
	if i < 0 {
		return fmt.Errorf("unknown way to share %.100q: use %s", text, strings.Join(shareNames, ", "))
	}
	*s = Share(i)
	return nil
}

// choose decides for ShareAuto. With ShareFD it is an error when a device cannot do it.
func (s Share) choose(devices []*amdhip.Device, log *slog.Logger) (Share, error) {
	if int(s) >= len(shareNames) {
		return s, fmt.Errorf("%w: there is no Share number %d", loader.ErrBadOption, uint8(s))
	}
	if s == ShareIPC {
		return s, nil
	}
	for _, dev := range devices {
		err := VirtualMemoryWorks(dev)
		switch {
		case err == nil:
		case s == ShareFD:
			return s, fmt.Errorf("hold: device memory cannot be shared by descriptors: %w", err)
		case !errors.Is(err, amdhip.ErrUnsupported):
			log.Warn("the device has virtual memory that does not work, so models are shared by IPC handles", "device", dev.Name(),
				"error", err)
			return ShareIPC, nil
		default:
			return ShareIPC, nil
		}
	}
	return ShareFD, nil
}

const (
	// sharedAlign is what sizes of shared memory are multiples of: drivers cut smaller pieces from blocks that other
	// allocations share, and large pages are of this size.
	sharedAlign = 2 << 20
	// proofTime is how long a device may take to show that its virtual memory works.
	proofTime = 5 * time.Second
)

// sharedSize is how much device memory an allocation of n bytes takes.
func sharedSize(n uint64) uint64 { return (n + sharedAlign - 1) &^ (sharedAlign - 1) }

// proofs are the trials of VirtualMemoryWorks in this process: *amdhip.Device to *proof.
var proofs sync.Map

// proof is the trial of one device.
type proof struct {
	result func() error
	hangs  atomic.Bool // a call has not come back
}

// VirtualMemoryWorks tries a device's virtual memory, once in each process: it creates some, maps it, copies there and
// back, exports and imports it, and compares. Some of AMD's runtimes say that they have it, and answer success for a
// mapping that has failed or do not come back from a call. The error says what went wrong; it matches
// amdhip.ErrUnsupported when the device does not have virtual memory at all, and loader.ErrStalled when a call does not
// come back. What that call uses, 2 MiB at most, is not freed then before it does.
func VirtualMemoryWorks(dev *amdhip.Device) error {
	if !dev.VirtualMemory() {
		return fmt.Errorf("hold: device %d (%s) has no virtual memory: %w", dev.Index(), dev.Name(), amdhip.ErrUnsupported)
	}
	made := new(proof)
	made.result = sync.OnceValue(func() error { return made.run(dev) })
	p, _ := proofs.LoadOrStore(dev, made)
	return p.(*proof).result()
}

func (p *proof) run(dev *amdhip.Device) error {
	done := make(chan error, 1)
	p.hangs.Store(true)
	go func() {
		err := proveVirtualMemory(dev)
		p.hangs.Store(false)
		done <- err
	}()
	limit := time.NewTimer(proofTime)
	defer limit.Stop()
	select {
	case err := <-done:
		return err
	case <-limit.C:
		return fmt.Errorf("hold: device %d (%s): trying its virtual memory does not end within %v: %w", dev.Index(), dev.Name(),
			proofTime, loader.ErrStalled)
	}
}

// leftOfProofs is what trials that do not come back have taken.
func leftOfProofs(devices []*amdhip.Device) error {
	var left loader.LeftError
	for _, dev := range devices {
		if p, ok := proofs.Load(dev); ok && p.(*proof).hangs.Load() {
			left.DeviceBytes += sharedAlign
			left.HostBytes += 2 * proofBytes
		}
	}
	if left == (loader.LeftError{}) {
		return nil
	}
	return &left
}

// proveVirtualMemory is one trial.
func proveVirtualMemory(dev *amdhip.Device) (err error) {
	var closers []interface{ Close() error }
	defer func() {
		for _, c := range slices.Backward(closers) {
			err = errors.Join(err, c.Close())
		}
	}()
	physical, err := dev.CreatePhysical(sharedAlign, amdhip.PhysicalOptions{Exportable: true})
	if err != nil {
		return err
	}
	closers = append(closers, physical)
	first, err := dev.MapMemory(physical, 0)
	if err != nil {
		return err
	}
	closers = append(closers, first)
	file, err := physical.Export()
	if err != nil {
		return err
	}
	closers = append(closers, file)
	imported, err := dev.ImportPhysical(file, sharedAlign)
	if err != nil {
		return err
	}
	closers = append(closers, imported)
	second, err := dev.MapMemory(imported, 0)
	if err != nil {
		return err
	}
	closers = append(closers, second)
	host, err := dev.HostMalloc(2 * proofBytes)
	if err != nil {
		return err
	}
	closers = append(closers, host)
	stream, err := dev.NewStream()
	if err != nil {
		return err
	}
	closers = append(closers, stream)
	want, got := host.Bytes()[:proofBytes], host.Bytes()[proofBytes:]
	for i := range want {
		want[i], got[i] = byte(i*7+i>>8+1), 0
	}
	if err := stream.CopyToDevice(first.Ptr(), host, 0, proofBytes); err != nil {
		return err
	}
	if err := stream.CopyToHost(host, proofBytes, second.Ptr(), proofBytes); err != nil {
		return err
	}
	if err := stream.Synchronize(); err != nil {
		return err
	}
	if !bytes.Equal(want, got) {
		return fmt.Errorf("hold: device %d (%s): imported memory has other bytes than what was exported", dev.Index(), dev.Name())
	}
	return nil
}

// proofBytes is how much a trial copies.
const proofBytes = 64 << 10

// ranges are the addresses of one held model. They are reserved once, so that the model is at the same place each time
// that it is woken.
type ranges struct {
	mu  sync.Mutex
	all map[rangeKey]*amdhip.AddressRange
}

// rangeKey names an allocation of a model: its device in the plan, and its number there.
type rangeKey struct{ device, i int }

// get returns the addresses for an allocation of size bytes, at hint if they are not reserved yet and HIP allows it.
// Calls for one allocation do not overlap. The lock is not held during calls of HIP, which may last for ever.
func (r *ranges) get(dev *amdhip.Device, k rangeKey, size uint64, hint amdhip.DevicePtr) (*amdhip.AddressRange, error) {
	have := r.at(k)
	if have != nil && have.Size() == size {
		return have, nil
	}
	if have != nil { // the model is laid out in another way now
		r.set(k, nil)
		if err := have.Close(); err != nil {
			return nil, err
		}
	}
	made, err := dev.ReserveAddresses(size, sharedAlign, hint)
	if err != nil {
		return nil, err
	}
	r.set(k, made)
	return made, nil
}

func (r *ranges) at(k rangeKey) *amdhip.AddressRange {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all[k]
}

func (r *ranges) set(k rangeKey, x *amdhip.AddressRange) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.all == nil {
		r.all = make(map[rangeKey]*amdhip.AddressRange)
	}
	if r.all[k] = x; x == nil {
		delete(r.all, k)
	}
}

// lose gives up the addresses of an allocation: what is mapped there could not be unmapped.
func (r *ranges) lose(k rangeKey) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	have := r.all[k]
	delete(r.all, k)
	if have == nil {
		return nil
	}
	return have.Close()
}

// close gives the addresses back. Nothing may be mapped there.
func (r *ranges) close() error {
	r.mu.Lock()
	all := r.all
	r.all = nil
	r.mu.Unlock()
	var errs []error
	for _, x := range all {
		errs = append(errs, x.Close())
	}
	return errors.Join(errs...)
}

// sharedMemory is the device memory of one residence, with descriptors for others.
type sharedMemory struct {
	devices []*amdhip.Device
	ranges  *ranges

	mu  sync.Mutex
	all map[rangeKey]*sharedPiece
}

// sharedPiece is one allocation.
type sharedPiece struct {
	device   *amdhip.Device
	physical *amdhip.PhysicalMemory
	file     *os.File // open for as long as the memory is used: some runtimes need that
	rng      *amdhip.AddressRange
	mapped   bool
	lose     func() error // gives the addresses up, when they cannot be used again
	once     sync.Once    // of Close
	outcome  error
}

func newSharedMemory(devices []*amdhip.Device, r *ranges) *sharedMemory {
	return &sharedMemory{devices: devices, ranges: r, all: make(map[rangeKey]*sharedPiece)}
}

// allocate is loader.Request.Allocate.
func (s *sharedMemory) allocate(device, i int, n uint64) (loader.Mapping, error) {
	dev := s.devices[device]
	physical, err := dev.CreatePhysical(sharedSize(n), amdhip.PhysicalOptions{Exportable: true})
	if err != nil {
		return loader.Mapping{}, err
	}
	file, err := physical.Export()
	if err != nil {
		return loader.Mapping{}, errors.Join(err, physical.Close())
	}
	return s.mapPiece(rangeKey{device, i}, physical, file, 0)
}

// adopt takes over memory of another process by its descriptor, of n bytes, and maps it at hint if HIP allows it. The
// file is closed with the memory, or on an error.
func (s *sharedMemory) adopt(device, i int, file *os.File, n uint64, hint amdhip.DevicePtr) (loader.Mapping, error) {
	physical, err := s.devices[device].ImportPhysical(file, n)
	if err != nil {
		return loader.Mapping{}, errors.Join(err, file.Close())
	}
	return s.mapPiece(rangeKey{device, i}, physical, file, hint)
}

// mapPiece maps memory at the addresses of its allocation.
func (s *sharedMemory) mapPiece(k rangeKey, physical *amdhip.PhysicalMemory, file *os.File,
	hint amdhip.DevicePtr,
) (_ loader.Mapping, err error) {
	p := &sharedPiece{device: s.devices[k.device], physical: physical, file: file}
	p.lose = func() error { return s.ranges.lose(k) }
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	if p.rng, err = s.ranges.get(p.device, k, physical.Size(), hint); err != nil {
		return loader.Mapping{}, err
	}
	if err = p.rng.Map(0, physical); err != nil {
		return loader.Mapping{}, err
	}
	p.mapped = true
	if err = p.rng.SetAccess(0, physical.Size(), amdhip.AccessReadWrite, p.device); err != nil {
		return loader.Mapping{}, err
	}
	base, size, err := p.device.AddressRangeOf(p.rng.Ptr())
	if err != nil && !errors.Is(err, amdhip.ErrUnsupported) {
		return loader.Mapping{}, err
	}
	if err == nil && (base != p.rng.Ptr() || size < physical.Size()) {
		return loader.Mapping{}, fmt.Errorf("hold: %d bytes were mapped at %#x, and the device has %d at %#x: %w", physical.Size(),
			p.rng.Ptr(), size, base, amdhip.ErrInvalidValue)
	}
	s.mu.Lock()
	s.all[k] = p
	s.mu.Unlock()
	return loader.Mapping{Ptr: p.rng.Ptr(), Memory: p}, nil
}

// Close unmaps the memory and gives it up. The addresses stay reserved. It is idempotent.
func (p *sharedPiece) Close() error {
	p.once.Do(func() { p.outcome = p.close() })
	return p.outcome
}

func (p *sharedPiece) close() error {
	var errs []error
	if p.mapped {
		errs = append(errs, p.device.Synchronize()) // unlike hipFree, unmapping does not wait
		if err := p.rng.Unmap(0); err != nil {      // the next residence is to be elsewhere
			errs = append(errs, err, p.lose())
		}
	}
	return errors.Join(append(errs, p.physical.Close(), p.file.Close())...)
}

// pieces returns the allocations, by device and then in the order of the plan.
func (s *sharedMemory) pieces() []*sharedPiece {
	s.mu.Lock()
	defer s.mu.Unlock()
	keys := make([]rangeKey, 0, len(s.all))
	for k := range s.all {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b rangeKey) int {
		if a.device != b.device {
			return a.device - b.device
		}
		return a.i - b.i
	})
	all := make([]*sharedPiece, len(keys))
	for i, k := range keys {
		all[i] = s.all[k]
	}
	return all
}

// files returns the descriptors, in the order of pieces.
func (s *sharedMemory) files() []*os.File {
	if s == nil {
		return nil
	}
	var all []*os.File
	for _, p := range s.pieces() {
		all = append(all, p.file)
	}
	return all
}
