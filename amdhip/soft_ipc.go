package amdhip

import (
	"encoding/binary"
	"errors"
	"hash/fnv"
	"io/fs"
	"math"
	"os"
	"sync/atomic"
	"syscall"
)

// ipcMagic begins an IPC handle of the software device.
const ipcMagic = "softgpu2"

// errNoSuchMemory says that what a handle names is not there, or not any more.
var errNoSuchMemory = errors.New("no such memory")

// ipcSerial numbers the Softwares of this process, because their addresses are the same.
var ipcSerial atomic.Uint64

// ipcName is what an IPC handle of the software device says. The first three are where another process finds the memory, serial
// and addr tell the allocations of one process apart; nonce and start tell whether it is still the same memory and process.
type ipcName struct {
	pid, fd      uint32 // fd is noFile when other processes cannot open the memory
	start        uint64 // of the process, 0 with noFile
	serial, addr uint64
	size, nonce  uint64
}

const noFile = math.MaxUint32

// handle puts n into the 64 bytes of a handle, the last 8 of which are a checksum.
func (n ipcName) handle() (h IPCHandle) {
	copy(h.b[:], ipcMagic)
	binary.LittleEndian.PutUint32(h.b[8:], n.pid)
	binary.LittleEndian.PutUint32(h.b[12:], n.fd)
	for i, v := range []uint64{n.start, n.serial, n.addr, n.size, n.nonce} {
		binary.LittleEndian.PutUint64(h.b[16+8*i:], v)
	}
	binary.LittleEndian.PutUint64(h.b[56:], h.checksum())
	return h
}

func (h *IPCHandle) checksum() uint64 {
	sum := fnv.New64a()
	sum.Write(h.b[:56])
	return sum.Sum64()
}

// softName undoes handle. It is false for bytes that no software device made.
func (h *IPCHandle) softName() (ipcName, bool) {
	at := func(i int) uint64 { return binary.LittleEndian.Uint64(h.b[i:]) }
	n := ipcName{
		pid: binary.LittleEndian.Uint32(h.b[8:]), fd: binary.LittleEndian.Uint32(h.b[12:]),
		start: at(16), serial: at(24), addr: at(32), size: at(40), nonce: at(48),
	}
	return n, string(h.b[:len(ipcMagic)]) == ipcMagic && at(56) == h.checksum()
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

// unshare ends the time in which other processes can open b; those that have keep it. sw.mu is held.
func (sw *Software) unshare(b *block) {
	if b.file != nil {
		sw.unmapping = errors.Join(sw.unmapping, b.file.Close())
		b.file = nil
	}
}

func (sw *Software) ipcGetMemHandle(handle *IPCHandle, p uintptr) Status {
	if st := sw.call("hipIpcGetMemHandle"); st != Success {
		return st
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	r := sw.begins(p, deviceRegion)
	if handle == nil || r == nil {
		return ErrInvalidValue
	}
	*handle = sw.name(r).handle()
	return Success
}

// ipcOpenMemHandle maps an allocation of another Software, of this process or another, that has SoftwareOptions.Shared, too;
// else ErrNotSupported. One of this very Software is refused as HIP refuses memory of the process that opens it. A mapping is
// memory of the current device, whatever device the allocation is on, and takes nothing of its capacity. It stays valid when
// the allocation is freed or its process ends; on hardware that is undefined.
func (sw *Software) ipcOpenMemHandle(p *uintptr, handle IPCHandle, flags uint32) Status {
	if st := sw.call("hipIpcOpenMemHandle"); st != Success {
		return st
	}
	n, ok := handle.softName()
	if p == nil || flags != 1 || !ok { // 1: LazyEnablePeerAccess, from HIP 6
		return ErrInvalidValue
	}
	if n.pid == uint32(os.Getpid()) && n.start == sw.start && n.serial == sw.serial {
		return ErrInvalidContext
	}
	if !sw.opts.Shared || n.fd == noFile {
		return ErrNotSupported
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

// attach makes b known as memory of the current device that was opened. sw.mu is held.
func (sw *Software) attach(p *uintptr, b *block) Status {
	if sw.closed {
		return ErrDeinitialized
	}
	dev := sw.device()
	addr, ok := dev.address(uintptr(len(b.mem)))
	if !ok {
		return ErrOutOfMemory
	}
	sw.insert(&region{addr: addr, kind: ipcRegion, dev: dev, block: b})
	*p = addr
	return Success
}

// openStatus is what HIP answers when the memory of a handle cannot be mapped, with a code of its own for denied access.
func openStatus(err error) Status {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return ErrMapFailed // the memory is there, but belongs to somebody who does not let this process have it
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ENOMEM):
		return ErrOutOfMemory
	}
	return ErrInvalidDevicePointer
}

func (sw *Software) ipcCloseMemHandle(p uintptr) Status {
	if st := sw.call("hipIpcCloseMemHandle"); st != Success {
		return st
	}
	return sw.drop(p, ipcRegion, ErrInvalidValue)
}
