package amdhip

import (
	"errors"
	"fmt"
)

// Status is a hipError_t. The numbers are the same in HIP 5.0 to 7.x. A Status other than Success is an error, so
// errors.Is(err, amdhip.ErrOutOfMemory) works on what the package returns.
type Status int32

// The codes that callers are likely to tell apart; any other number is a valid Status too.
const (
	Success                        Status = 0
	ErrInvalidValue                Status = 1
	ErrOutOfMemory                 Status = 2
	ErrNotInitialized              Status = 3
	ErrDeinitialized               Status = 4
	ErrInvalidDevicePointer        Status = 17
	ErrInvalidMemcpyDirection      Status = 21
	ErrInsufficientDriver          Status = 35
	ErrNoDevice                    Status = 100
	ErrInvalidDevice               Status = 101
	ErrInvalidImage                Status = 200 // no code object
	ErrInvalidContext              Status = 201 // also of a process that opens its own IPC handle
	ErrMapFailed                   Status = 205
	ErrNoBinaryForGPU              Status = 209 // a code object for another architecture
	ErrECCNotCorrectable           Status = 214
	ErrPeerAccessUnsupported       Status = 217
	ErrInvalidSource               Status = 300
	ErrInvalidHandle               Status = 400
	ErrNotFound                    Status = 500
	ErrNotReady                    Status = 600 // an answer, not a failure
	ErrIllegalAddress              Status = 700
	ErrLaunchOutOfResources        Status = 701
	ErrPeerAccessAlreadyEnabled    Status = 704
	ErrPeerAccessNotEnabled        Status = 705
	ErrContextIsDestroyed          Status = 709
	ErrHostMemoryAlreadyRegistered Status = 712
	ErrHostMemoryNotRegistered     Status = 713
	ErrLaunchFailure               Status = 719
	ErrNotSupported                Status = 801
	ErrUnknown                     Status = 999
)

var (
	// ErrNoLibrary is matched by the error of Open when no HIP library could be opened; the error lists every attempt.
	ErrNoLibrary = errors.New("no HIP library could be opened")
	// ErrUnsupported is matched when the library lacks an optional entry point, or the platform has no HIP at all.
	ErrUnsupported = errors.New("not supported by this HIP library")
	// ErrClosed is matched when a handle is used after its Close.
	ErrClosed = errors.New("handle is closed")
)

// statusNames holds HIP's own names. They stand here, too, because HIP 5 answers unknown numbers with "hipErrorUnknown".
var statusNames = map[Status]string{
	Success: "hipSuccess", ErrInvalidValue: "hipErrorInvalidValue", ErrOutOfMemory: "hipErrorOutOfMemory",
	ErrNotInitialized: "hipErrorNotInitialized", ErrDeinitialized: "hipErrorDeinitialized",
	ErrInvalidDevicePointer: "hipErrorInvalidDevicePointer", ErrInvalidMemcpyDirection: "hipErrorInvalidMemcpyDirection",
	ErrInsufficientDriver: "hipErrorInsufficientDriver", ErrNoDevice: "hipErrorNoDevice",
	ErrInvalidDevice: "hipErrorInvalidDevice", ErrInvalidImage: "hipErrorInvalidImage",
	ErrInvalidContext: "hipErrorInvalidContext", ErrMapFailed: "hipErrorMapFailed",
	ErrNoBinaryForGPU: "hipErrorNoBinaryForGpu", ErrECCNotCorrectable: "hipErrorECCNotCorrectable",
	ErrPeerAccessUnsupported: "hipErrorPeerAccessUnsupported", ErrInvalidSource: "hipErrorInvalidSource",
	ErrInvalidHandle: "hipErrorInvalidHandle", ErrNotFound: "hipErrorNotFound", ErrNotReady: "hipErrorNotReady",
	ErrIllegalAddress: "hipErrorIllegalAddress", ErrLaunchOutOfResources: "hipErrorLaunchOutOfResources",
	ErrPeerAccessAlreadyEnabled: "hipErrorPeerAccessAlreadyEnabled", ErrPeerAccessNotEnabled: "hipErrorPeerAccessNotEnabled",
	ErrContextIsDestroyed: "hipErrorContextIsDestroyed", ErrHostMemoryAlreadyRegistered: "hipErrorHostMemoryAlreadyRegistered",
	ErrHostMemoryNotRegistered: "hipErrorHostMemoryNotRegistered", ErrLaunchFailure: "hipErrorLaunchFailure",
	ErrNotSupported: "hipErrorNotSupported", ErrUnknown: "hipErrorUnknown",
}

// Error returns HIP's name of the code and its number.
func (s Status) Error() string {
	if name, ok := statusNames[s]; ok {
		return fmt.Sprintf("%s (%d)", name, int32(s))
	}
	return fmt.Sprintf("hipError_t %d", int32(s))
}

// Error is a HIP call that failed.
type Error struct {
	Func   string // HIP's name of the call, "hipMalloc"
	Code   Status
	Detail string // what the call was about ("1073741824 bytes on device 0"); may be empty
	Text   string // the library's own words for a code that this package has no name for; else empty
}

// Error returns the call, the code and what it was about.
func (e *Error) Error() string {
	s := e.Func
	if e.Detail != "" {
		s += ", " + e.Detail
	}
	s += ": " + e.Code.Error()
	if e.Text != "" {
		s += ": " + e.Text
	}
	return s
}

// Unwrap returns the code, so that errors.Is finds it.
func (e *Error) Unwrap() error { return e.Code }

// Is makes code 801 match ErrUnsupported too.
func (e *Error) Is(target error) bool { return target == ErrUnsupported && e.Code == ErrNotSupported }
