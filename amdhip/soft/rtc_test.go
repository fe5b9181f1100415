package soft

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

func TestCompile(t *testing.T) {
	const b = "\nextern \"C\"\n\t__global__ __launch_bounds__( 64 ) __attribute__ (x) void b (u64 *p) {}\n"
	for _, tt := range []struct {
		name, source string
		options      []string
		arch         string
		kernels      []string
		code         hip.RTCStatus
		log          string
	}{
		{name: "one kernel", source: addOneSource, arch: archName, kernels: []string{"add_one"}},
		{name: "two kernels", source: addOneSource + b, arch: archName, kernels: []string{"add_one", "b"}},
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
			arch: archName, kernels: []string{"b"},
		},
		{
			name: "no stand-in", source: addOneSource + `extern "C" __global__ void c() extern "C" __global__ void d()`,
			code: hip.ErrRTCCompilation,
			log: "test.hip: error: no Go function stands in for kernel c on the software device\n" +
				"test.hip: error: no Go function stands in for kernel d on the software device",
		},
		{
			name: "no kernel", source: "__global__ void add_one() {}", code: hip.ErrRTCCompilation,
			log: `test.hip: error: no kernel is declared extern "C" __global__ void`,
		},
		{name: "bad option", source: addOneSource, options: []string{"gfx90a"}, code: hip.ErrRTCInvalidOption},
		{name: "no source", code: hip.ErrRTCInvalidInput},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rt, _ := openSoft(t, Options{})
			offerAddOne(rt)
			Of(rt).Offer("b", 1, func(*amdhip.KernelCall) hip.Status { return hip.Success })
			code, err := rt.Compile("test.hip", tt.source, tt.options...)
			if tt.code != hip.RTCSuccess {
				e, ok := errors.AsType[*amdhip.CompileError](err)
				if !ok || code != nil || !errors.Is(err, tt.code) || e.Code != tt.code || e.Name != "test.hip" || e.Log != tt.log {
					t.Fatalf("got %v, want %v with the log\n%s", err, tt.code, tt.log)
				}
			} else if arch, kernels, ok := parseCodeObject(string(code)); err != nil || !ok || arch != tt.arch ||
				!slices.Equal(kernels, tt.kernels) {
				t.Errorf("got %q, %v, want code for %s with %q", code, err, tt.arch, tt.kernels)
			}
			if got := len(Of(rt).programs); got != 0 {
				t.Errorf("%d programs are left", got)
			}
		})
	}
}

// Every call of hipRTC fails in turn. The error names it and its code, and no program is left behind.
func TestCompileFaults(t *testing.T) {
	rt, _ := openSoft(t, Options{})
	offerAddOne(rt)
	sw := Of(rt)
	for _, call := range []string{
		"hiprtcCreateProgram", "hiprtcCompileProgram", "hiprtcGetCodeSize", "hiprtcGetCode", "hiprtcDestroyProgram",
	} {
		t.Run(call, func(t *testing.T) {
			sw.Inject(Fault{Func: call, N: 1, Code: hip.Status(hip.ErrRTCOutOfMemory)})
			code, err := rt.Compile("test.hip", addOneSource)
			e, ok := errors.AsType[*amdhip.CompileError](err)
			if !ok || code != nil || e.Func != call || e.Code != hip.ErrRTCOutOfMemory || e.Name != "test.hip" {
				t.Errorf("got %q, %v, want %s: %v", code, err, call, hip.ErrRTCOutOfMemory)
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
			sw.Inject(Fault{Func: call, N: 1, Code: hip.Status(hip.ErrRTCInternal)})
			if _, err := rt.Compile("test.hip", addOneSource); err != nil {
				t.Errorf("source that is right: %v", err)
			}
			sw.Inject(Fault{Func: call, N: 1, Code: hip.Status(hip.ErrRTCInternal)})
			_, err := rt.Compile("test.hip", "nothing")
			e, ok := errors.AsType[*amdhip.CompileError](err)
			if !ok || e.Func != "hiprtcCompileProgram" || e.Code != hip.ErrRTCCompilation || !strings.Contains(e.Log, call) {
				t.Errorf("source that is wrong: %v, want %v that tells about %s", err, hip.ErrRTCCompilation, call)
			}
		})
	}
	// An error is not covered by one of destroying.
	sw.Inject(Fault{Func: "hiprtcDestroyProgram", N: 1, Code: hip.Status(hip.ErrRTCInternal)})
	if _, err := rt.Compile("test.hip", "nothing"); !errors.Is(err, hip.ErrRTCCompilation) ||
		errors.Is(err, hip.ErrRTCInternal) {
		t.Errorf("got %v, want %v", err, hip.ErrRTCCompilation)
	}
}

// A zero byte would end the text for C.
func TestCompileZeroBytes(t *testing.T) {
	rt, _ := openSoft(t, Options{})
	offerAddOne(rt)
	for name, args := range map[string][]string{
		"name": {"a\x00b", addOneSource}, "source": {"a", addOneSource + "\x00"}, "option": {"a", addOneSource, "-D\x00"},
	} {
		_, err := rt.Compile(args[0], args[1], args[2:]...)
		if e, ok := errors.AsType[*amdhip.CompileError](err); !ok || e.Code != hip.ErrRTCInvalidInput {
			t.Errorf("%s: %v, want %v", name, err, hip.ErrRTCInvalidInput)
		}
	}
	if got := Of(rt).Calls()["hiprtcCreateProgram"]; got != 0 {
		t.Errorf("hipRTC was called %d times", got)
	}
}
