package doctor

import (
	"strconv"
	"strings"
)

// legacyIPC is the variable that brings back how HIP shared memory between processes before version 7.
const legacyIPC = "HSA_ENABLE_IPC_MODE_LEGACY"

// mayTrace reports whether the process may look into others of its user: it has CAP_SYS_PTRACE, or the security module
// Yama does not forbid it (see ptrace(2)).
func (p probe) mayTrace() bool {
	const capSysPtrace = 19 // linux/capability.h
	for line := range strings.Lines(p.read("/proc/self/status")) {
		if text, found := strings.CutPrefix(line, "CapEff:"); found {
			if bits, err := strconv.ParseUint(strings.TrimSpace(text), 16, 64); err == nil && bits>>capSysPtrace&1 == 1 {
				return true
			}
		}
	}
	scope := p.read("/proc/sys/kernel/yama/ptrace_scope")
	return scope == "" || scope == "0"
}

// warnIPC says what HIP 7 needs for hold and attach where that may be missing. Attaching from another network namespace
// failed with error 17 after 11 s on AMD's 7.2.4 above an emulated GPU, and worked with the variable set on both sides.
func (r *Report) warnIPC() []string {
	if len(r.Devices) == 0 || r.Host.Environment[legacyIPC] == "1" || r.Host.Ptrace && !r.Host.Container {
		return nil
	}
	major, _, _ := strings.Cut(r.Library.Runtime, ".")
	if n, err := strconv.Atoi(major); err != nil || n < 7 {
		return nil
	}
	return []string{"HIP 7 hands device memory to other processes by a socket of the network namespace, and who takes it needs " +
		"CAP_SYS_PTRACE: attaching to 'hold --share ipc' fails with error 17 after some ten seconds unless both processes share " +
		"their network, PID and IPC namespaces, or have " + legacyIPC + "=1 set; 'hold --share fd' needs none of that"}
}
