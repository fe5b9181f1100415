//go:build !unix

package gguf

// openNonblock is nothing where opening a file does not wait.
const openNonblock = 0
