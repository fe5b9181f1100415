//go:build !linux

package soft

import (
	"os"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// OpenRuntime refuses Options.Shared here because processStart fails, so the other two are never called.

func processStart(string) (uint64, error) { return 0, amdhip.ErrUnsupported }

func mapShared(int, uint64) ([]byte, *os.File, error) { return nil, nil, amdhip.ErrUnsupported }

// canExport says that memory can be exported as a descriptor: not here, so the two functions below are never called.
const canExport = false

func duplicate(*os.File) (int32, error) { return 0, amdhip.ErrUnsupported }

func openDescriptor(int32) ([]byte, *os.File, uint64, error) {
	return nil, nil, 0, amdhip.ErrUnsupported
}

func openShared(ipcName) ([]byte, error) { return nil, errNoSuchMemory }
