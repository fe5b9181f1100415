//go:build !linux

package loader

// hostAvailable is not known here.
func hostAvailable() (n uint64, ok bool) { return 0, false }
