//go:build unix

package gguf

import (
	"os"
	"syscall"
)

// openNonblock keeps open(2) from waiting for a writer if a named pipe takes the place of the file just before it is
// opened. It has no effect on regular files.
const openNonblock = syscall.O_NONBLOCK

// setBlocking takes openNonblock back. Some ways of reading, such as io_uring, would not wait for the disk otherwise.
func setBlocking(f *os.File) error {
	return os.NewSyscallError("fcntl", syscall.SetNonblock(int(f.Fd()), false))
}
