//go:build !linux

package pinned

import "errors"

// mapHuge has no use where there is no HIP: hipHostMalloc's stand-in does.
func mapHuge(int) (mapping, bytes []byte, err error) { return nil, nil, errors.ErrUnsupported }

func unmap([]byte) error { return nil }
