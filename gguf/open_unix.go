//go:build unix

package gguf

import "syscall"

// openNonblock keeps open from waiting for a writer when a file is replaced by a named pipe just before it is opened. It
// does nothing to regular files.
const openNonblock = syscall.O_NONBLOCK
