package loader

import (
	"errors"
	"fmt"
	"strings"

	"github.com/dustin/go-humanize"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

var (
	// ErrBadOption is matched by errors that refuse a field of Config, Request or plan.Spec.
	ErrBadOption = plan.ErrBadOption
	// ErrInsufficientMemory is matched by the error of a load that does not fit a device's free memory.
	ErrInsufficientMemory = plan.ErrInsufficientMemory
	// ErrStalled is matched by the error of a load that made no progress for Config.Stall. What the device may still
	// read or write (staging buffers, the model's own memory) is then never freed.
	ErrStalled = watch.ErrStalled
	// ErrClosed is returned when a Model or a Loader is used after Close.
	ErrClosed = errors.New("loader: closed")
)

// TensorError says which tensor an error concerns, and what was being done with which of its bytes.
type TensorError struct {
	Tensor string
	// Op is "read", "check", "dequantize", "copy", "expand" (copy blocks, and dequantize on the device), "prove" (compute
	// fingerprints on the device) or "read back".
	Op string
	// Offset is the first byte: in the tensor's bytes in the file for "read", "check" and "dequantize" (of a slice, in the
	// slice's), on the device for the others.
	Offset int64
	Bytes  int
	Err    error
}

// Error returns tensor, operation, byte range and cause.
func (e *TensorError) Error() string {
	return fmt.Sprintf("tensor %q, %s of bytes %d to %d: %v", e.Tensor, e.Op, e.Offset, e.Offset+int64(e.Bytes), e.Err)
}

// Unwrap returns the cause.
func (e *TensorError) Unwrap() error { return e.Err }

// readError makes a TensorError of what reading failed with. Others stay as they are.
func readError(err error) error {
	if e, ok := errors.AsType[*read.Error](err); ok {
		return &TensorError{Tensor: e.Tensor, Op: "read", Offset: e.Offset, Bytes: e.Bytes, Err: e.Err}
	}
	return err
}

// LeftError is what Close returns when something could not be freed, because a device that hangs may still use it, or
// because freeing it waits for that device. It stays taken until the process ends, unless the device comes back.
type LeftError struct {
	DeviceBytes uint64
	HostBytes   uint64 // of staging memory
	Streams     int
	Kernels     int
}

// Error says how much is left.
func (e *LeftError) Error() string {
	var what []string
	if e.DeviceBytes > 0 {
		what = append(what, humanize.IBytes(e.DeviceBytes)+" of device memory")
	}
	if e.HostBytes > 0 {
		what = append(what, humanize.IBytes(e.HostBytes)+" of staging memory")
	}
	if e.Streams > 0 {
		what = append(what, fmt.Sprintf("%d streams", e.Streams))
	}
	if e.Kernels > 0 {
		what = append(what, fmt.Sprintf("%d sets of kernels", e.Kernels))
	}
	return fmt.Sprintf("loader: left until the process ends, as a device that hangs may still use it: %s",
		strings.Join(what, ", "))
}

// Unwrap makes the error match ErrStalled.
func (e *LeftError) Unwrap() error { return ErrStalled }

// add counts what another one says, too.
func (e *LeftError) add(more LeftError) {
	e.DeviceBytes += more.DeviceBytes
	e.HostBytes += more.HostBytes
	e.Streams += more.Streams
	e.Kernels += more.Kernels
}

// orNil is a copy of the error, nil if nothing is left.
func (e *LeftError) orNil() error {
	if *e == (LeftError{}) {
		return nil
	}
	left := *e
	return &left
}

// onDevice says which of several devices an error is of.
func onDevice(dev *amdhip.Device, several bool, err error) error {
	if err == nil || !several {
		return err
	}
	return fmt.Errorf("device %d: %w", dev.Index(), err)
}
