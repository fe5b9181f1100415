//go:build !linux

package pinned

import "time"

// pause sleeps; where there is no HIP, precision below the scheduler's does not matter. Go's clock moves, always.
func pause(d time.Duration) (moved bool) {
	time.Sleep(d)
	return true
}
