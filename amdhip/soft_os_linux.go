package amdhip

import "golang.org/x/sys/unix"

// hostMemory returns the host's memory in bytes.
func hostMemory() (uint64, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, err
	}
	return uint64(info.Totalram) * uint64(info.Unit), nil
}

// threadID tells OS threads apart.
func threadID() uint64 { return uint64(unix.Gettid()) }

// adviseHuge asks for huge pages, which are several times faster to touch for the first time. It is only a hint.
func adviseHuge(b []byte) {
	const huge = 2 << 20
	if len(b) >= 2*huge {
		_ = unix.Madvise(b, unix.MADV_HUGEPAGE)
	}
}
