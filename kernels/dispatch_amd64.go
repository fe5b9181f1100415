//go:build !purego

package kernels

import (
	"strings"

	"github.com/klauspost/cpuid/v2"
)

// features are the CPU features that the code of a tier may use besides those of lower tiers. A test compares them with
// what the generator wrote into the assembly files. Package cpuid reports a feature only if the operating system saves
// the registers that it needs, so a CPU with AVX-512 switched off gets AVX2.
var features = [numISAs][]cpuid.FeatureID{
	AVX2:   {cpuid.AVX, cpuid.AVX2, cpuid.FMA3, cpuid.F16C},
	AVX512: {cpuid.AVX512F, cpuid.AVX512BW, cpuid.AVX512VL},
}

// missing names the CPU features that a tier needs and this CPU lacks; "" if there are none.
func missing(isa ISA) string { return missingIn(isa, cpuid.CPU.Has) }

// missingIn is missing for a CPU whose features has knows.
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
