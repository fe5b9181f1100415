package doctor

import "fmt"

// tuning is an environment variable of AMD's runtime that changes what is measured, or how memory is shared.
type tuning struct {
	name string
	// changes reports whether a value makes the runtime do other than without the variable.
	changes func(value string) bool
	effect  string // of such a value; "" where that depends, so that only the report has the variable
}

// Kinds of variables.
var (
	off = func(value string) bool { return value == "0" } // on without it, and with any other value
	on  = func(value string) bool { return value == "1" } // off without it, and with any other value
	all = func(string) bool { return true }
)

// but is the kind of a variable that is a number, and usual without it.
func but(usual string) func(string) bool { return func(value string) bool { return value != usual } }

// tunings are the variables that decide how bytes get to a GPU and how long that takes. What each does is from the
// source of AMD's runtimes 6.4.3: those of HIP (GPU_…, AMD_…, HIP_…, ROC_…) from rocclr/utils/flags.hpp of ROCm/clr and
// where it is read, those of ROCr (HSA_…) from runtime/hsa-runtime/core/util/flag.h of ROCm/ROCR-Runtime; HSA_MODEL_LIB
// is 7.2's.
var tunings = []tuning{
	{"HSA_ENABLE_SDMA", off, "has the GPU's cores copy instead of its copy engines"},
	{"HSA_ENABLE_PEER_SDMA", off, "has the GPU's cores copy between GPUs instead of the copy engines"},
	{"HSA_ENABLE_SDMA_GANG", all, "decides whether several engines share a copy between GPUs"},
	{"HSA_ENABLE_SDMA_RECOMMENDED_ENG", all, "decides whether a copy between GPUs takes the engine that the driver recommends"},
	{"HSA_REV_COPY_DIR", on, "swaps the engines of the two directions"},
	{"HSA_SDMA_WAIT_IDLE", on, "has each copy wait until its engine is idle"},
	{"HSA_ENABLE_INTERRUPT", off, "has threads spin until work is done, on cores that dequantize otherwise"},
	{"GPU_MAX_HW_QUEUES", but("4"), "changes how many queues of the hardware the streams share (4)"},
	{"GPU_FORCE_BLIT_COPY_SIZE", all, "changes up to which size, in KiB, the GPU's cores copy instead of its copy engines"},
	{"AMD_SERIALIZE_COPY", but("0"), "has each copy wait for others, so that nothing overlaps"},
	{"AMD_SERIALIZE_KERNEL", but("0"), "has each kernel wait for others, so that nothing overlaps"},
	{"HIP_LAUNCH_BLOCKING", but("0"), "has each kernel be waited for, so that nothing overlaps"},
	{"AMD_DIRECT_DISPATCH", but("1"), "hands work to the GPU from a thread of its own for each stream, which takes longer"},
	{"AMD_LOG_LEVEL", but("0"), "writes a log of HIP's calls, which takes longer than many of them"},
	{"HIP_HOST_COHERENT", but("0"), "makes page-locked memory coherent, which the GPU may read more slowly"},
	{"ROC_GLOBAL_CU_MASK", all, "leaves kernels only a part of the GPU's cores"},
	{"HSA_CU_MASK", all, "leaves kernels only a part of the GPU's cores"},
	{"HSA_TOOLS_LIB", all, "puts a tool, such as a profiler, between HIP and the GPU"},
	{"HSA_MODEL_LIB", all, "puts a model in software in the place of the GPU: what is measured says nothing of a GPU"},
	{"HSA_XNACK", all, ""},
	{"HSA_OVERRIDE_GFX_VERSION", all, ""},
	{legacyIPC, all, ""},
	{stagingVariable, all, ""}, // gguf2gpu's own, see warnLimits
}

// tuningVariables returns the names of tunings.
func tuningVariables() []string {
	names := make([]string, len(tunings))
	for i, t := range tunings {
		names[i] = t.name
	}
	return names
}

// warnVariables returns which variables change what is measured here.
func (r Host) warnVariables() []string {
	var warnings []string
	for _, t := range tunings {
		if v := r.Environment[t.name]; v != "" && t.effect != "" && t.changes(v) {
			warnings = append(warnings, fmt.Sprintf("%s=%s %s: unset it unless it is there for a reason", t.name, v, t.effect))
		}
	}
	return warnings
}
