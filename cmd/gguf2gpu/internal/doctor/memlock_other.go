//go:build !linux

package doctor

// memlockLimit knows no limit on systems without HIP.
func memlockLimit() (bytes uint64, ok bool) { return 0, false }
