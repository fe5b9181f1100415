package soft

import (
	"fmt"
	"regexp"
	"strings"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// program is a program of the software device's hipRTC. It is guarded by Software.mu.
type program struct {
	source, name string
	log, code    string
}

// rtcTable returns hipRTC's symbol table of the software device.
func (sw *Software) rtcTable() *hip.RTC {
	return &hip.RTC{
		HiprtcCreateProgram:     sw.createProgram,
		HiprtcCompileProgram:    sw.compileProgram,
		HiprtcGetProgramLogSize: sw.getProgramLogSize,
		HiprtcGetProgramLog:     sw.getProgramLog,
		HiprtcGetCodeSize:       sw.getCodeSize,
		HiprtcGetCode:           sw.getCode,
		HiprtcDestroyProgram:    sw.destroyProgram,
		HiprtcGetErrorString:    sw.getRTCErrorString,
	}
}

func (sw *Software) createProgram(out *uintptr, source, name string, headers int32, _, _ **byte) hip.RTCStatus {
	if st := sw.call("hiprtcCreateProgram"); st != hip.Success {
		return hip.RTCStatus(st)
	}
	if out == nil || source == "" || headers != 0 {
		return hip.ErrRTCInvalidInput
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	*out = sw.newHandle()
	sw.programs[*out] = &program{source: source, name: name}
	return hip.RTCSuccess
}

func (sw *Software) compileProgram(program uintptr, n int32, options **byte) hip.RTCStatus {
	if st := sw.call("hiprtcCompileProgram"); st != hip.Success {
		return hip.RTCStatus(st)
	}
	if n < 0 || n > 0 && options == nil {
		return hip.ErrRTCInvalidInput
	}
	arch := archName
	for _, option := range unsafe.Slice(options, n) {
		text := goString(option)
		if !strings.HasPrefix(text, "-") {
			return hip.ErrRTCInvalidOption
		}
		for _, key := range []string{"--gpu-architecture=", "--offload-arch="} {
			if value, ok := strings.CutPrefix(text, key); ok {
				arch = value
			}
		}
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	p := sw.programs[program]
	if p == nil {
		return hip.ErrRTCInvalidProgram
	}
	return sw.build(p, arch)
}

var (
	comment       = regexp.MustCompile(`//[^\n]*|/\*(?s:.*?)\*/`)
	externCKernel = regexp.MustCompile(`extern\s+"C"\s+__global__\s+(?:\w+\s*\([^()]*\)\s+)*void\s+(\w+)\s*\(`)
)

// build looks for the kernels of the source. It does not see kernels that a macro declares, or that stand in extern "C"
// { }. sw.mu is held.
func (sw *Software) build(p *program, arch string) hip.RTCStatus {
	var kernels []string
	p.log, p.code = "", ""
	for _, match := range externCKernel.FindAllStringSubmatch(comment.ReplaceAllString(p.source, " "), -1) {
		kernels = append(kernels, match[1])
		if _, offered := sw.kernels[match[1]]; !offered {
			p.log += fmt.Sprintf("%s: error: no Go function stands in for kernel %s on the software device\n", p.name, match[1])
		}
	}
	if len(kernels) == 0 {
		p.log = fmt.Sprintf("%s: error: no kernel is declared extern \"C\" __global__ void\n", p.name)
	}
	if p.log != "" {
		return hip.ErrRTCCompilation
	}
	p.code = codeObject(arch, kernels)
	return hip.RTCSuccess
}

func (p *program) logBytes() string  { return p.log + "\x00" }
func (p *program) codeBytes() string { return p.code }

func (sw *Software) getProgramLogSize(handle uintptr, n *uintptr) hip.RTCStatus {
	text, st := sw.programBytes("hiprtcGetProgramLogSize", handle, (*program).logBytes)
	return putSize(st, n, text)
}

func (sw *Software) getProgramLog(handle uintptr, log *byte) hip.RTCStatus {
	text, st := sw.programBytes("hiprtcGetProgramLog", handle, (*program).logBytes)
	return putBytes(st, log, text)
}

func (sw *Software) getCodeSize(handle uintptr, n *uintptr) hip.RTCStatus {
	text, st := sw.programBytes("hiprtcGetCodeSize", handle, (*program).codeBytes)
	return putSize(st, n, text)
}

func (sw *Software) getCode(handle uintptr, code *byte) hip.RTCStatus {
	text, st := sw.programBytes("hiprtcGetCode", handle, (*program).codeBytes)
	return putBytes(st, code, text)
}

// programBytes begins a call that answers bytes of a program.
func (sw *Software) programBytes(call string, program uintptr, of func(*program) string) (string, hip.RTCStatus) {
	if st := sw.call(call); st != hip.Success {
		return "", hip.RTCStatus(st)
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	p := sw.programs[program]
	if p == nil {
		return "", hip.ErrRTCInvalidProgram
	}
	return of(p), hip.RTCSuccess
}

func putSize(st hip.RTCStatus, n *uintptr, text string) hip.RTCStatus {
	if st == hip.RTCSuccess && n == nil {
		return hip.ErrRTCInvalidInput
	}
	if st == hip.RTCSuccess {
		*n = uintptr(len(text))
	}
	return st
}

func putBytes(st hip.RTCStatus, dst *byte, text string) hip.RTCStatus {
	if st == hip.RTCSuccess && dst == nil {
		return hip.ErrRTCInvalidInput
	}
	if st == hip.RTCSuccess {
		copy(unsafe.Slice(dst, len(text)), text)
	}
	return st
}

func (sw *Software) destroyProgram(program *uintptr) hip.RTCStatus {
	if st := sw.call("hiprtcDestroyProgram"); st != hip.Success {
		return hip.RTCStatus(st)
	}
	if program == nil {
		return hip.ErrRTCInvalidInput
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if sw.programs[*program] == nil {
		return hip.ErrRTCInvalidProgram
	}
	delete(sw.programs, *program)
	*program = 0
	return hip.RTCSuccess
}

// getRTCErrorString has no text for an unknown number, as some versions of hipRTC have none.
func (sw *Software) getRTCErrorString(code hip.RTCStatus) string {
	_ = sw.call("hiprtcGetErrorString")
	return hip.RTCNames[code]
}
