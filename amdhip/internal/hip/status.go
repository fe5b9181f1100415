package hip

import (
	"errors"
	"fmt"
)

// Status is a hipError_t. The numbers are the same in HIP 5.0 to 7.x. A Status other than Success is an error, so
// errors.Is(err, amdhip.ErrOutOfMemory) works on what package amdhip returns.
type Status int32

// The codes that callers are likely to tell apart; any other number is a valid Status too.
const (
	Success                        Status = 0
	ErrInvalidValue                Status = 1
	ErrOutOfMemory                 Status = 2
	ErrNotInitialized              Status = 3
	ErrDeinitialized               Status = 4
	ErrInvalidConfiguration        Status = 9
	ErrInvalidDevicePointer        Status = 17
	ErrInvalidMemcpyDirection      Status = 21
	ErrInsufficientDriver          Status = 35
	ErrNoDevice                    Status = 100
	ErrInvalidDevice               Status = 101
	ErrInvalidImage                Status = 200 // no code object
	ErrInvalidContext              Status = 201 // also of a process that opens its own IPC handle
	ErrMapFailed                   Status = 205
	ErrUnmapFailed                 Status = 206
	ErrAlreadyMapped               Status = 208
	ErrNoBinaryForGPU              Status = 209 // a code object for another architecture
	ErrNotMapped                   Status = 211
	ErrECCNotCorrectable           Status = 214
	ErrPeerAccessUnsupported       Status = 217
	ErrInvalidSource               Status = 300
	ErrInvalidHandle               Status = 400
	ErrIllegalState                Status = 401
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
	ErrStreamCaptureUnsupported    Status = 900 // a call that cannot be recorded
	ErrStreamCaptureInvalidated    Status = 901 // by an earlier failure
	ErrStreamCaptureMerge          Status = 902 // it would make two recordings one
	ErrStreamCaptureUnmatched      Status = 903 // the stream has not begun to record
	ErrStreamCaptureUnjoined       Status = 904 // a stream that was made to record was not waited for
	ErrStreamCaptureIsolation      Status = 905 // waits for work that is not recorded
	ErrCapturedEvent               Status = 907 // the event was recorded, not done
	ErrStreamCaptureWrongThread    Status = 908
	ErrUnknown                     Status = 999
)

// StatusNames holds HIP's own names of the codes. The library is not asked for them, because HIP 5 answers
// "hipErrorUnknown" for every number that it does not know.
var StatusNames = map[Status]string{
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
	ErrPeerAccessAlreadyEnabled:    "hipErrorPeerAccessAlreadyEnabled",
	ErrPeerAccessNotEnabled:        "hipErrorPeerAccessNotEnabled",
	ErrContextIsDestroyed:          "hipErrorContextIsDestroyed",
	ErrHostMemoryAlreadyRegistered: "hipErrorHostMemoryAlreadyRegistered",
	ErrHostMemoryNotRegistered:     "hipErrorHostMemoryNotRegistered", ErrLaunchFailure: "hipErrorLaunchFailure",
	ErrNotSupported: "hipErrorNotSupported", ErrUnknown: "hipErrorUnknown",
	ErrInvalidConfiguration:     "hipErrorInvalidConfiguration",
	ErrUnmapFailed:              "hipErrorUnmapFailed",
	ErrAlreadyMapped:            "hipErrorAlreadyMapped",
	ErrNotMapped:                "hipErrorNotMapped",
	ErrIllegalState:             "hipErrorIllegalState",
	ErrStreamCaptureUnsupported: "hipErrorStreamCaptureUnsupported",
	ErrStreamCaptureInvalidated: "hipErrorStreamCaptureInvalidated",
	ErrStreamCaptureMerge:       "hipErrorStreamCaptureMerge",
	ErrStreamCaptureUnmatched:   "hipErrorStreamCaptureUnmatched",
	ErrStreamCaptureUnjoined:    "hipErrorStreamCaptureUnjoined",
	ErrStreamCaptureIsolation:   "hipErrorStreamCaptureIsolation",
	ErrCapturedEvent:            "hipErrorCapturedEvent",
	ErrStreamCaptureWrongThread: "hipErrorStreamCaptureWrongThread",
}

// Error returns HIP's name of the code and its number.
func (s Status) Error() string {
	if name, ok := StatusNames[s]; ok {
		return fmt.Sprintf("%s (%d)", name, int32(s))
	}
	return fmt.Sprintf("hipError_t %d", int32(s))
}

// Is makes the codes with which HIP says that it cannot do something match ErrUnsupported and errors.ErrUnsupported.
func (s Status) Is(target error) bool {
	return (s == ErrNotSupported || s == ErrPeerAccessUnsupported) &&
		(target == ErrUnsupported || target == errors.ErrUnsupported)
}

// ErrUnsupported is amdhip.ErrUnsupported.
var ErrUnsupported error = unsupported{}

type unsupported struct{}

func (unsupported) Error() string { return "not supported by this HIP library" }

// Unwrap makes it match the error that the standard library has for this.
func (unsupported) Unwrap() error { return errors.ErrUnsupported }

// RTCStatus is a hiprtcResult, what hipRTC's functions answer. Other than RTCSuccess it is an error.
type RTCStatus int32

// The codes that callers are likely to tell apart; any other number is a valid RTCStatus too.
const (
	RTCSuccess           RTCStatus = 0
	ErrRTCOutOfMemory    RTCStatus = 1
	ErrRTCInvalidInput   RTCStatus = 3
	ErrRTCInvalidProgram RTCStatus = 4
	ErrRTCInvalidOption  RTCStatus = 5
	ErrRTCCompilation    RTCStatus = 6 // the source has an error; the log says which
	ErrRTCInternal       RTCStatus = 11
)

// RTCNames holds hipRTC's own names.
var RTCNames = map[RTCStatus]string{
	RTCSuccess: "HIPRTC_SUCCESS", ErrRTCOutOfMemory: "HIPRTC_ERROR_OUT_OF_MEMORY",
	2: "HIPRTC_ERROR_PROGRAM_CREATION_FAILURE", ErrRTCInvalidInput: "HIPRTC_ERROR_INVALID_INPUT",
	ErrRTCInvalidProgram: "HIPRTC_ERROR_INVALID_PROGRAM", ErrRTCInvalidOption: "HIPRTC_ERROR_INVALID_OPTION",
	ErrRTCCompilation: "HIPRTC_ERROR_COMPILATION", 7: "HIPRTC_ERROR_BUILTIN_OPERATION_FAILURE",
	8: "HIPRTC_ERROR_NO_NAME_EXPRESSIONS_AFTER_COMPILATION", 9: "HIPRTC_ERROR_NO_LOWERED_NAMES_BEFORE_COMPILATION",
	10: "HIPRTC_ERROR_NAME_EXPRESSION_NOT_VALID", ErrRTCInternal: "HIPRTC_ERROR_INTERNAL_ERROR",
}

// Error returns hipRTC's name of the code and its number.
func (s RTCStatus) Error() string {
	if name, ok := RTCNames[s]; ok {
		return fmt.Sprintf("%s (%d)", name, int32(s))
	}
	return fmt.Sprintf("hiprtcResult %d", int32(s))
}
