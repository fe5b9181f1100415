//go:build !linux

package pinned

import "time"

// pause sleeps; where there is no HIP, precision below the scheduler's does not matter.
func pause(d time.Duration) { time.Sleep(d) }
