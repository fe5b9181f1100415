package main

import (
	"bytes"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// peakRSS is the largest resident memory of the process so far, in bytes; 0 when the kernel does not say. It comes from
// /proc and not from getrusage, whose figure a process inherits from the one that started it.
func peakRSS() uint64 { return statusField("VmHWM:") }

// currentRSS is the resident memory of the process, in bytes; 0 when the kernel does not say.
func currentRSS() uint64 { return statusField("VmRSS:") }

// statusField is a size from /proc/self/status.
func statusField(name string) uint64 {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(text) {
		if rest, ok := bytes.CutPrefix(line, []byte(name)); ok {
			if f := bytes.Fields(rest); len(f) == 2 {
				kb, _ := strconv.ParseUint(string(f[0]), 10, 64) // the kernel's own text
				return kb * 1024
			}
		}
	}
	return 0
}

// canEvict says whether evict works.
const canEvict = true

// evict takes f out of the page cache; what has not been written yet is written first.
func evict(f *os.File) error {
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		return err
	}
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}
