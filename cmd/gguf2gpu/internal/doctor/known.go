package doctor

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// minROCm is the oldest major version of ROCm that gguf2gpu supports.
const minROCm = 5

// unaffected ends the warnings about copies from mapped files, the most frequent trouble with AMD's GPUs.
const unaffected = "gguf2gpu copies from pinned memory only and is not affected; in other programs switch memory mapping off " +
	"(llama.cpp: --no-mmap)"

// knownFaults are faulty combinations of kernel, driver and GPU that users of llama.cpp, ComfyUI, PyTorch and ROCm
// have reported in public in 2025 and 2026. None could be tried here, so each text says that it is a report, and what
// to do. The sources are issues of repositories on GitHub.
var knownFaults = []struct {
	applies func(r Host) bool
	text    string
}{
	{
		// ROCm/legacy-rocm-build 6523: amdgpu has c08972f55594 there without 342981fff328, which mends it; 6606.
		func(r Host) bool { return r.Driver && r.kernelIs("7.0") },
		"Linux 7.0: some builds (reported of 7.0.0-28 of Ubuntu and 7.0.12 of Fedora) copy mapped files to a GPU at a few MB/s: " +
			unaffected + ", or take another kernel",
	},
	{
		// ROCm/legacy-rocm-build 6582, 6606; ROCm/TheRock 7832; ggml-org/llama.cpp 15018.
		func(r Host) bool { return r.has("gfx1150", "gfx1151", "gfx1200", "gfx1201") > 0 },
		"gfx1150, gfx1151, gfx1200, gfx1201: copies straight from mapped files are reported to stall for minutes: " + unaffected,
	},
	{
		// ROCm/amdgpu 213, ROCm/legacy-rocm-build 6146.
		func(r Host) bool { return r.kernelIs("6.17") && r.has("gfx1150", "gfx1151") > 0 },
		"Linux 6.17 with gfx1150 or gfx1151: every copy to the GPU is reported to end in a memory access fault, where 6.14 works: " +
			"if a load ends that way, take another kernel",
	},
	{
		// ROCm/legacy-rocm-build 6565.
		func(r Host) bool { return r.has("gfx1100") > 1 },
		"several gfx1100: a small copy is reported to be missing in device memory after it was done: load with --verify, at least " +
			"once after each change of kernel or ROCm",
	},
	{
		func(r Host) bool { return slices.ContainsFunc(r.ROCm, ROCm.tooOld) },
		fmt.Sprintf("a ROCm older than %d.0 is installed: gguf2gpu needs %[1]d.0 or later; if no other is found, install one", minROCm),
	},
}

// libraryFaults are faults of versions of HIP, as knownFaults are of machines.
var libraryFaults = []struct {
	series string // of HIP's version, "7.15"
	text   string
}{
	{
		// ROCm/rocm-systems 11185, where 7.14 is named as good; mended by its pull request 11380.
		"7.15",
		"HIP 7.15: giving the CPU access to GPU memory that another process exported is reported to fail (hipMemSetAccess: 1). " +
			"gguf2gpu never asks for it; PyTorch does with expandable_segments:True, so switch that off where models are attached",
	},
}

// kernelIs reports whether the kernel belongs to a series such as 7.0.
func (r Host) kernelIs(series string) bool {
	rest, ok := strings.CutPrefix(r.Kernel, series)
	return ok && (rest == "" || rest[0] == '.' || rest[0] == '-')
}

// has returns how many GPUs have one of these architectures.
func (r Host) has(targets ...string) int {
	n := 0
	for _, t := range r.Targets {
		if slices.Contains(targets, t) {
			n++
		}
	}
	return n
}

// ROCm is an installed version of ROCm.
type ROCm struct {
	Path    string `json:"path"`
	Version string `json:"version"`
}

func (v ROCm) tooOld() bool {
	major, _, _ := strings.Cut(v.Version, ".")
	n, err := strconv.Atoi(major)
	return err == nil && n < minROCm
}

// warn returns what may make loads slow or wrong although a GPU is usable, each with its remedy.
func (r Host) warn() []string {
	warnings := []string{}
	for _, l := range r.Links {
		warnings = append(warnings, l.warn()...)
	}
	warnings = append(append(warnings, r.warnLimits()...), r.warnVariables()...)
	for _, f := range knownFaults {
		if f.applies(r) {
			warnings = append(warnings, f.text)
		}
	}
	return warnings
}
