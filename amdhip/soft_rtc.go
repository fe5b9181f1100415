package amdhip

import (
	"fmt"
	"regexp"
	"strings"
	"unsafe"
)

// softProgram is a program of the software device's hipRTC. It is guarded by Software.mu.
type softProgram struct {
	source, name string
	log, code    string
}

// rtcTable returns hipRTC's symbol table of the software device.
func (sw *Software) rtcTable() *rtcAPI {
	return &rtcAPI{
		hiprtcCreateProgram:     sw.createProgram,
		hiprtcCompileProgram:    sw.compileProgram,
		hiprtcGetProgramLogSize: sw.getProgramLogSize,
		hiprtcGetProgramLog:     sw.getProgramLog,
		hiprtcGetCodeSize:       sw.getCodeSize,
		hiprtcGetCode:           sw.getCode,
		hiprtcDestroyProgram:    sw.destroyProgram,
		hiprtcGetErrorString:    sw.getRTCErrorString,
	}
}

func (sw *Software) createProgram(program *uintptr, source, name string, headers int32, _, _ **byte) RTCStatus {
	if st := sw.call("hiprtcCreateProgram"); st != Success {
		return RTCStatus(st)
	}
	if program == nil || source == "" || headers != 0 {
		return ErrRTCInvalidInput
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	*program = sw.newHandle()
	sw.programs[*program] = &softProgram{source: source, name: name}
	return RTCSuccess
}

func (sw *Software) compileProgram(program uintptr, n int32, options **byte) RTCStatus {
	if st := sw.call("hiprtcCompileProgram"); st != Success {
		return RTCStatus(st)
	}
	if n < 0 || n > 0 && options == nil {
		return ErrRTCInvalidInput
	}
	arch := softArch
	for _, option := range unsafe.Slice(options, n) {
		text := goString(option)
		if !strings.HasPrefix(text, "-") {
			return ErrRTCInvalidOption
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
		return ErrRTCInvalidProgram
	}
	return sw.build(p, arch)
}

var (
	comment       = regexp.MustCompile(`//[^\n]*|/\*(?s:.*?)\*/`)
	externCKernel = regexp.MustCompile(`extern\s+"C"\s+__global__\s+(?:\w+\s*\([^()]*\)\s+)*void\s+(\w+)\s*\(`)
)

// build looks for the kernels of the source. Those that a macro declares, and those in extern "C" { }, it does not see.
// sw.mu is held.
func (sw *Software) build(p *softProgram, arch string) RTCStatus {
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
		return ErrRTCCompilation
	}
	p.code = softCode(arch, kernels)
	return RTCSuccess
}

func (p *softProgram) logBytes() string  { return p.log + "\x00" }
func (p *softProgram) codeBytes() string { return p.code }

func (sw *Software) getProgramLogSize(program uintptr, n *uintptr) RTCStatus {
	text, st := sw.programBytes("hiprtcGetProgramLogSize", program, (*softProgram).logBytes)
	return putSize(st, n, text)
}

func (sw *Software) getProgramLog(program uintptr, log *byte) RTCStatus {
	text, st := sw.programBytes("hiprtcGetProgramLog", program, (*softProgram).logBytes)
	return putBytes(st, log, text)
}

func (sw *Software) getCodeSize(program uintptr, n *uintptr) RTCStatus {
	text, st := sw.programBytes("hiprtcGetCodeSize", program, (*softProgram).codeBytes)
	return putSize(st, n, text)
}

func (sw *Software) getCode(program uintptr, code *byte) RTCStatus {
	text, st := sw.programBytes("hiprtcGetCode", program, (*softProgram).codeBytes)
	return putBytes(st, code, text)
}

// programBytes begins a call that answers bytes of a program.
func (sw *Software) programBytes(call string, program uintptr, of func(*softProgram) string) (string, RTCStatus) {
	if st := sw.call(call); st != Success {
		return "", RTCStatus(st)
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	p := sw.programs[program]
	if p == nil {
		return "", ErrRTCInvalidProgram
	}
	return of(p), RTCSuccess
}

func putSize(st RTCStatus, n *uintptr, text string) RTCStatus {
	if st == RTCSuccess && n == nil {
		return ErrRTCInvalidInput
	}
	if st == RTCSuccess {
		*n = uintptr(len(text))
	}
	return st
}

func putBytes(st RTCStatus, dst *byte, text string) RTCStatus {
	if st == RTCSuccess && dst == nil {
		return ErrRTCInvalidInput
	}
	if st == RTCSuccess {
		copy(unsafe.Slice(dst, len(text)), text)
	}
	return st
}

func (sw *Software) destroyProgram(program *uintptr) RTCStatus {
	if st := sw.call("hiprtcDestroyProgram"); st != Success {
		return RTCStatus(st)
	}
	if program == nil {
		return ErrRTCInvalidInput
	}
	sw.mu.Lock()
	defer sw.mu.Unlock()
	if sw.programs[*program] == nil {
		return ErrRTCInvalidProgram
	}
	delete(sw.programs, *program)
	*program = 0
	return RTCSuccess
}

// getRTCErrorString has no text for a number that is no code, as some versions of hipRTC.
func (sw *Software) getRTCErrorString(code RTCStatus) string {
	_ = sw.call("hiprtcGetErrorString")
	return rtcNames[code]
}
