package doctor

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// tuningVariables are environment variables that change how the GPU copies, or which GPU HIP takes it for.
var tuningVariables = []string{"HSA_ENABLE_SDMA", "HSA_XNACK", "HSA_OVERRIDE_GFX_VERSION"}

// minROCm is the oldest major version of ROCm that gguf2gpu supports.
const minROCm = 5

// unaffected ends the warnings about copies from mapped files, the most frequent trouble with AMD's GPUs.
const unaffected = "gguf2gpu copies from pinned memory only and is not affected; in other programs switch memory mapping off " +
	"(llama.cpp: --no-mmap)"

// knownFaults are faulty combinations of kernel, driver and GPU that users of llama.cpp, ComfyUI, PyTorch and ROCm
// have reported in public in 2025 and 2026. None could be tried here, so each text says that it is a report, and what
// to do.
var knownFaults = []struct {
	applies func(r Host) bool
	text    string
}{
	{
		func(r Host) bool { return r.Driver && r.kernelIs("7.0") },
		"Linux 7.0: some builds (reported of 7.0.0-28 of Ubuntu and 7.0.12 of Fedora) copy mapped files to a GPU at a few MB/s: " +
			unaffected + ", or take another kernel",
	},
	{
		func(r Host) bool { return r.has("gfx1150", "gfx1151", "gfx1200", "gfx1201") > 0 },
		"gfx1150, gfx1151, gfx1200, gfx1201: copies straight from mapped files are reported to stall for minutes: " + unaffected,
	},
	{
		func(r Host) bool { return r.kernelIs("6.17") && r.has("gfx1150", "gfx1151") > 0 },
		"Linux 6.17 with gfx1150 or gfx1151: every copy to the GPU is reported to end in a memory access fault, where 6.14 works: " +
			"if a load ends that way, take another kernel",
	},
	{
		func(r Host) bool { return r.has("gfx1100") > 1 },
		"several gfx1100: a small copy is reported to be missing in device memory after it was done: load with --verify, at least " +
			"once after each change of kernel or ROCm",
	},
	{
		func(r Host) bool { return r.Environment["HSA_ENABLE_SDMA"] == "0" },
		"HSA_ENABLE_SDMA=0 has the GPU's cores copy instead of its copy engines: unset it unless it is there for a reason",
	},
	{
		func(r Host) bool { return slices.ContainsFunc(r.ROCm, ROCm.tooOld) },
		fmt.Sprintf("a ROCm older than %d.0 is installed: gguf2gpu needs %[1]d.0 or later; if no other is found, install one", minROCm),
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
	warnings = append(warnings, r.warnLimits()...)
	for _, f := range knownFaults {
		if f.applies(r) {
			warnings = append(warnings, f.text)
		}
	}
	return warnings
}
