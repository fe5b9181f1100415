package doctor

import (
	"fmt"
	"math"
)

// version is a HIP version without its patch, which counts builds.
type version struct{ major, minor int }

// latest stands for defects that no version is known to be without.
var latest = version{math.MaxInt, 0}

func (v version) before(w version) bool {
	return v.major < w.major || v.major == w.major && v.minor < w.minor
}

// runtimeDefects are what versions of HIP do wrong with virtual memory, which held models are in, or have been seen or
// reported to. Each text says what hold does about it.
var runtimeDefects = []struct {
	from, before version
	text         string
}{
	{
		version{6, 4},
		version{6, 5},
		"HIP 6.4: hipMemMap was seen not to come back (6.4.3): hold tries virtual memory first, for five seconds at most, and shares " +
			"models by IPC handles if it does not work",
	},
	{
		version{7, 2},
		version{7, 3},
		"HIP 7.2: hipMemMap was seen to answer success although nothing was mapped (7.2.4): hold tries virtual memory first, and " +
			"shares models by IPC handles if it does not work",
	},
	{
		version{6, 0},
		version{7, 15},
		"HIP 6.0 to 7.14: memory whose descriptor was closed is reported to be neither mapped nor exported again: hold exports once " +
			"and keeps the descriptor open for as long as it uses the memory; other programs that share memory must do so, too",
	},
	{
		version{7, 15},
		latest,
		"HIP 7.15 and later: the host is reported to get no access to imported virtual memory: gguf2gpu never asks for that, and " +
			"reads held models back by copies",
	},
	{
		version{6, 0},
		latest,
		"HIP 6.0 and later: asking for an IPC handle of virtual memory (hipIpcGetMemHandle) is reported to lose the memory until the " +
			"machine starts again: gguf2gpu never does; a program that passes on memory of a held model must not either",
	},
}

// slowKernel is the series of Linux on which virtual memory is reported to be slow.
const slowKernel = "5.15"

// defects returns those of the HIP library that was found, on this machine.
func (r *Report) defects() []string {
	found := []string{}
	if r.Library == nil || len(r.Devices) == 0 {
		return found
	}
	var v version
	if n, _ := fmt.Sscanf(r.Library.Runtime, "%d.%d", &v.major, &v.minor); n != 2 {
		return found
	}
	for _, d := range runtimeDefects {
		if !v.before(d.from) && v.before(d.before) {
			found = append(found, d.text)
		}
	}
	if r.Host.Driver && r.Host.kernelIs(slowKernel) && len(found) > 0 {
		found = append(found, "Linux "+slowKernel+": mapping virtual memory is reported to be slow: hold with --share ipc, or take a "+
			"later kernel")
	}
	return found
}
