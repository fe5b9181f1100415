//go:build !linux

package hold

// hostLeft is not known here.
func hostLeft(string) (uint64, bool) { return 0, false }

// lockedMemory is not known here.
func lockedMemory(string) locked { return locked{} }
