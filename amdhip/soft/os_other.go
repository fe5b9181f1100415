//go:build !linux && !windows

package soft

import (
	"bytes"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// hostMemory returns the host's memory in bytes.
func hostMemory() (uint64, error) { return unix.SysctlUint64("hw.memsize") }

// threadID tells goroutines apart, as the system offers no thread number without cgo. For callers that keep a goroutine
// on one thread from hipSetDevice to the last call that depends on it, as they must, that is the same.
func threadID() uint64 {
	var buf [64]byte
	trace := buf[:runtime.Stack(buf[:], false)] // "goroutine 17 [running]:"
	id, _, _ := bytes.Cut(bytes.TrimPrefix(trace, []byte("goroutine ")), []byte(" "))
	n, _ := strconv.ParseUint(string(id), 10, 64) // 0, one device for all, if the format ever changes
	return n
}

// maxNap and nap: Go's timers are precise here.
const maxNap = 0

func nap(time.Duration) {}

// prefault is for Linux.
func prefault([]byte) {}
