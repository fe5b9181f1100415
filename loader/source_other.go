//go:build !linux

package loader

import "os"

// openDirect opens the file behind f for reads of its own; there are no direct ones here.
func openDirect(f *os.File) (*os.File, error) { return os.Open(f.Name()) }

// residentShare is not known here: the mapping is used.
func residentShare([]byte) float64 { return 1 }

// letGo leaves it to the kernel.
func letGo([]byte) {}

// hostAvailable is not known here.
func hostAvailable() (n uint64, ok bool) { return 0, false }
