package amdhip

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// CompileError is a hipRTC call that failed.
type CompileError struct {
	Func string    // hipRTC's name of the call, "hiprtcCompileProgram"
	Code RTCStatus // what it answered
	Text string    // hipRTC's own words for a code that this package has no name for; else empty
	Name string    // of the program
	Log  string    // what the compiler had to say, without white space around it; may be empty
}

// compileErrorLines is how much of the log an error's text shows: compilers tell the cause first.
const compileErrorLines = 20

// Error returns the call, the program and the code, then the first lines of the log, each on a line of its own.
func (e *CompileError) Error() string {
	s := fmt.Sprintf("%s, program %q: %v", e.Func, e.Name, e.Code)
	if e.Text != "" {
		s += ": " + e.Text
	}
	if e.Log == "" {
		return s
	}
	lines := strings.Split(e.Log, "\n")
	if more := len(lines) - compileErrorLines; more > 0 {
		lines = append(lines[:compileErrorLines], fmt.Sprintf("(%d more lines)", more))
	}
	return s + "\n\t" + strings.Join(lines, "\n\t")
}

// Unwrap returns the code, so that errors.Is finds it.
func (e *CompileError) Unwrap() error { return e.Code }

// CompilerError is the error of Compiler and Compile when hipRTC was not found. It matches ErrUnsupported, and whatever
// the errors of its attempts match.
type CompilerError struct {
	Attempts []Attempt // in the order in which they were made
}

// Error lists every attempt on a line of its own.
func (e *CompilerError) Error() string {
	return "amdhip: no hipRTC, which compiles kernels, could be opened: " + ErrUnsupported.Error() +
		listAttempts(e.Attempts)
}

// Unwrap returns ErrUnsupported and the errors of the attempts.
func (e *CompilerError) Unwrap() []error { return attemptErrors(ErrUnsupported, e.Attempts) }

// compiler returns hipRTC. The search is made once.
func (rt *Runtime) compiler() (*hip.Compiler, error) {
	if err := rt.usable(); err != nil {
		return nil, err
	}
	if rt.backend.Compiler == nil {
		return nil, rt.missing("hiprtcCreateProgram")
	}
	return rt.backend.Compiler()
}

// Compiler finds hipRTC on the first call and returns where it is: the path or name of its library, which is that of
// the HIP library if hipRTC is part of it, or "software device". When it is not found the error is a *CompilerError
// that matches ErrUnsupported. The package documentation says where it is searched for.
func (rt *Runtime) Compiler() (path string, err error) {
	lib, err := rt.compiler()
	if err != nil {
		return "", err
	}
	return lib.Path, nil
}

// Compile compiles HIP C++ with hipRTC and returns the code object for LoadModule. The name stands for the source in
// the compiler's messages. One of the options must name the architecture, "--gpu-architecture=" and Device.Arch; there
// are no headers. No GPU is needed. It takes a fraction of a second to several seconds, during which an OS thread is
// held, and cannot be cancelled. A call that fails gives a *CompileError, with the compiler's log.
//
// SOME VERSIONS OF AMD'S COMPILER END THE WHOLE PROCESS (SIGABRT, which nothing can catch) for an architecture that
// they do not know, instead of returning an error: Debian's HIP 5.2, 5.7 and 6.4 do, 7.2 does not. Compile for the
// architecture of a device that is present only; and where the process must not die, compile in a child process and
// hand the code over.
func (rt *Runtime) Compile(name, source string, options ...string) (code []byte, err error) {
	lib, err := rt.compiler()
	if err != nil {
		return nil, err
	}
	for _, s := range append([]string{name, source}, options...) {
		if strings.IndexByte(s, 0) >= 0 { // C would see the part before it
			return nil, &CompileError{
				Func: "hiprtcCreateProgram", Code: ErrRTCInvalidInput, Name: name,
				Log: "not called: a zero byte in the name, the source or an option",
			}
		}
	}
	c := compilation{api: lib.RTC, name: name}
	if st := c.api.HiprtcCreateProgram(&c.program, source, name, 0, nil, nil); st != RTCSuccess {
		return nil, c.fail("hiprtcCreateProgram", st)
	}
	defer func() {
		if st := c.api.HiprtcDestroyProgram(&c.program); st != RTCSuccess && err == nil {
			code, err = nil, c.fail("hiprtcDestroyProgram", st)
		}
	}()
	st := c.compile(options)
	c.fetchLog()
	if st != RTCSuccess {
		return nil, c.fail("hiprtcCompileProgram", st)
	}
	if c.log != "" {
		rt.log.Debug("amdhip: compiled with messages", "program", name, "log", c.log)
	}
	return c.code()
}

// compilation is one program on its way through hipRTC.
type compilation struct {
	api     *hip.RTC
	name    string
	program uintptr
	log     string
}

// fail makes the error of a call that answered st.
func (c *compilation) fail(call string, st RTCStatus) error {
	e := &CompileError{Func: call, Code: st, Name: c.name, Log: c.log}
	if _, named := hip.RTCNames[st]; !named {
		e.Text = c.api.HiprtcGetErrorString(st)
	}
	return e
}

// compile calls hiprtcCompileProgram.
func (c *compilation) compile(options []string) RTCStatus {
	if len(options) == 0 {
		return c.api.HiprtcCompileProgram(c.program, 0, nil)
	}
	// hipRTC reads the texts through these pointers during the call, so they are pinned for as long.
	var pins runtime.Pinner
	defer pins.Unpin()
	texts := make([]*byte, len(options))
	for i, option := range options {
		texts[i] = unsafe.SliceData(append([]byte(option), 0))
		pins.Pin(texts[i])
	}
	return c.api.HiprtcCompileProgram(c.program, int32(len(texts)), &texts[0])
}

// fetchLog gets the compiler's log. A failure to get it decides nothing, so it is reported in place of the log.
func (c *compilation) fetchLog() {
	b, err := c.bytes("hiprtcGetProgramLogSize", c.api.HiprtcGetProgramLogSize, "hiprtcGetProgramLog",
		c.api.HiprtcGetProgramLog)
	if err != nil {
		c.log = "no log: " + err.Error()
		return
	}
	c.log = strings.TrimSpace(cString(b))
}

func (c *compilation) code() ([]byte, error) {
	b, err := c.bytes("hiprtcGetCodeSize", c.api.HiprtcGetCodeSize, "hiprtcGetCode", c.api.HiprtcGetCode)
	if err != nil {
		return nil, err
	}
	if len(b) == 0 {
		c.log = strings.TrimSpace("the code has 0 bytes\n" + c.log)
		return nil, c.fail("hiprtcGetCodeSize", ErrRTCInternal)
	}
	return b, nil
}

// bytes asks for a size and then for that many bytes.
func (c *compilation) bytes(sizeCall string, size func(uintptr, *uintptr) RTCStatus, getCall string,
	get func(uintptr, *byte) RTCStatus,
) ([]byte, error) {
	var n uintptr
	if st := size(c.program, &n); st != RTCSuccess {
		return nil, c.fail(sizeCall, st)
	}
	b := make([]byte, n, n+1) // one more, for versions that end a log with a zero byte that they do not count
	if st := get(c.program, unsafe.SliceData(b)); st != RTCSuccess {
		return nil, c.fail(getCall, st)
	}
	return slices.Clip(b), nil
}
