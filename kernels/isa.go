package kernels

import (
	"fmt"
	"os"
	"strings"

	"github.com/klauspost/cpuid/v2"
)

// ISA is a tier of implementation, named after the CPU instructions that its kernels may use. A higher tier includes
// the lower ones.
type ISA uint8

const (
	// Auto lets For choose: the tier that the environment variable GGUF2GPU_ISA names, else the best one of this CPU.
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

// String returns the tier's name: "auto", "generic", "avx2" or "avx512".
func (i ISA) String() string {
	if i >= numISAs {
		return fmt.Sprintf("ISA(%d)", uint8(i))
	}
	return isaNames[i]
}

// MarshalText returns the tier's name. The error is for numbers that are no tier; it matches ErrUnsupported.
func (i ISA) MarshalText() ([]byte, error) {
	if i >= numISAs {
		return nil, fmt.Errorf("kernels: %v: %w", i, ErrUnsupported)
	}
	return []byte(i.String()), nil
}

// UnmarshalText sets i to the tier of that name, as String returns it, in upper or lower case. The error for another
// name lists the names that there are.
func (i *ISA) UnmarshalText(name []byte) error {
	for isa, s := range isaNames {
		if strings.EqualFold(s, string(name)) {
			*i = ISA(isa)
			return nil
		}
	}
	return fmt.Errorf("kernels: unknown tier %q: use %s", name, strings.Join(isaNames[:], ", "))
}

// Supported returns the tiers that this CPU and operating system can run, lowest first. It always contains Generic.
func Supported() []ISA {
	tiers := []ISA{Generic}
	for isa := AVX2; isa < numISAs && missing(isa) == ""; isa++ {
		tiers = append(tiers, isa)
	}
	return tiers
}

// For returns the kernels of a tier. Where a tier has no kernel for a pair of types, the next lower tier serves the
// pair. Auto follows the environment variable GGUF2GPU_ISA if it is set, and chooses the best tier of this CPU
// otherwise. For a tier that the CPU lacks, the error matches ErrUnsupported and names the missing feature.
func For(isa ISA) (*Kernels, error) {
	if isa == Auto {
		if name := os.Getenv(envISA); name != "" {
			if err := isa.UnmarshalText([]byte(name)); err != nil {
				return nil, fmt.Errorf("%w (from the environment variable %s)", err, envISA)
			}
		}
	}
	if isa == Auto {
		tiers := Supported()
		return newKernels(tiers[len(tiers)-1]), nil
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

// newKernels takes, for every pair of types, the kernel of the highest tier up to isa that has one.
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

// CacheBytes returns the size of this CPU's last-level cache in bytes, 0 if the CPU does not say.
// [Kernels.DequantizeNT] is for destinations that are larger, and for buffers that are reused only after more bytes
// than that were written to others.
func CacheBytes() int { return max(0, cpuid.CPU.Cache.L3) }
