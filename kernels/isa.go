package kernels

import (
	"fmt"
	"os"
	"strings"

	"github.com/klauspost/cpuid/v2"
)

// ISA is a tier of implementation: a set of CPU instructions that the kernels may use. A higher tier includes the lower.
type ISA uint8

const (
	// Auto asks For to choose: the tier that the environment variable GGUF2GPU_ISA names, else the best one of this CPU.
	Auto ISA = iota
	// Generic is portable Go.
	Generic
	// AVX2 is 256-bit vectors with FMA and F16C (x86-64-v3: Intel Haswell, AMD Zen).
	AVX2
	// AVX512 is 512-bit vectors with the F, BW and VL extensions (Intel Skylake-SP, AMD Zen 4).
	AVX512
	numISAs
)

// envISA is the environment variable that overrides Auto.
const envISA = "GGUF2GPU_ISA"

var isaNames = [numISAs]string{Auto: "auto", Generic: "generic", AVX2: "avx2", AVX512: "avx512"}

// String returns the name that ParseISA takes.
func (i ISA) String() string {
	if i >= numISAs {
		return fmt.Sprintf("ISA(%d)", uint8(i))
	}
	return isaNames[i]
}

// ParseISA returns the tier of that name: "auto", "generic", "avx2" or "avx512", in upper or lower case.
func ParseISA(name string) (ISA, error) {
	for i, s := range isaNames {
		if strings.EqualFold(s, name) {
			return ISA(i), nil
		}
	}
	return 0, fmt.Errorf("kernels: unknown tier %q: use auto, generic, avx2 or avx512", name)
}

// Supported returns the tiers that this CPU and operating system can run, lowest first. It always contains Generic.
func Supported() []ISA {
	tiers := []ISA{Generic}
	for isa := AVX2; isa < numISAs && missing(isa) == ""; isa++ {
		tiers = append(tiers, isa)
	}
	return tiers
}

// For returns the kernels of a tier. For a pair of types without a kernel in that tier they use the next lower one. Auto
// follows the environment variable GGUF2GPU_ISA if it is set, and otherwise chooses the best tier of this CPU. A tier that
// the CPU lacks is an error that matches ErrUnsupported and names the missing feature.
func For(isa ISA) (*Kernels, error) {
	if isa == Auto {
		name := os.Getenv(envISA)
		forced, err := ParseISA(name)
		switch {
		case name == "" || err == nil && forced == Auto:
			tiers := Supported()
			return newKernels(tiers[len(tiers)-1]), nil
		case err != nil:
			return nil, fmt.Errorf("%w (from the environment variable %s)", err, envISA)
		}
		isa = forced
	}
	if isa >= numISAs {
		return nil, fmt.Errorf("kernels: %v: %w", isa, ErrUnsupported)
	}
	for tier := AVX2; tier <= isa; tier++ {
		if lacks := missing(tier); lacks != "" {
			return nil, fmt.Errorf("kernels: tier %v: %w: %s", isa, ErrUnsupported, lacks)
		}
	}
	return newKernels(isa), nil
}

// newKernels collects, for every pair, the kernel of the highest tier up to isa.
func newKernels(isa ISA) *Kernels {
	k := &Kernels{isa: isa, fast: new(kernelTable)}
	for tier := AVX2; tier <= isa; tier++ {
		for out := range numOutputs {
			for from, f := range assembly(tier)[out] {
				if f.cached != nil {
					f.isa = tier
					k.fast[out][from] = f
				}
			}
		}
	}
	return k
}

// CacheBytes is the size of this CPU's last-level cache in bytes, 0 when the CPU does not say. A destination that is larger,
// or that comes round only after more than that was written elsewhere, is one for [Kernels.DequantizeNT].
func CacheBytes() int { return max(0, cpuid.CPU.Cache.L3) }
