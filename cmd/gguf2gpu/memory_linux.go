package main

import (
	"bytes"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// peakRSS returns the largest resident memory of the process so far, in bytes, or 0 if the kernel does not tell. It is
// read from /proc, since the figure of getrusage includes that of the process that started this one.
func peakRSS() uint64 { return statusField("VmHWM:") }

// currentRSS returns the resident memory of the process, in bytes, or 0 if the kernel does not tell.
func currentRSS() uint64 { return statusField("VmRSS:") }

// statusField returns a size from /proc/self/status, in bytes.
func statusField(name string) uint64 {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(text) {
		if rest, ok := bytes.CutPrefix(line, []byte(name)); ok {
			if f := bytes.Fields(rest); len(f) == 2 {
				kb, _ := strconv.ParseUint(string(f[0]), 10, 64) // the kernel writes nothing else
				return kb * 1024
			}
		}
	}
	return 0
}

// canEvict reports whether evict works on this system.
const canEvict = true

// evict removes f from the page cache. What is not on the disk yet is written first.
func evict(f *os.File) error {
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		return err
	}
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}
