//go:build !linux

package hold

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

// errNotHere says what is missing elsewhere: only Linux tells whose process has connected, and has memory that is
// shared.
var errNotHere = fmt.Errorf("hold: holding models for other processes is possible on Linux only: %w", amdhip.ErrUnsupported)

func openFiles() int { return maxClients }

// checkPeer lets nobody in.
func checkPeer(*net.UnixConn, bool) (peer, error) { return peer{}, errNotHere }

func checkPrivate(string) error { return nil }

func lockDirectory(string) (*os.File, error) { return nil, errNotHere }

func private(string, string, syscall.RawConn) error { return errNotHere }
