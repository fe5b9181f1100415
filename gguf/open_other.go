//go:build !unix

package gguf

import "os"

// openNonblock is 0 where opening a file never waits.
const openNonblock = 0

// setBlocking does nothing where openNonblock is 0.
func setBlocking(*os.File) error { return nil }
