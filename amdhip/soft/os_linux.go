package soft

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxNap is the length of the last part of a sleep, which nap does. Go's timers here wait with epoll, whose unit is a
// millisecond, so they may end a millisecond too late.
const maxNap = 1200 * time.Microsecond

// nap sleeps for d, which is at most maxNap, or less if a signal comes. It holds an OS thread.
func nap(d time.Duration) {
	t := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&t, nil) // the caller looks at the clock
}

// prefault makes the system give b the pages that it does not have yet. It does nothing on kernels before 5.14.
func prefault(b []byte) {
	if len(b) == 0 {
		return
	}
	p := unsafe.Pointer(unsafe.SliceData(b))
	before := int(uintptr(p) % pageSize) // bytes of the mapping that b is a part of
	_ = unix.Madvise(unsafe.Slice((*byte)(unsafe.Add(p, -before)), before+len(b)), unix.MADV_POPULATE_WRITE)
}

// hostMemory returns the host's memory in bytes.
func hostMemory() (uint64, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, err
	}
	return info.Totalram * uint64(info.Unit), nil
}

// threadID tells OS threads apart.
func threadID() uint64 { return uint64(unix.Gettid()) }
