package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// exitCode is what the process ends with. The numbers are part of the command's contract; exitStatus tells them to users.
type exitCode int

const (
	exitOK          exitCode = 0
	exitFailed      exitCode = 1   // failed while running: a file that cannot be read or written, a HIP call that failed
	exitUsage       exitCode = 2   // an unknown command or flag, a bad flag value, a wrong number of arguments
	exitBadModel    exitCode = 3   // the model file was read and is damaged, hostile or of another format
	exitNoDevice    exitCode = 4   // no HIP library, no GPU, no GPU of that number, or no hipRTC where it is needed
	exitNoMemory    exitCode = 5   // the model does not fit into the device's free memory
	exitMismatch    exitCode = 6   // verification found bytes that differ
	exitInterrupted exitCode = 130 // SIGINT or SIGTERM; 128 + SIGINT, as shells report it
)

// exitStatus ends the help of every command.
const exitStatus = `
EXIT STATUS
  0    done
  1    failed while running
  2    wrong usage
  3    the model file is bad
  4    no usable device or library
  5    not enough device memory
  6    verification found a difference
  130  interrupted
`

// exitError is an error that knows its exit code, for errors whose type does not tell.
type exitError struct {
	code exitCode
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// withCode makes err end the process with code.
func withCode(code exitCode, err error) error { return &exitError{code, err} }

// usageErrorf is an error in how the command was called. Its text says what is allowed.
func usageErrorf(format string, args ...any) error {
	return withCode(exitUsage, fmt.Errorf(format, args...))
}

// codeOf is the one place where errors become exit codes. ctx is the command's context, which only a signal cancels.
func codeOf(ctx context.Context, err error) exitCode {
	if err == nil {
		return exitOK
	}
	if ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.Cause(ctx))) {
		return exitInterrupted
	}
	if e, ok := errors.AsType[*exitError](err); ok {
		return e.code
	}
	if _, ok := errors.AsType[*gguf.FormatError](err); ok {
		return exitBadModel
	}
	if _, ok := errors.AsType[*amdhip.CompilerError](err); ok {
		return exitNoDevice
	}
	if _, ok := errors.AsType[*loader.ValueError](err); ok {
		return exitBadModel
	}
	switch {
	case errors.Is(err, amdhip.ErrNoLibrary), errors.Is(err, amdhip.ErrNoDevice):
		return exitNoDevice
	case errors.Is(err, loader.ErrInsufficientMemory), errors.Is(err, amdhip.ErrOutOfMemory):
		return exitNoMemory
	case errors.Is(err, loader.ErrBadModel):
		return exitBadModel
	case errors.Is(err, loader.ErrBadOption), errors.Is(err, remote.ErrAddress):
		return exitUsage
	case errors.Is(err, loader.ErrMismatch):
		return exitMismatch
	}
	return exitFailed
}
