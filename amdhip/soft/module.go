package soft

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"slices"
	"strings"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hostmem"
)

// launched is a launch in the queue of a stream, or in a graph.
type launched struct {
	call amdhip.KernelCall // without Memory
	dev  *device
	run  func(*amdhip.KernelCall) hip.Status
}

// running is a launch that executes.
type running struct {
	sw     *Software
	dev    *device
	blocks []*block // that memory gave out
}

// memory is what KernelCall.Memory does.
func (l *running) memory(p amdhip.DevicePtr, n uint64) ([]byte, hip.Status) {
	if n == 0 {
		return nil, hip.Success
	}
	l.sw.mu.Lock()
	defer l.sw.mu.Unlock()
	addr := uintptr(p)
	r, _ := l.sw.lookup(addr, uintptr(n))
	if !r.visible() || !r.reachable(l.dev, false) {
		return nil, hip.ErrIllegalAddress
	}
	r.block.refs++
	l.blocks = append(l.blocks, r.block)
	return r.block.mem[addr-r.addr:][:n:n], hip.Success
}

// maxBlockThreads is how many threads a block may have, as on AMD's GPUs.
const maxBlockThreads = 1024

// kernel is a Go function that stands in for a kernel.
type kernel struct {
	sizes  []int // of the parameters, in bytes
	simple bool  // from Offer: grids of one dimension, no dynamic shared memory
	run    func(*amdhip.KernelCall) hip.Status
}

// Offer makes run stand in for kernels of that name. They take that many parameters of 8 bytes each, and are launched
// on grids of one dimension without dynamic shared memory. hipRTC on the software device accepts source if all its
// kernels have a stand-in. When a launch executes, run is called on the stream's goroutine, once for the whole grid. A
// Status other than Success makes the stream fail, and so does touching memory that is no longer mapped. The launch
// takes as long as run does, and Close of the Runtime waits for it. A panic in run ends the process. A later Offer of
// the same name does not change functions that were looked up before. Offer panics if run is nil.
func (sw *Software) Offer(name string, params int, run func(*amdhip.KernelCall) hip.Status) {
	sw.offer(name, kernel{sizes: slices.Repeat([]int{8}, params), simple: true, run: run})
}

// OfferKernel is Offer for kernels whose parameters have these sizes in bytes, and which are launched with any grid,
// blocks of up to 1024 threads and up to 64 KiB of dynamic shared memory.
func (sw *Software) OfferKernel(name string, sizes []int, run func(*amdhip.KernelCall) hip.Status) {
	if len(sizes) > 0 && slices.Min(sizes) <= 0 {
		panic(fmt.Sprintf("soft: OfferKernel: parameters of %v bytes for kernel %s", sizes, name))
	}
	sw.offer(name, kernel{sizes: slices.Clone(sizes), run: run})
}

func (sw *Software) offer(name string, k kernel) {
	if k.run == nil {
		panic("soft: Offer: no function for kernel " + name)
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	sw.kernels[name] = k
}

// module is loaded code: the names of kernels. It is guarded by Software.mu.
type module struct {
	dev       *device
	kernels   []string
	functions []uintptr // that were looked up
}

// function is a kernel that was looked up.
type function struct {
	kernel
	dev *device
}

// codeObject makes the code object of the software device: a text, and so a C string, that ends with a checksum.
func codeObject(arch string, kernels []string) string {
	var b strings.Builder
	b.WriteString(codeMagic + arch + "\n")
	for _, name := range kernels {
		b.WriteString(name + "\n")
	}
	return sealed(b.String())
}

const codeMagic = "software device code object for "

// sealed appends the checksum.
func sealed(body string) string {
	return fmt.Sprintf("%schecksum %08x\n", body, crc32.ChecksumIEEE([]byte(body)))
}

// parseCodeObject undoes codeObject; ok is false for any other text.
func parseCodeObject(code string) (arch string, kernels []string, ok bool) {
	body := code[:max(0, strings.LastIndex(code, "checksum "))]
	rest, ok := strings.CutPrefix(body, codeMagic)
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

func (sw *Software) moduleLoadData(out *uintptr, image uintptr) hip.Status {
	if st := sw.call("hipModuleLoadData"); st != hip.Success {
		return st
	}
	if out == nil || image < pageSize {
		return hip.ErrInvalidValue
	}
	arch, kernels, ok := parseCodeObject(goString(unsafe.SliceData(hostmem.At(image, 1))))
	switch {
	case !ok:
		return hip.ErrInvalidImage
	case arch != archName:
		return hip.ErrNoBinaryForGPU
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if sw.closed {
		return hip.ErrDeinitialized
	}
	*out = sw.newHandle()
	sw.modules[*out] = &module{dev: sw.device(), kernels: kernels}
	sw.stats.Modules++
	return hip.Success
}

// moduleUnload does not wait: launches that are queued are executed all the same.
func (sw *Software) moduleUnload(module uintptr) hip.Status {
	if st := sw.call("hipModuleUnload"); st != hip.Success {
		return st
	}
	sw.settle(nil)
	sw.mu.Lock()
	defer sw.mu.Unlock()
	m := sw.modules[module]
	switch {
	case sw.closed:
		return hip.ErrDeinitialized
	case m == nil:
		return hip.ErrNotFound
	}
	for _, f := range m.functions {
		delete(sw.functions, f)
	}
	delete(sw.modules, module)
	sw.stats.Modules--
	return hip.Success
}

// moduleGetFunction refuses to be called while another device is current, where some versions of HIP end the process.
func (sw *Software) moduleGetFunction(out *uintptr, module uintptr, name string) hip.Status {
	if st := sw.call("hipModuleGetFunction"); st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	m := sw.modules[module]
	switch {
	case sw.closed:
		return hip.ErrDeinitialized
	case out == nil || name == "":
		return hip.ErrInvalidValue
	case m == nil || m.dev != sw.device():
		return hip.ErrInvalidHandle
	}
	k, offered := sw.kernels[name]
	if !offered || !slices.Contains(m.kernels, name) {
		return hip.ErrNotFound
	}
	*out = sw.newHandle()
	sw.functions[*out] = &function{k, m.dev}
	m.functions = append(m.functions, *out)
	return hip.Success
}

// maxShared is how much shared memory a block may have, as on AMD's GPUs.
const maxShared = 64 << 10

// moduleLaunchKernel wants the stream's device to be current, as newer versions of HIP do.
func (sw *Software) moduleLaunchKernel(
	function uintptr, gridX, gridY, gridZ, blockX, blockY, blockZ, sharedBytes uint32,
	stream uintptr, params *unsafe.Pointer, extra *uintptr,
) hip.Status {
	late, st := sw.enter("hipModuleLaunchKernel")
	if st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	s, st := sw.stream(stream)
	if st != hip.Success {
		return st
	}
	f := sw.functions[function]
	grid, block := amdhip.Dim3{X: gridX, Y: gridY, Z: gridZ}, amdhip.Dim3{X: blockX, Y: blockY, Z: blockZ}
	switch {
	case f == nil || f.dev != s.dev || sw.device() != s.dev:
		return hip.ErrInvalidHandle
	case !launchable(grid, block) || sharedBytes > maxShared:
		return hip.ErrInvalidValue
	case extra != nil || f.simple && (max(gridY, gridZ, blockY, blockZ) > 1 || sharedBytes != 0):
		return hip.ErrNotSupported
	}
	values, ok := launchArgs(params, f.sizes)
	if !ok {
		return hip.ErrInvalidValue
	}
	call := amdhip.KernelCall{Grid: grid, Block: block, SharedBytes: sharedBytes, Params: values}
	return s.put(operation{kind: opLaunch, late: late, launch: &launched{call: call, dev: s.dev, run: f.run}})
}

// launchable reports whether a device can have so many blocks and threads.
func launchable(grid, block amdhip.Dim3) bool {
	for _, n := range [][2]uint32{{grid.X, block.X}, {grid.Y, block.Y}, {grid.Z, block.Z}} {
		if threads := uint64(n[0]) * uint64(n[1]); threads == 0 || threads > math.MaxUint32 || n[1] > maxBlockThreads {
			return false
		}
	}
	return block.X*block.Y*block.Z <= maxBlockThreads
}

// launchArgs copies the values that params points to; ok is false if there are more or fewer of them before the nil
// than sizes.
func launchArgs(params *unsafe.Pointer, sizes []int) (values [][]byte, ok bool) {
	if params == nil {
		return nil, len(sizes) == 0
	}
	given := 0
	for p := unsafe.Pointer(params); *(*unsafe.Pointer)(p) != nil; p = unsafe.Add(p, unsafe.Sizeof(p)) {
		given++
	}
	if given != len(sizes) {
		return nil, false
	}
	for i, p := range unsafe.Slice(params, given) {
		values = append(values, bytes.Clone(unsafe.Slice((*byte)(p), sizes[i])))
	}
	return values, true
}

// launch executes opLaunch. The function gets the arguments as copies, as a launch of a graph is executed again.
func (s *stream) launch(l *launched) (st hip.Status) {
	r := running{sw: s.sw, dev: l.dev}
	call := l.call
	call.Memory = r.memory
	call.Params, call.Args = make([][]byte, len(l.call.Params)), make([]uint64, len(l.call.Params))
	for i, value := range l.call.Params {
		var word [8]byte
		copy(word[:], value)
		call.Params[i], call.Args[i] = bytes.Clone(value), binary.LittleEndian.Uint64(word[:])
	}
	started := s.sw.now()
	fault := guarded(func() { st = l.run(&call) })
	s.end += s.sw.now() - started
	for _, b := range r.blocks {
		s.sw.release(b)
	}
	if fault != hip.Success {
		return fault
	}
	return st
}
