package amdhip

import (
	"errors"
	"fmt"
	"math"
	"unsafe"
)

// Module is compiled code, loaded to one device. Its methods are safe for concurrent use. The caller must Close it.
type Module struct {
	handle
	raw   uintptr
	image []byte // outside Go's heap: HIP may read it for as long as the module exists
}

// Function is a kernel of a Module, to be launched on a Stream. It is valid until its Module is closed.
type Function struct {
	module *Module
	name   string
	raw    uintptr
}

// LoadModule loads a code object to the device: what Runtime.Compile returns, or an ELF file or fat binary of AMD's
// compilers. The bytes are copied. Code that is none gives an error matching ErrInvalidImage, code for another
// architecture one matching ErrNoBinaryForGPU or, depending on HIP's version, ErrInvalidImage. HIP believes what the code
// says about its own length, so a file that was cut short may crash the process: check what was stored.
func (d *Device) LoadModule(code []byte) (*Module, error) {
	rt := d.rt
	if rt.api.hipModuleLoadData == nil || rt.api.hipModuleUnload == nil || rt.api.hipModuleGetFunction == nil ||
		rt.api.hipModuleLaunchKernel == nil {
		return nil, rt.missing("hipModuleLoadData")
	}
	if len(code) == 0 {
		return nil, rt.fail("hipModuleLoadData", ErrInvalidImage, "not called: 0 bytes of code")
	}
	image, err := mapAnonymous(len(code) + 1)
	if err != nil {
		return nil, fmt.Errorf("amdhip: mapping %d bytes: %w", len(code)+1, err)
	}
	copy(image, code)
	var raw uintptr
	err = d.current("hipModuleLoadData", fmt.Sprintf("%d bytes of code", len(code)), func() Status {
		return rt.api.hipModuleLoadData(&raw, uintptr(unsafe.Pointer(unsafe.SliceData(image))))
	})
	if err != nil {
		return nil, errors.Join(err, unmapAnonymous(image))
	}
	m := &Module{raw: raw, image: image}
	m.track(d, "module", 1)
	return m, nil
}

// Device returns the device that the module was loaded to.
func (m *Module) Device() *Device { return m.dev }

// Function looks up the kernel of that name, one declared extern "C" __global__. If the module has none the error matches
// ErrNotFound.
func (m *Module) Function(name string) (*Function, error) {
	if err := m.enter(); err != nil {
		return nil, err
	}
	defer m.leave()
	f := &Function{module: m, name: name}
	err := m.dev.onThread("hipModuleGetFunction", fmt.Sprintf("%q", name), func() Status {
		return m.dev.rt.api.hipModuleGetFunction(&f.raw, m.raw, name)
	})
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Close unloads the code. HIP does not wait for kernels of it, so their streams must be done with them; on the software
// device those that are queued still run. It is idempotent.
func (m *Module) Close() error {
	return m.shut(func() error {
		err := m.dev.onThread("hipModuleUnload", m.what, func() Status { return m.dev.rt.api.hipModuleUnload(m.raw) })
		if err != nil {
			return err // HIP still has the module, so its code stays where it is
		}
		return unmapAnonymous(m.image)
	})
}

// Launch starts f on blocks·threads threads, as a grid of one dimension, and returns; the threads must be fewer than 2^32
// in all. Every parameter of the kernel must have 8 bytes: args are their values, which are copied. HIP does not know how
// many parameters a kernel has and reads what is not there; the software device refuses a wrong number of args. Memory
// that the kernel works on must stay allocated until it is done. Stream and module must belong to one device, else the
// error matches ErrInvalidHandle.
func (s *Stream) Launch(f *Function, blocks, threads uint32, args ...uint64) error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	m := f.module
	if err := m.enter(); err != nil {
		return err
	}
	defer m.leave()
	if err := s.sameRuntime(&m.handle); err != nil {
		return err
	}
	rt := s.dev.rt
	if s.dev != m.dev {
		return rt.fail("hipModuleLaunchKernel", ErrInvalidHandle, "not called: %s of %s, %s", f.name, m.what, s.what)
	}
	if n := uint64(blocks) * uint64(threads); n == 0 || n > math.MaxUint32 {
		return rt.fail("hipModuleLaunchKernel", ErrInvalidValue, "not called: %s with %d blocks of %d threads",
			f.name, blocks, threads)
	}
	// HIP reads the values through these pointers during the call. All of it is on the heap, where nothing moves: the table's
	// functions are unknown to the compiler, so what is given to them escapes.
	params := make([]unsafe.Pointer, len(args)+1)
	for i := range args {
		params[i] = unsafe.Pointer(&args[i])
	}
	err := s.dev.onThread("hipModuleLaunchKernel", "", func() Status {
		return rt.api.hipModuleLaunchKernel(f.raw, blocks, 1, 1, threads, 1, 1, 0, s.raw, &params[0], nil)
	})
	if e, ok := errors.AsType[*Error](err); ok { // put together here only: launches are on the hot path
		e.Detail = fmt.Sprintf("%s with %d blocks of %d threads, %s", f.name, blocks, threads, e.Detail)
	}
	return err
}
