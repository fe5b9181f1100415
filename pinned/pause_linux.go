package pinned

import (
	"syscall"
	"time"
)

// pause sleeps in the kernel: time.Sleep of less than a millisecond lasts about one when the process is otherwise idle,
// since the Go scheduler then waits in epoll, whose unit is the millisecond. It reports whether Go's clock has moved
// meanwhile. The clock of testing/synctest does not move, and stands still for as long as a goroutine is in here.
func pause(d time.Duration) (moved bool) {
	before := time.Now()
	ts := syscall.NsecToTimespec(int64(d))
	err := syscall.Nanosleep(&ts, nil) // cut short by a signal: the caller looks again, no harm done
	return err != nil || time.Since(before) > 0
}
