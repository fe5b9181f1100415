//go:build !linux

package main

import "os"

// peakRSS is known on Linux only.
func peakRSS() uint64 { return 0 }

// currentRSS is known on Linux only.
func currentRSS() uint64 { return 0 }

// canEvict reports whether evict works on this system.
const canEvict = false

// evict is possible on Linux only.
func evict(*os.File) error { return nil }
