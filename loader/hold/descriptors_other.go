//go:build !linux

package hold

import (
	"errors"
	"net"
	"os"
	"syscall"
)

// maxDescriptors is how many descriptors one message can bring.
const maxDescriptors = 0

func writeWithFiles(conn *net.UnixConn, v any, files []*os.File) error {
	if len(files) > 0 {
		return errNotHere
	}
	return writeMessage(conn, v)
}

func readLengthAndFiles(conn *net.UnixConn, limit int, _ func() error) (int64, []*os.File, error) {
	n, err := readLength(conn, limit)
	return n, nil, err
}

func memoryFile(string, []byte) (*os.File, error) { return nil, errNotHere }

func who(*net.UnixConn) string { return "a process" }

func unreachable(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}
