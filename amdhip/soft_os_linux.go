package amdhip

import (
	"time"

	"golang.org/x/sys/unix"
)

// maxNap is how long before its end a sleep goes on in nap. Go's timers here wait with epoll, whose unit is a millisecond,
// so they may end that much too late.
const maxNap = 1200 * time.Microsecond

// nap sleeps for d, which is at most maxNap, or less if a signal comes. It holds an OS thread.
func nap(d time.Duration) {
	t := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&t, nil) // the caller looks at the clock
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
