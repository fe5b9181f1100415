//go:build !windows

package main

import "os"

// rename gives an open file another name.
func rename(f *os.File, to string) error { return os.Rename(f.Name(), to) }
