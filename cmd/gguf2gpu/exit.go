package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/hold"
	"github.com/gguf2gpu/gguf2gpu/loader/readback"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// exitCode is the exit code of the process. The numbers are part of the command's contract; exitMeanings explains them
// to users.
type exitCode int

const (
	exitOK     exitCode = 0
	exitFailed exitCode = 1 // failed while running: a file that cannot be read or written, a HIP call that failed
	// An unknown command or flag, a bad flag value, a wrong number of arguments. The Go runtime ends a process with 2,
	// too, when it finds no memory, threads or descriptors, or a fault in the program; it says so itself.
	exitUsage       exitCode = 2
	exitBadModel    exitCode = 3   // the model file was read and is damaged, hostile or of another format
	exitNoDevice    exitCode = 4   // no HIP library, no GPU, no GPU of that number, or no hipRTC where it is needed
	exitNoMemory    exitCode = 5   // the model does not fit into the device's free memory
	exitMismatch    exitCode = 6   // verification found bytes that differ
	exitInterrupted exitCode = 130 // SIGINT or SIGTERM; 128 + SIGINT, as shells report it
)

// exitMeanings explains the exit codes to users.
var exitMeanings = map[exitCode]string{
	exitOK:          "done",
	exitFailed:      "failed while running",
	exitUsage:       "wrong usage; or Go's runtime died of a system limit",
	exitBadModel:    "the model file is bad",
	exitNoDevice:    "no usable device or library",
	exitNoMemory:    "not enough device memory",
	exitMismatch:    "verification found a difference",
	exitInterrupted: "interrupted",
}

// exitCodes returns the exit codes that a command can have.
func exitCodes(cmd *cobra.Command) []exitCode {
	all := []exitCode{exitOK, exitFailed, exitUsage}
	switch cmd.Name() {
	case "inspect":
		all = append(all, exitBadModel)
	case "load", "verify", "hold", cmd.Root().Name():
		all = append(all, exitBadModel, exitNoDevice, exitNoMemory, exitMismatch)
	case "attach":
		all = append(all, exitBadModel, exitNoDevice, exitMismatch)
	case "bench":
		all = append(all, exitBadModel, exitNoDevice, exitNoMemory, exitMismatch)
	case "kernels":
		all = append(all, exitNoDevice, exitNoMemory)
	case "devices", "synth":
	default:
		return all
	}
	return append(all, exitInterrupted)
}

// exitError is an error with its exit code, for errors whose type does not tell the code.
type exitError struct {
	code exitCode
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// withCode returns err with an exit code.
func withCode(code exitCode, err error) error { return &exitError{code, err} }

// usageErrorf returns an error in how the command was called. Its text should say what is allowed.
func usageErrorf(format string, args ...any) error {
	return withCode(exitUsage, fmt.Errorf(format, args...))
}

// codeOf returns the exit code of an error. ctx is the command's context, which only a signal cancels. All errors get
// their codes here.
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
	if _, ok := errors.AsType[*loader.ProveError](err); ok {
		return exitMismatch
	}
	switch {
	case errors.Is(err, amdhip.ErrNoLibrary), errors.Is(err, amdhip.ErrNoDevice):
		return exitNoDevice
	case errors.Is(err, loader.ErrInsufficientMemory), lacksDeviceMemory(err):
		return exitNoMemory
	case errors.Is(err, hold.ErrBadModel):
		return exitBadModel
	case errors.Is(err, loader.ErrBadOption), errors.Is(err, remote.ErrAddress):
		return exitUsage
	case errors.Is(err, readback.ErrMismatch), errors.Is(err, remote.ErrDigest):
		return exitMismatch
	}
	return exitFailed
}

// lacksDeviceMemory reports whether an allocation of device memory has failed for want of it. HIP answers the same code
// when it has no hardware queue for a stream, or no memory of the host to lock.
func lacksDeviceMemory(err error) bool {
	e, ok := errors.AsType[*amdhip.Error](err)
	return ok && e.Code == amdhip.ErrOutOfMemory && slices.Contains([]string{"hipMalloc", "hipMallocAsync", "hipMemCreate"}, e.Func)
}
