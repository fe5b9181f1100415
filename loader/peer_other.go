//go:build !linux

package loader

import (
	"fmt"
	"net"
	"os"
	"syscall"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// peer is the process at the other end of a connection.
type peer struct {
	pid   int
	owner bool
}

// errNotHere: who the other process belongs to is known on Linux only, and so is memory that processes share.
var errNotHere = fmt.Errorf("loader: holding models for other processes is possible on Linux only: %w", amdhip.ErrUnsupported)

// checkPeer lets nobody in.
func checkPeer(*net.UnixConn, bool) (peer, error) { return peer{}, errNotHere }

func checkPrivate(string) error { return nil }

func lockDirectory(string) (*os.File, error) { return nil, errNotHere }

func private(string, string, syscall.RawConn) error { return errNotHere }
