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
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// hipRTC is a C library: logs may or may not count the zero byte behind them, code may be empty, codes may be unknown.
func TestCompileOddLibrary(t *testing.T) {
	ok := func(uintptr, *byte) RTCStatus { return RTCSuccess }
	size := func(n uintptr) func(uintptr, *uintptr) RTCStatus {
		return func(_ uintptr, p *uintptr) RTCStatus { *p = n; return RTCSuccess }
	}
	text := func(s string) func(uintptr, *byte) RTCStatus {
		return func(_ uintptr, p *byte) RTCStatus { copy(unsafe.Slice(p, len(s)), s); return RTCSuccess }
	}
	result := RTCSuccess
	lib := &hip.Compiler{RTC: &hip.RTC{
		HiprtcCreateProgram:     func(*uintptr, string, string, int32, **byte, **byte) RTCStatus { return RTCSuccess },
		HiprtcCompileProgram:    func(uintptr, int32, **byte) RTCStatus { return result },
		HiprtcGetProgramLogSize: size(4),
		HiprtcGetProgramLog:     text("\nlog\x00"), // one more than it said
		HiprtcGetCodeSize:       size(0),
		HiprtcGetCode:           ok,
		HiprtcDestroyProgram:    func(*uintptr) RTCStatus { return RTCSuccess },
		HiprtcGetErrorString:    func(code RTCStatus) string { return strings.Repeat("w", int(code)%100) },
	}}
	var log lockedBuffer
	d := nullRuntime(t, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	d.rt.backend.Compiler = func() (*hip.Compiler, error) { return lib, nil }
	for _, tt := range []struct {
		name string
		code RTCStatus
		want string
	}{
		{
			"empty code", RTCSuccess,
			"hiprtcGetCodeSize, program \"x\": HIPRTC_ERROR_INTERNAL_ERROR (11)\n\tthe code has 0 bytes\n\tlog",
		},
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
	lib.RTC.HiprtcGetCodeSize, lib.RTC.HiprtcGetCode, result = size(3), text("\x7fEL"), RTCSuccess
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
		{
			&CompileError{Func: "f", Code: 6, Name: "n", Log: log(20)},
			`f, program "n": HIPRTC_ERROR_COMPILATION (6)` + numbered(1, 20),
		},
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
	d.rt.api.HipModuleLoadData = nil
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
func searchCompiler(
	root string, major int, hip, real, env string, good func(string) bool,
) (tried []string, found string, err error) {
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
		{
			name: "HIP 6 in the library", major: 6, hip: "libamdhip64.so.6", good: "libamdhip64.so.6",
			found: "libamdhip64.so.6",
		},
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
			name: "HIP 7 beside the real file", major: 7, hip: in("link/libamdhip64.so.7"),
			real: in("real/libamdhip64.so.7.0.1"),
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
	if !ok || !errors.Is(err, ErrUnsupported) || !errors.Is(err, errNotLibrary) ||
		errors.Is(err, fs.ErrNotExist) != notExisting ||
		errors.Is(err, ErrNoLibrary) {
		t.Fatalf("got %v, want a CompilerError that matches ErrUnsupported and its causes", err)
	}
	for _, a := range e.Attempts {
		if line := "\n\t" + a.Path + " (" + a.Source + "): " + a.Err.Error(); !strings.Contains(err.Error(), line) {
			t.Errorf("the message lacks %q", line)
		}
	}
}
