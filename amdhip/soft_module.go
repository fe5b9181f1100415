package amdhip

import (
	"fmt"
	"hash/crc32"
	"math"
	"slices"
	"strings"
	"unsafe"
)

// SoftLaunch is a launch of a kernel on the software device, as the function that stands in for the kernel sees it.
type SoftLaunch struct {
	Blocks, Threads uint32   // of the grid, and of each block
	Args            []uint64 // the kernel's arguments

	sw     *Software
	dev    *softDevice
	run    func(*SoftLaunch) Status
	blocks []*block // that Memory gave out
}

// Memory returns n bytes at p, which must lie inside one live allocation of the stream's device or inside page-locked host
// memory whose HostMemory.DevicePtr was asked for; else the answer is ErrIllegalAddress. The bytes are valid until the
// function that stands in for the kernel returns. It may be called from several goroutines.
func (l *SoftLaunch) Memory(p DevicePtr, n uint64) ([]byte, Status) {
	if n == 0 {
		return nil, Success
	}
	l.sw.mu.Lock()
	defer l.sw.mu.Unlock()
	addr := uintptr(p)
	r, _ := l.sw.lookup(addr, uintptr(n))
	if !r.visible() || r.onDevice() && r.dev != l.dev {
		return nil, ErrIllegalAddress
	}
	r.block.refs++
	l.blocks = append(l.blocks, r.block)
	return r.block.mem[addr-r.addr:][:n:n], Success
}

// softBlockThreads is how many threads a block may have, as on AMD's GPUs.
const softBlockThreads = 1024

// softKernel is a Go function that stands in for a kernel.
type softKernel struct {
	params int
	run    func(*SoftLaunch) Status
}

// Offer makes run stand in for kernels of that name, which take that many parameters of 8 bytes each. hipRTC on the
// software device accepts source whose kernels all have a stand-in. When a launch executes, run is called on the stream's
// goroutine, once for the whole grid; a Status other than Success makes the stream fail, as does touching memory that is
// no longer mapped. The launch takes the time that run takes, and Close of the Runtime waits for it. A panic ends the
// process. A later Offer of the same name is for functions that are looked up after it. Offer panics if run is nil.
func (sw *Software) Offer(kernel string, params int, run func(*SoftLaunch) Status) {
	if run == nil {
		panic("amdhip: Offer: no function for kernel " + kernel)
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	sw.kernels[kernel] = softKernel{params, run}
}

// softModule is loaded code: the names of kernels. It is guarded by Software.mu.
type softModule struct {
	dev       *softDevice
	kernels   []string
	functions []uintptr // that were looked up
}

// softFunction is a kernel that was looked up.
type softFunction struct {
	softKernel
	dev *softDevice
}

// softCode is the code object of the software device: a text, so a C string, that ends with a checksum.
func softCode(arch string, kernels []string) string {
	var b strings.Builder
	b.WriteString(softMagic + arch + "\n")
	for _, name := range kernels {
		b.WriteString(name + "\n")
	}
	return sealed(b.String())
}

const softMagic = "software device code object for "

// sealed appends the checksum.
func sealed(body string) string {
	return fmt.Sprintf("%schecksum %08x\n", body, crc32.ChecksumIEEE([]byte(body)))
}

// parseSoftCode undoes softCode; ok is false for any other text.
func parseSoftCode(code string) (arch string, kernels []string, ok bool) {
	body := code[:max(0, strings.LastIndex(code, "checksum "))]
	rest, ok := strings.CutPrefix(body, softMagic)
	if !ok || sealed(body) != code {
		return "", nil, false
	}
	lines := strings.Split(strings.TrimSuffix(rest, "\n"), "\n")
	return lines[0], lines[1:], true
}

// goString returns the C string that p points to.
func goString(p *byte) string {
	n := 0
	for *(*byte)(unsafe.Add(unsafe.Pointer(p), n)) != 0 {
		n++
	}
	return string(unsafe.Slice(p, n))
}

func (sw *Software) moduleLoadData(module *uintptr, image uintptr) Status {
	if st := sw.call("hipModuleLoadData"); st != Success {
		return st
	}
	if module == nil || image < softPage {
		return ErrInvalidValue
	}
	arch, kernels, ok := parseSoftCode(goString(unsafe.SliceData(bytesAt(image, 1))))
	switch {
	case !ok:
		return ErrInvalidImage
	case arch != softArch:
		return ErrNoBinaryForGPU
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if sw.closed {
		return ErrDeinitialized
	}
	*module = sw.newHandle()
	sw.modules[*module] = &softModule{dev: sw.device(), kernels: kernels}
	sw.stats.Modules++
	return Success
}

// moduleUnload does not wait: launches that are queued are executed all the same.
func (sw *Software) moduleUnload(module uintptr) Status {
	if st := sw.call("hipModuleUnload"); st != Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	m := sw.modules[module]
	switch {
	case sw.closed:
		return ErrDeinitialized
	case m == nil:
		return ErrNotFound
	}
	for _, f := range m.functions {
		delete(sw.functions, f)
	}
	delete(sw.modules, module)
	sw.stats.Modules--
	return Success
}

// moduleGetFunction refuses to be called while another device is current, where some versions of HIP end the process.
func (sw *Software) moduleGetFunction(function *uintptr, module uintptr, name string) Status {
	if st := sw.call("hipModuleGetFunction"); st != Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	m := sw.modules[module]
	switch {
	case sw.closed:
		return ErrDeinitialized
	case function == nil || name == "":
		return ErrInvalidValue
	case m == nil || m.dev != sw.device():
		return ErrInvalidHandle
	}
	kernel, offered := sw.kernels[name]
	if !offered || !slices.Contains(m.kernels, name) {
		return ErrNotFound
	}
	*function = sw.newHandle()
	sw.functions[*function] = &softFunction{kernel, m.dev}
	m.functions = append(m.functions, *function)
	return Success
}

// moduleLaunchKernel wants the stream's device to be current, as newer versions of HIP do, and a grid of one dimension.
func (sw *Software) moduleLaunchKernel(function uintptr, gridX, gridY, gridZ, blockX, blockY, blockZ, sharedBytes uint32,
	stream uintptr, params *unsafe.Pointer, extra *uintptr) Status {
	late, st := sw.enter("hipModuleLaunchKernel")
	if st != Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(stream)
	if st != Success {
		return st
	}
	f := sw.functions[function]
	switch {
	case f == nil || f.dev != s.dev || sw.device() != s.dev:
		return ErrInvalidHandle
	case min(gridX, gridY, gridZ, blockX, blockY, blockZ) == 0 || blockX > softBlockThreads ||
		uint64(gridX)*uint64(blockX) > math.MaxUint32:
		return ErrInvalidValue
	case max(gridY, gridZ, blockY, blockZ) > 1 || sharedBytes != 0 || extra != nil:
		return ErrNotSupported
	}
	args, ok := launchArgs(params, f.params)
	if !ok {
		return ErrInvalidValue
	}
	return s.enqueue(softOp{kind: opLaunch, late: late, launch: &SoftLaunch{
		Blocks: gridX, Threads: blockX, Args: args, sw: sw, dev: s.dev, run: f.run,
	}})
}

// launchArgs copies the n values that params points to; ok is false if there are more or fewer before the nil.
func launchArgs(params *unsafe.Pointer, n int) (args []uint64, ok bool) {
	if params == nil {
		return nil, n == 0
	}
	for p := unsafe.Pointer(params); ; p = unsafe.Add(p, unsafe.Sizeof(p)) {
		value := *(*unsafe.Pointer)(p)
		if value == nil {
			return args, len(args) == n
		}
		args = append(args, *(*uint64)(value))
	}
}

// launch executes opLaunch.
func (s *softStream) launch(l *SoftLaunch) (st Status) {
	started := s.sw.now()
	fault := guarded(func() { st = l.run(l) })
	s.end += s.sw.now() - started
	for _, b := range l.blocks {
		s.sw.release(b)
	}
	if fault != Success {
		return fault
	}
	return st
}
