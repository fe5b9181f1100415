package soft

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// sharedSeals fix the size of the memory: touching a mapping of a file that was cut short would be a fault. They also
// show that a descriptor is a memfd.
const sharedSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

// sharedName is the name of the memfd that an allocation has; /proc tells it to who may open it.
func sharedName(nonce uint64) string { return fmt.Sprintf("gguf2gpu-%016x", nonce) }

// mapShared returns n zeroed bytes that begin on a page, and the file through which other processes can map them. They
// live as long as something maps them or has the file open, so nothing is left of them when all processes are gone.
func mapShared(n int, nonce uint64) ([]byte, *os.File, error) {
	name := sharedName(nonce)
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	mem, err := mapSealed(f, n)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return mem, f, nil
}

// mapSealed gives an empty memfd its size, for good, and maps it.
func mapSealed(f *os.File, n int) ([]byte, error) {
	if err := f.Truncate(int64(n)); err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, sharedSeals); err != nil {
		return nil, err
	}
	return unix.Mmap(int(f.Fd()), 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

// canExport says that memory can be exported as a descriptor.
const canExport = true

// duplicate returns another descriptor of the file.
func duplicate(f *os.File) (int32, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	return int32(fd), err
}

// openDescriptor maps memory of mapShared, of this process or another. fd stays the caller's; file is a descriptor of
// its own for the same memory.
func openDescriptor(fd int32) (mem []byte, file *os.File, nonce uint64, err error) {
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, nil, 0, err
	}
	var again uint64
	if _, err := fmt.Sscanf(name, "/memfd:gguf2gpu-%x (deleted)", &again); err != nil {
		return nil, nil, 0, errNoSuchMemory
	}
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, nil, 0, err
	}
	file = os.NewFile(uintptr(own), sharedName(again))
	if mem, err = mapWhole(own); err != nil {
		return nil, nil, 0, errors.Join(err, file.Close())
	}
	return mem, file, again, nil
}

// mapWhole maps all of a file of mapShared.
func mapWhole(fd int) ([]byte, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || seals&sharedSeals != sharedSeals || st.Size <= 0 {
		return nil, errors.Join(err, errNoSuchMemory)
	}
	return unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

// openShared maps memory of mapShared that n names, of this process or another. The error matches errNoSuchMemory or
// fs.ErrNotExist when it is not there (any more), and fs.ErrPermission when it is somebody else's.
func openShared(n ipcName) ([]byte, error) {
	start, err := processStart(strconv.FormatUint(uint64(n.pid), 10))
	if err != nil {
		return nil, err
	}
	if start != n.start { // the process has ended, and another has got its number
		return nil, errNoSuchMemory
	}
	// The descriptor may be that of anything by now, and to open a device or a pipe may have effects. O_PATH has none,
	// and keeps hold of the file while its name is compared.
	found, err := unix.Open(fmt.Sprintf("/proc/%d/fd/%d", n.pid, n.fd), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(found)
	path := fmt.Sprintf("/proc/self/fd/%d", found)
	if name, err := os.Readlink(path); err != nil || name != "/memfd:"+sharedName(n.nonce)+" (deleted)" {
		return nil, errors.Join(err, errNoSuchMemory)
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	mem, err := mapWhole(fd)
	if err == nil && uint64(len(mem)) != n.size {
		return nil, errors.Join(errNoSuchMemory, unix.Munmap(mem))
	}
	return mem, err
}

// processStart returns when the process started, in clock ticks since the start of the system. pid is its number, or
// "self" for this one. Number and start together tell a process from all others.
func processStart(pid string) (uint64, error) {
	stat, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return 0, err
	}
	// The second field is the program's name in brackets, with any characters in it; this is the 22nd.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%s/stat has %d fields after the name, want 20", pid, len(fields))
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}
