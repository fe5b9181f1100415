//go:build !linux

package hold

// hostLeft is not known here.
func hostLeft() (int64, bool) { return 0, false }

// lockedLimit is not known here.
func lockedLimit() string { return "not known" }
