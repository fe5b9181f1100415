package soft

import (
	"encoding/binary"
	"errors"
	"hash/fnv"
	"io/fs"
	"math"
	"os"
	"sync/atomic"
	"syscall"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// ipcMagic begins an IPC handle of the software device.
const ipcMagic = "softgpu2"

// errNoSuchMemory says that what a handle names is not there, or not any more.
var errNoSuchMemory = errors.New("no such memory")

// ipcSerial counts the Softwares of this process. They use the same addresses, so a handle must say which one it
// belongs to.
var ipcSerial atomic.Uint64

// ipcName is what an IPC handle of the software device says. pid, fd and start are where another process finds the
// memory; serial and addr tell the allocations of one process apart; nonce and start tell whether the memory and the
// process are still the same.
type ipcName struct {
	pid, fd      uint32 // fd is noFile when other processes cannot open the memory
	start        uint64 // of the process, 0 with noFile
	serial, addr uint64
	size, nonce  uint64
}

const noFile = math.MaxUint32

// handle puts n into the 64 bytes of a handle, the last 8 of which are a checksum.
func (n ipcName) handle() hip.IPCHandle {
	var b [64]byte
	copy(b[:], ipcMagic)
	binary.LittleEndian.PutUint32(b[8:], n.pid)
	binary.LittleEndian.PutUint32(b[12:], n.fd)
	for i, v := range []uint64{n.start, n.serial, n.addr, n.size, n.nonce} {
		binary.LittleEndian.PutUint64(b[16+8*i:], v)
	}
	binary.LittleEndian.PutUint64(b[56:], ipcChecksum(b))
	return hip.NewIPCHandle(b)
}

// ipcChecksum is the checksum of a handle.
func ipcChecksum(b [64]byte) uint64 {
	sum := fnv.New64a()
	sum.Write(b[:56])
	return sum.Sum64()
}

// parseIPCHandle undoes ipcName.handle. It is false for bytes that no software device made.
func parseIPCHandle(h hip.IPCHandle) (ipcName, bool) {
	b := h.Bytes()
	at := func(i int) uint64 { return binary.LittleEndian.Uint64(b[i:]) }
	n := ipcName{
		pid: binary.LittleEndian.Uint32(b[8:]), fd: binary.LittleEndian.Uint32(b[12:]),
		start: at(16), serial: at(24), addr: at(32), size: at(40), nonce: at(48),
	}
	return n, string(b[:len(ipcMagic)]) == ipcMagic && at(56) == ipcChecksum(b)
}

// name returns the name of an allocation. sw.mu is held.
func (sw *Software) name(r *region) ipcName {
	n := ipcName{
		pid: uint32(os.Getpid()), fd: noFile, start: sw.start, serial: sw.serial,
		addr: uint64(r.addr), size: uint64(r.size()), nonce: r.block.nonce,
	}
	if f := r.block.file; f != nil {
		n.fd = uint32(f.Fd())
	}
	return n
}

// unshare closes the file through which other processes open b. Processes that have opened it keep it. sw.mu is held.
func (sw *Software) unshare(b *block) {
	if b.file != nil {
		sw.unmapping = errors.Join(sw.unmapping, b.file.Close())
		b.file = nil
	}
}

func (sw *Software) ipcGetMemHandle(handle *hip.IPCHandle, p uintptr) hip.Status {
	if st := sw.call("hipIpcGetMemHandle"); st != hip.Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	r := sw.begins(p, deviceRegion)
	if handle == nil || r == nil {
		return hip.ErrInvalidValue
	}
	*handle = sw.name(r).handle()
	return hip.Success
}

// ipcOpenMemHandle maps an allocation of another Software, of this process or another. Both need Options.Shared, else
// the answer is ErrNotSupported. An allocation of the same Software is refused, as HIP refuses memory of the process
// that opens it. The mapping is memory of the current device, whatever device the allocation is on, and takes nothing
// of its capacity. It stays valid when the allocation is freed or its process ends; on hardware that is undefined.
func (sw *Software) ipcOpenMemHandle(p *uintptr, handle hip.IPCHandle, flags uint32) hip.Status {
	if st := sw.call("hipIpcOpenMemHandle"); st != hip.Success {
		return st
	}
	n, ok := parseIPCHandle(handle)
	if p == nil || flags != 1 || !ok { // 1: LazyEnablePeerAccess, from HIP 6
		return hip.ErrInvalidValue
	}
	if n.pid == uint32(os.Getpid()) && n.start == sw.start && n.serial == sw.serial {
		return hip.ErrInvalidContext
	}
	if !sw.opts.Shared || n.fd == noFile {
		return hip.ErrNotSupported
	}
	mem, err := openShared(n)
	if err != nil {
		return openStatus(err)
	}
	b := &block{mem: mem, mapped: true, refs: 1}
	sw.mu.Lock()
	st := sw.attach(p, b)
	sw.mu.Unlock()
	sw.release(b) // the region has it now, or nobody
	return st
}

// attach makes b known as opened memory of the current device. sw.mu is held.
func (sw *Software) attach(p *uintptr, b *block) hip.Status {
	if sw.closed {
		return hip.ErrDeinitialized
	}
	dev := sw.device()
	addr, ok := dev.address(uintptr(len(b.mem)))
	if !ok {
		return hip.ErrOutOfMemory
	}
	sw.insert(&region{addr: addr, kind: ipcRegion, dev: dev, block: b})
	*p = addr
	return hip.Success
}

// openStatus is what HIP answers when the memory of a handle cannot be mapped, with a code of its own for denied
// access.
func openStatus(err error) hip.Status {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return hip.ErrMapFailed // the memory is there, but belongs to somebody who does not let this process have it
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ENOMEM):
		return hip.ErrOutOfMemory
	}
	return hip.ErrInvalidDevicePointer
}

func (sw *Software) ipcCloseMemHandle(p uintptr) hip.Status {
	if st := sw.call("hipIpcCloseMemHandle"); st != hip.Success {
		return st
	}
	return sw.drop(p, ipcRegion, hip.ErrInvalidValue)
}
