package main

import (
	"errors"
	"os"
)

// rename gives an open file another name. Windows wants it closed.
func rename(f *os.File, to string) error { return errors.Join(f.Close(), os.Rename(f.Name(), to)) }
