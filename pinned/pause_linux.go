package pinned

import (
	"syscall"
	"time"
)

// pause sleeps in the kernel: time.Sleep of less than a millisecond lasts about one when the process is otherwise idle,
// since the Go scheduler then waits in epoll, whose unit is the millisecond.
func pause(d time.Duration) {
	ts := syscall.NsecToTimespec(int64(d))
	_ = syscall.Nanosleep(&ts, nil) // cut short by a signal: the caller looks again, no harm done
}
