package main

import (
	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

// memlockLimit is the limit on memory that the process may lock. Pinned memory counts against it on some drivers.
func memlockLimit() string {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &lim); err != nil {
		return ""
	}
	if lim.Cur == unix.RLIM_INFINITY {
		return "unlimited"
	}
	return humanize.IBytes(lim.Cur)
}
