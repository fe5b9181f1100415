//go:build !linux

package amdhip

import "os"

// OpenSoftware refuses SoftwareOptions.Shared here because processStart fails, so the other two are never called.

func processStart(string) (uint64, error) { return 0, ErrUnsupported }

func mapShared(int, uint64) ([]byte, *os.File, error) { return nil, nil, ErrUnsupported }

func openShared(ipcName) ([]byte, error) { return nil, errNoSuchMemory }
