//go:build !purego

package kernels

import (
	"strings"

	"github.com/klauspost/cpuid/v2"
)

// features are the CPU features that a tier's code may use besides those of the tiers below it. A test compares them
// with what the generator says of each kernel. The package cpuid reports a feature only if the operating system also
// saves the registers that it needs, so a CPU whose AVX-512 is switched off gets AVX2.
var features = [numISAs][]cpuid.FeatureID{
	AVX2:   {cpuid.AVX, cpuid.AVX2, cpuid.FMA3, cpuid.F16C},
	AVX512: {cpuid.AVX512F, cpuid.AVX512BW, cpuid.AVX512VL},
}

// missing says which CPU features a tier needs that are absent, "" if none.
func missing(isa ISA) string { return missingIn(isa, cpuid.CPU.Has) }

// missingIn is missing for the CPU that has describes.
func missingIn(isa ISA, has func(cpuid.FeatureID) bool) string {
	var lacks []string
	for tier := AVX2; tier <= isa; tier++ {
		for _, f := range features[tier] {
			if !has(f) {
				lacks = append(lacks, f.String())
			}
		}
	}
	if lacks == nil {
		return ""
	}
	return "this CPU or operating system lacks " + strings.Join(lacks, ", ")
}

// assembly returns the kernels that a tier adds.
func assembly(isa ISA) *kernelTable {
	makeFloatTables()
	return &assemblyKernels[isa]
}

// fillKernel returns the kernel that FillNT uses.
func fillKernel(isa ISA) kernelFunc { return fillKernels[isa] }
