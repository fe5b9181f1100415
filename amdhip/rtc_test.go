package amdhip

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestSoftCompile(t *testing.T) {
	const b = "\nextern \"C\"\n\t__global__ __launch_bounds__( 64 ) __attribute__ (x) void b (u64 *p) {}\n"
	for _, tt := range []struct {
		name, source string
		options      []string
		arch         string
		kernels      []string
		code         RTCStatus
		log          string
	}{
		{name: "one kernel", source: addOneSource, arch: softArch, kernels: []string{"add_one"}},
		{name: "two kernels", source: addOneSource + b, arch: softArch, kernels: []string{"add_one", "b"}},
		{
			name: "architecture", source: addOneSource, kernels: []string{"add_one"},
			options: []string{"-O3", "--gpu-architecture=gfx90a:xnack-"}, arch: "gfx90a:xnack-",
		},
		{
			name: "architecture, last one wins", source: addOneSource, kernels: []string{"add_one"},
			options: []string{"--gpu-architecture=x", "--offload-arch=gfx1100"}, arch: "gfx1100",
		},
		{
			name: "comments", source: "// extern \"C\" __global__ void old(\n/* extern \"C\" __global__ void\nolder( */" + b,
			arch: softArch, kernels: []string{"b"},
		},
		{
			name: "no stand-in", source: addOneSource + `extern "C" __global__ void c() extern "C" __global__ void d()`,
			code: ErrRTCCompilation,
			log: "test.hip: error: no Go function stands in for kernel c on the software device\n" +
				"test.hip: error: no Go function stands in for kernel d on the software device",
		},
		{
			name: "no kernel", source: "__global__ void add_one() {}", code: ErrRTCCompilation,
			log: `test.hip: error: no kernel is declared extern "C" __global__ void`,
		},
		{name: "bad option", source: addOneSource, options: []string{"gfx90a"}, code: ErrRTCInvalidOption},
		{name: "no source", code: ErrRTCInvalidInput},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rt, _ := openSoft(t, SoftwareOptions{})
			offerAddOne(rt)
			rt.Software().Offer("b", 1, func(*SoftLaunch) Status { return Success })
			code, err := rt.Compile("test.hip", tt.source, tt.options...)
			if tt.code != RTCSuccess {
				e, ok := errors.AsType[*CompileError](err)
				if !ok || code != nil || !errors.Is(err, tt.code) || e.Code != tt.code || e.Name != "test.hip" || e.Log != tt.log {
					t.Fatalf("got %v, want %v with the log\n%s", err, tt.code, tt.log)
				}
			} else if arch, kernels, ok := parseSoftCode(string(code)); err != nil || !ok || arch != tt.arch ||
				!slices.Equal(kernels, tt.kernels) {
				t.Errorf("got %q, %v, want code for %s with %q", code, err, tt.arch, tt.kernels)
			}
			if got := len(rt.Software().programs); got != 0 {
				t.Errorf("%d programs are left", got)
			}
		})
	}
}

// Every call of hipRTC fails in turn. The error names it and its code, and no program is left behind.
func TestCompileFaults(t *testing.T) {
	rt, _ := openSoft(t, SoftwareOptions{})
	offerAddOne(rt)
	sw := rt.Software()
	for _, call := range []string{
		"hiprtcCreateProgram", "hiprtcCompileProgram", "hiprtcGetCodeSize", "hiprtcGetCode", "hiprtcDestroyProgram",
	} {
		t.Run(call, func(t *testing.T) {
			sw.Inject(Fault{Func: call, N: 1, Code: Status(ErrRTCOutOfMemory)})
			code, err := rt.Compile("test.hip", addOneSource)
			e, ok := errors.AsType[*CompileError](err)
			if !ok || code != nil || e.Func != call || e.Code != ErrRTCOutOfMemory || e.Name != "test.hip" {
				t.Errorf("got %q, %v, want %s: %v", code, err, call, ErrRTCOutOfMemory)
			}
			want := 0
			if call == "hiprtcDestroyProgram" {
				want = 1 // hipRTC has refused to let go
			}
			if got := len(sw.programs); got != want {
				t.Errorf("%d programs are left, want %d", got, want)
			}
			clear(sw.programs)
		})
	}
	// The log is not what decides.
	for _, call := range []string{"hiprtcGetProgramLogSize", "hiprtcGetProgramLog"} {
		t.Run(call, func(t *testing.T) {
			sw.Inject(Fault{Func: call, N: 1, Code: Status(ErrRTCInternal)})
			if _, err := rt.Compile("test.hip", addOneSource); err != nil {
				t.Errorf("source that is right: %v", err)
			}
			sw.Inject(Fault{Func: call, N: 1, Code: Status(ErrRTCInternal)})
			_, err := rt.Compile("test.hip", "nothing")
			e, ok := errors.AsType[*CompileError](err)
			if !ok || e.Func != "hiprtcCompileProgram" || e.Code != ErrRTCCompilation || !strings.Contains(e.Log, call) {
				t.Errorf("source that is wrong: %v, want %v that tells about %s", err, ErrRTCCompilation, call)
			}
		})
	}
	// An error is not covered by one of destroying.
	sw.Inject(Fault{Func: "hiprtcDestroyProgram", N: 1, Code: Status(ErrRTCInternal)})
	if _, err := rt.Compile("test.hip", "nothing"); !errors.Is(err, ErrRTCCompilation) || errors.Is(err, ErrRTCInternal) {
		t.Errorf("got %v, want %v", err, ErrRTCCompilation)
	}
}

// A zero byte would end the text for C.
func TestCompileZeroBytes(t *testing.T) {
	rt, _ := openSoft(t, SoftwareOptions{})
	offerAddOne(rt)
	for name, args := range map[string][]string{
		"name": {"a\x00b", addOneSource}, "source": {"a", addOneSource + "\x00"}, "option": {"a", addOneSource, "-D\x00"},
	} {
		_, err := rt.Compile(args[0], args[1], args[2:]...)
		if e, ok := errors.AsType[*CompileError](err); !ok || e.Code != ErrRTCInvalidInput {
			t.Errorf("%s: %v, want %v", name, err, ErrRTCInvalidInput)
		}
	}
	if got := rt.Software().Calls()["hiprtcCreateProgram"]; got != 0 {
		t.Errorf("hipRTC was called %d times", got)
	}
}

// hipRTC is a C library: logs may or may not count the zero byte behind them, code may be empty, codes may be unknown.
func TestCompileOddLibrary(t *testing.T) {
	ok := func(uintptr, *byte) RTCStatus { return RTCSuccess }
	size := func(n uintptr) func(uintptr, *uintptr) RTCStatus {
		return func(_ uintptr, p *uintptr) RTCStatus { *p = n; return RTCSuccess }
	}
	text := func(s string) func(uintptr, *byte) RTCStatus {
		return func(_ uintptr, p *byte) RTCStatus { return putBytes(RTCSuccess, p, s) }
	}
	result := RTCSuccess
	lib := &rtcLibrary{api: &rtcAPI{
		hiprtcCreateProgram:     func(*uintptr, string, string, int32, **byte, **byte) RTCStatus { return RTCSuccess },
		hiprtcCompileProgram:    func(uintptr, int32, **byte) RTCStatus { return result },
		hiprtcGetProgramLogSize: size(4),
		hiprtcGetProgramLog:     text("\nlog\x00"), // one more than it said
		hiprtcGetCodeSize:       size(0),
		hiprtcGetCode:           ok,
		hiprtcDestroyProgram:    func(*uintptr) RTCStatus { return RTCSuccess },
		hiprtcGetErrorString:    func(code RTCStatus) string { return strings.Repeat("w", int(code)%100) },
	}}
	var log lockedBuffer
	d := nullRuntime(t, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	d.rt.rtc = func() (*rtcLibrary, error) { return lib, nil }
	for _, tt := range []struct {
		name string
		code RTCStatus
		want string
	}{
		{"empty code", RTCSuccess, "hiprtcGetCodeSize, program \"x\": HIPRTC_ERROR_INTERNAL_ERROR (11)\n\tthe code has 0 bytes\n\tlog"},
		{"a code of the future", 103, "hiprtcCompileProgram, program \"x\": hiprtcResult 103: www\n\tlog"},
		{"a code without text", 200, "hiprtcCompileProgram, program \"x\": hiprtcResult 200\n\tlog"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			result = tt.code
			if code, err := d.rt.Compile("x", "y"); code != nil || err == nil || err.Error() != tt.want {
				t.Errorf("got %q, %v, want %s", code, err, tt.want)
			}
		})
	}
	lib.api.hiprtcGetCodeSize, lib.api.hiprtcGetCode, result = size(3), text("\x7fEL"), RTCSuccess
	if code, err := d.rt.Compile("x", "y", "-a", "-b"); string(code) != "\x7fEL" || err != nil {
		t.Errorf("got %q, %v", code, err)
	}
	if !strings.Contains(log.String(), "log=log") {
		t.Errorf("what the compiler said about good source is not logged:\n%s", log.String())
	}
}

func TestCompileErrorText(t *testing.T) {
	numbered := func(from, to int) (s string) {
		for i := from; i <= to; i++ {
			s += fmt.Sprintf("\n\tline %d", i)
		}
		return s
	}
	log := func(n int) string { return strings.ReplaceAll(strings.TrimSpace(numbered(1, n)), "\t", "") }
	for _, tt := range []struct {
		err  error
		want string
	}{
		{ErrRTCCompilation, "HIPRTC_ERROR_COMPILATION (6)"},
		{RTCStatus(500), "hiprtcResult 500"},
		{&CompileError{Func: "f", Code: 3, Name: "n"}, `f, program "n": HIPRTC_ERROR_INVALID_INPUT (3)`},
		{&CompileError{Func: "f", Code: 6, Name: "n", Log: log(20)}, `f, program "n": HIPRTC_ERROR_COMPILATION (6)` + numbered(1, 20)},
		{
			&CompileError{Func: "f", Code: 6, Name: "n", Log: log(22)},
			`f, program "n": HIPRTC_ERROR_COMPILATION (6)` + numbered(1, 20) + "\n\t(2 more lines)",
		},
	} {
		if got := tt.err.Error(); got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}

// Runtimes without these functions say so.
func TestNoModules(t *testing.T) {
	d := nullRuntime(t, nil)
	d.rt.api.hipModuleLoadData = nil
	_, loadErr := d.LoadModule([]byte("code"))
	_, compileErr := d.rt.Compile("x", "y")
	_, compilerErr := d.rt.Compiler()
	for _, err := range []error{loadErr, compileErr, compilerErr} {
		if !errors.Is(err, ErrUnsupported) {
			t.Errorf("got %v, want %v", err, ErrUnsupported)
		}
	}
}

// searchCompiler runs findCompiler as search does find.
func searchCompiler(root string, major int, hip, real, env string, good func(string) bool) (tried []string, found string, err error) {
	f := finder{root: root, env: func(string) string { return env }, open: func(path string) error {
		if good(path) {
			return nil
		}
		return errNotLibrary
	}}
	found, err = f.findCompiler(major, hip, real)
	trim := func(path string) string { return filepath.ToSlash(strings.TrimPrefix(path, root)) }
	for _, a := range f.attempts {
		tried = append(tried, a.Source+" "+trim(a.Path))
	}
	return tried, trim(found), err
}

func TestFindCompiler(t *testing.T) {
	root := makeTree(t,
		"opt/rocm-7.0.0/lib/libhiprtc.so.7", "opt/rocm-7.0.0/lib/libhiprtc.so.6", "opt/rocm-7.0.0/lib/libhiprtc.so",
		"opt/rocm-6.2.0/lib/libhiprtc.so.6",
		"real/libamdhip64.so.7.0.1", "real/libhiprtc.so.7", "link/libamdhip64.so.7 -> real/libamdhip64.so.7.0.1",
		"link/libhiprtc.so.7", "bare/libamdhip64.so.7",
	)
	in := func(path string) string { return filepath.Join(root, path) }
	const beside, opt = "beside the HIP library ", "/opt/rocm* "
	for _, tt := range []struct {
		name            string
		major           int
		hip, real, env  string
		good            string // end of the only path that opens
		tried           []string
		found           string
		alsoNotExisting bool
		root            string // another one
	}{
		{name: "variable", major: 7, hip: in("link/libamdhip64.so.7"), env: "/x/rtc.so", good: "rtc.so", found: "/x/rtc.so"},
		{
			name: "variable is final", major: 6, hip: "libamdhip64.so.6", env: "/x/rtc.so", good: ".6",
			tried: []string{"GGUF2GPU_HIPRTC_LIBRARY /x/rtc.so"},
		},
		{name: "HIP 6 in the library", major: 6, hip: "libamdhip64.so.6", good: "libamdhip64.so.6", found: "libamdhip64.so.6"},
		{
			name: "HIP 6 of its own", major: 6, hip: "libamdhip64.so.6", good: "libhiprtc.so.6", found: "libhiprtc.so.6",
			tried: []string{"HIP library libamdhip64.so.6"},
		},
		{
			name: "HIP 6 in opt, not the one of 7", major: 6, hip: in("bare/libamdhip64.so.7"), good: "6.2.0/lib/libhiprtc.so.6",
			found: "/opt/rocm-6.2.0/lib/libhiprtc.so.6", alsoNotExisting: true,
			tried: []string{
				"HIP library /bare/libamdhip64.so.7", beside + "/bare/libhiprtc.so.6", "loader libhiprtc.so.6",
				opt + "/opt/rocm-7.0.0/lib/libhiprtc.so.6",
			},
		},
		{
			name: "HIP 7 beside the real file", major: 7, hip: in("link/libamdhip64.so.7"), real: in("real/libamdhip64.so.7.0.1"),
			good: "libhiprtc.so.7", found: "/real/libhiprtc.so.7",
		},
		{
			name: "HIP 7 beside the link", major: 7, hip: in("link/libamdhip64.so.7"), real: in("real/libamdhip64.so.7.0.1"),
			good: "link/libhiprtc.so.7", found: "/link/libhiprtc.so.7", tried: []string{beside + "/real/libhiprtc.so.7"},
		},
		{
			name: "HIP 7 that the loader found", major: 7, hip: "libamdhip64.so.7", real: in("real/libamdhip64.so.7.0.1"),
			good: "real/libhiprtc.so.7", found: "/real/libhiprtc.so.7",
		},
		{
			name: "HIP 7 by the loader", major: 7, hip: "libamdhip64.so.7", good: "libhiprtc.so.7", found: "libhiprtc.so.7",
		},
		{
			name: "HIP 7 that is opened in opt", major: 7, hip: in("opt/rocm-7.0.0/lib/libamdhip64.so.7"),
			tried: []string{
				beside + "/opt/rocm-7.0.0/lib/libhiprtc.so.7", "loader libhiprtc.so.7", opt + "/opt/rocm-6.2.0/lib/libhiprtc.so.7",
			},
			good: "none", alsoNotExisting: true,
		},
		{
			name: "HIP 8", major: 8, hip: in("gone/libamdhip64.so.8"), good: ".7", alsoNotExisting: true,
			tried: []string{
				beside + "/gone", "loader libhiprtc.so.8", opt + "/opt/rocm-7.0.0/lib/libhiprtc.so.8",
				opt + "/opt/rocm-6.2.0/lib/libhiprtc.so.8",
			},
		},
		{
			name: "no folders", major: 7, hip: "libamdhip64.so.7", good: "none", alsoNotExisting: true, root: makeTree(t),
			tried: []string{"loader libhiprtc.so.7", opt + "/opt/rocm*/lib"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := cmp.Or(tt.root, root)
			tried, found, err := searchCompiler(root, tt.major, tt.hip, tt.real, tt.env, func(path string) bool {
				return strings.HasSuffix(filepath.ToSlash(path), tt.good)
			})
			if !slices.Equal(tried, tt.tried) {
				t.Errorf("tried\n%s\nwant\n%s", strings.Join(tried, "\n"), strings.Join(tt.tried, "\n"))
			}
			if found != tt.found || (err == nil) != (found != "") {
				t.Fatalf("found %q, %v, want %q", found, err, tt.found)
			}
			if err != nil {
				wantCompilerError(t, err, tt.alsoNotExisting)
			}
		})
	}
}

// wantCompilerError checks that err lists its attempts and matches their errors and ErrUnsupported, not ErrNoLibrary.
func wantCompilerError(t *testing.T, err error, notExisting bool) {
	t.Helper()
	e, ok := errors.AsType[*CompilerError](err)
	if !ok || !errors.Is(err, ErrUnsupported) || !errors.Is(err, errNotLibrary) || errors.Is(err, fs.ErrNotExist) != notExisting ||
		errors.Is(err, ErrNoLibrary) {
		t.Fatalf("got %v, want a CompilerError that matches ErrUnsupported and its causes", err)
	}
	for _, a := range e.Attempts {
		if line := "\n\t" + a.Path + " (" + a.Source + "): " + a.Err.Error(); !strings.Contains(err.Error(), line) {
			t.Errorf("the message lacks %q", line)
		}
	}
}
