package amdhip

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hostmem"
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
// compilers. The bytes are copied. Bytes that are no code give an error matching ErrInvalidImage; code for another
// architecture one matching ErrNoBinaryForGPU or, depending on the version of HIP, ErrInvalidImage. HIP trusts the
// length that the code states, so a file that was cut short may crash the process: compare stored code with a checksum
// before loading it.
func (d *Device) LoadModule(code []byte) (*Module, error) {
	rt := d.rt
	if rt.api.HipModuleLoadData == nil || rt.api.HipModuleUnload == nil || rt.api.HipModuleGetFunction == nil ||
		rt.api.HipModuleLaunchKernel == nil {
		return nil, rt.missing("hipModuleLoadData")
	}
	if len(code) == 0 {
		return nil, rt.fail("hipModuleLoadData", ErrInvalidImage, "not called: 0 bytes of code")
	}
	image, err := hostmem.Map(len(code) + 1)
	if err != nil {
		return nil, fmt.Errorf("amdhip: mapping %d bytes: %w", len(code)+1, err)
	}
	copy(image, code)
	var raw uintptr
	err = d.current("hipModuleLoadData", fmt.Sprintf("%d bytes of code", len(code)), func() Status {
		return rt.api.HipModuleLoadData(&raw, uintptr(unsafe.Pointer(unsafe.SliceData(image))))
	})
	if err != nil {
		return nil, errors.Join(err, hostmem.Unmap(image))
	}
	m := &Module{raw: raw, image: image}
	m.track(d, "module", 1)
	return m, nil
}

// Device returns the device that the module was loaded to.
func (m *Module) Device() *Device { return m.dev }

// Function looks up the kernel of that name, one declared extern "C" __global__. If the module has none the error
// matches ErrNotFound.
func (m *Module) Function(name string) (*Function, error) {
	if err := m.enter(); err != nil {
		return nil, err
	}
	defer m.leave()
	f := &Function{module: m, name: name}
	err := m.dev.onThread("hipModuleGetFunction", fmt.Sprintf("%q", name), func() Status {
		return m.dev.rt.api.HipModuleGetFunction(&f.raw, m.raw, name)
	})
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Handle returns HIP's own handle of the module (hipModule_t). It is valid until Close.
func (m *Module) Handle() uintptr { return m.raw }

// Module returns the module that the kernel is in.
func (f *Function) Module() *Module { return f.module }

// Name returns the kernel's name.
func (f *Function) Name() string { return f.name }

// Handle returns HIP's own handle of the kernel (hipFunction_t). It is valid until its Module is closed.
func (f *Function) Handle() uintptr { return f.raw }

// Close unloads the code. HIP does not wait for kernels of it, so their streams must be done with them; on the software
// device those that are queued still run. It is idempotent.
func (m *Module) Close() error {
	return m.shut(func() error {
		err := m.dev.onThread("hipModuleUnload", m.what, func() Status { return m.dev.rt.api.HipModuleUnload(m.raw) })
		if err != nil {
			return err // HIP still has the module, so its code stays where it is
		}
		return hostmem.Unmap(m.image)
	})
}
