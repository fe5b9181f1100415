//go:build !linux

package main

import (
	"os"

	"github.com/gguf2gpu/gguf2gpu/loader/hold"
)

// newSystemdStore returns nil: there is no systemd here.
func newSystemdStore([]*os.File) hold.Keeper { return nil }
