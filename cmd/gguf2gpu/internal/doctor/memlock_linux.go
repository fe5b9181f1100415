package doctor

import "golang.org/x/sys/unix"

// memlockLimit returns how much memory this process may lock, in bytes, or noLimit.
func memlockLimit() (bytes uint64, ok bool) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &lim); err != nil {
		return 0, false
	}
	if lim.Cur == unix.RLIM_INFINITY {
		return noLimit, true
	}
	return lim.Cur, true
}
