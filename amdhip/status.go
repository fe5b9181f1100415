package amdhip

import (
	"errors"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// Status is a hipError_t, what HIP's functions answer. The numbers are the same in HIP 5.0 to 7.x. A Status other than
// Success is an error; its text is HIP's name of the code and the number. errors.Is(err, amdhip.ErrOutOfMemory) works
// on what the package returns.
type Status = hip.Status

// The codes that callers are likely to tell apart; any other number is a valid Status too.
const (
	Success                        = hip.Success
	ErrInvalidValue                = hip.ErrInvalidValue
	ErrOutOfMemory                 = hip.ErrOutOfMemory
	ErrNotInitialized              = hip.ErrNotInitialized
	ErrDeinitialized               = hip.ErrDeinitialized
	ErrInvalidConfiguration        = hip.ErrInvalidConfiguration
	ErrInvalidDevicePointer        = hip.ErrInvalidDevicePointer
	ErrInvalidMemcpyDirection      = hip.ErrInvalidMemcpyDirection
	ErrInsufficientDriver          = hip.ErrInsufficientDriver
	ErrNoDevice                    = hip.ErrNoDevice
	ErrInvalidDevice               = hip.ErrInvalidDevice
	ErrInvalidImage                = hip.ErrInvalidImage   // no code object
	ErrInvalidContext              = hip.ErrInvalidContext // also of a process that opens its own IPC handle
	ErrMapFailed                   = hip.ErrMapFailed
	ErrUnmapFailed                 = hip.ErrUnmapFailed
	ErrAlreadyMapped               = hip.ErrAlreadyMapped
	ErrNoBinaryForGPU              = hip.ErrNoBinaryForGPU // a code object for another architecture
	ErrNotMapped                   = hip.ErrNotMapped
	ErrECCNotCorrectable           = hip.ErrECCNotCorrectable
	ErrPeerAccessUnsupported       = hip.ErrPeerAccessUnsupported
	ErrInvalidSource               = hip.ErrInvalidSource
	ErrInvalidHandle               = hip.ErrInvalidHandle
	ErrIllegalState                = hip.ErrIllegalState
	ErrNotFound                    = hip.ErrNotFound
	ErrNotReady                    = hip.ErrNotReady // an answer, not a failure
	ErrIllegalAddress              = hip.ErrIllegalAddress
	ErrLaunchOutOfResources        = hip.ErrLaunchOutOfResources
	ErrPeerAccessAlreadyEnabled    = hip.ErrPeerAccessAlreadyEnabled
	ErrPeerAccessNotEnabled        = hip.ErrPeerAccessNotEnabled
	ErrContextIsDestroyed          = hip.ErrContextIsDestroyed
	ErrHostMemoryAlreadyRegistered = hip.ErrHostMemoryAlreadyRegistered
	ErrHostMemoryNotRegistered     = hip.ErrHostMemoryNotRegistered
	ErrLaunchFailure               = hip.ErrLaunchFailure
	ErrNotSupported                = hip.ErrNotSupported
	ErrStreamCaptureUnsupported    = hip.ErrStreamCaptureUnsupported // a call that cannot be recorded
	ErrStreamCaptureInvalidated    = hip.ErrStreamCaptureInvalidated // by an earlier failure
	ErrStreamCaptureMerge          = hip.ErrStreamCaptureMerge       // it would make two recordings one
	ErrStreamCaptureUnmatched      = hip.ErrStreamCaptureUnmatched   // the stream has not begun to record
	ErrStreamCaptureUnjoined       = hip.ErrStreamCaptureUnjoined    // a stream that was made to record was not waited for
	ErrStreamCaptureIsolation      = hip.ErrStreamCaptureIsolation   // waits for work that is not recorded
	ErrCapturedEvent               = hip.ErrCapturedEvent            // the event was recorded, not done
	ErrStreamCaptureWrongThread    = hip.ErrStreamCaptureWrongThread
	ErrUnknown                     = hip.ErrUnknown
)

// StopsWork reports whether err, from a question after a stream or an event, says that the work itself has failed for
// good: HIP then executes nothing of that stream any more. Any other error says nothing about the work, which may still
// be under way: the question has failed.
func StopsWork(err error) bool {
	for _, code := range []Status{
		ErrECCNotCorrectable, ErrIllegalAddress, 702 /* LaunchTimeOut */, ErrContextIsDestroyed, 710, /* Assert */
		ErrLaunchFailure,
	} {
		if errors.Is(err, code) {
			return true
		}
	}
	return false
}

// RTCStatus is a hiprtcResult, what hipRTC's functions answer. Other than RTCSuccess it is an error.
type RTCStatus = hip.RTCStatus

// The codes that callers are likely to tell apart; any other number is a valid RTCStatus too.
const (
	RTCSuccess           = hip.RTCSuccess
	ErrRTCOutOfMemory    = hip.ErrRTCOutOfMemory
	ErrRTCInvalidInput   = hip.ErrRTCInvalidInput
	ErrRTCInvalidProgram = hip.ErrRTCInvalidProgram
	ErrRTCInvalidOption  = hip.ErrRTCInvalidOption
	ErrRTCCompilation    = hip.ErrRTCCompilation // the source has an error; the log says which
	ErrRTCInternal       = hip.ErrRTCInternal
)

var (
	// ErrNoLibrary is matched by the error of Open when no HIP library could be opened; the error lists every attempt.
	ErrNoLibrary = errors.New("no HIP library could be opened")
	// ErrUnsupported is matched when the library lacks an optional function, when it answers that it cannot do what was
	// asked, and when the platform has no HIP at all. Whatever matches it matches errors.ErrUnsupported, too.
	ErrUnsupported = hip.ErrUnsupported
	// ErrClosed is matched when a handle is used after its Close.
	ErrClosed = errors.New("handle is closed")
)

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
