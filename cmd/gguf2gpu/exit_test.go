package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/readback"
)

func TestCodeOf(t *testing.T) {
	t.Parallel()
	running := t.Context()
	interrupted, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("interrupt signal received"))

	_, noFile := os.Open("no such file")
	badModel := &gguf.FormatError{Path: "m.gguf", Err: errors.New("bad")}
	tests := []struct {
		name string
		ctx  context.Context
		err  error
		want exitCode
	}{
		{"no error", running, nil, exitOK},
		{"no error although interrupted", interrupted, nil, exitOK},
		{"any other error", running, errors.New("disk on fire"), exitFailed},
		{"usage", running, fmt.Errorf("wrapped: %w", usageErrorf("no")), exitUsage},
		{"missing file", running, noFile, exitFailed},
		{"forbidden file", running, &fs.PathError{Op: "open", Path: "m", Err: fs.ErrPermission}, exitFailed},
		{"bad model", running, fmt.Errorf("wrapped: %w", badModel), exitBadModel},
		{"bad value", running, &loader.TensorError{Err: &loader.ValueError{}}, exitBadModel},
		{"no library", running, &amdhip.LibraryError{}, exitNoDevice},
		{"no device", running, &amdhip.Error{Func: "hipGetDeviceCount", Code: amdhip.ErrNoDevice}, exitNoDevice},
		{"no hipRTC", running, fmt.Errorf("wrapped: %w", &amdhip.CompilerError{}), exitNoDevice},
		{"compiler", running, &amdhip.CompileError{Code: amdhip.ErrRTCCompilation}, exitFailed},
		{"device memory", running, &amdhip.Error{Func: "hipMalloc", Code: amdhip.ErrOutOfMemory}, exitNoMemory},
		{"no queue for a stream", running, &amdhip.Error{Func: "hipStreamCreateWithFlags", Code: amdhip.ErrOutOfMemory}, exitFailed},
		{"no memory to lock", running, &amdhip.Error{Func: "hipHostMalloc", Code: amdhip.ErrOutOfMemory}, exitFailed},
		{"no memory for blocks", running, fmt.Errorf("%w: %w", loader.ErrInsufficientMemory,
			&amdhip.Error{Func: "hipHostMalloc", Code: amdhip.ErrOutOfMemory}), exitNoMemory},
		{"the disk fails", running, &fs.PathError{Op: "read", Path: "m", Err: syscall.EIO}, exitFailed},
		{"does not fit", running, fmt.Errorf("wrapped: %w", &plan.MemoryError{}), exitNoMemory},
		{"mismatch", running, fmt.Errorf("wrapped: %w", &readback.MismatchError{}), exitMismatch},
		{"canceled by a signal", interrupted, context.Canceled, exitInterrupted},
		{"canceled with the cause", interrupted, fmt.Errorf("load: %w", context.Cause(interrupted)), exitInterrupted},
		{"canceled without a signal", running, context.Canceled, exitFailed},
		{"another error while interrupted", interrupted, badModel, exitBadModel},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := codeOf(tt.ctx, tt.err); got != tt.want {
				t.Errorf("codeOf(%v) = %d, want %d", tt.err, got, tt.want)
			}
		})
	}
}
