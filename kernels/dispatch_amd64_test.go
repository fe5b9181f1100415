//go:build !purego

package kernels

import (
	"bufio"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/cpuid/v2"
)

// asmFunc is what the generator says of one function in a .s file.
type asmFunc struct {
	name     string
	requires []string
	// upper says that the code uses a register that only AVX-512 can encode.
	upper bool
}

// asmFuncs reads the committed assembly.
func asmFuncs(t *testing.T) []asmFunc {
	t.Helper()
	files, err := filepath.Glob("*_amd64.s")
	if err != nil {
		t.Fatal(err)
	}
	text := regexp.MustCompile(`^TEXT ·(\w+)\(SB\)`)
	upper := regexp.MustCompile(`\b(Z\d+|K\d|[XY](1[6-9]|2\d|3[01]))\b`)
	var funcs []asmFunc
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		var requires []string
		for lines := bufio.NewScanner(f); lines.Scan(); {
			line := lines.Text()
			if list, ok := strings.CutPrefix(line, "// Requires: "); ok {
				requires = strings.Split(list, ", ")
			} else if m := text.FindStringSubmatch(line); m != nil {
				funcs = append(funcs, asmFunc{name: m[1], requires: requires})
				requires = nil
			} else if code, _, _ := strings.Cut(line, "//"); strings.HasPrefix(line, "\t") && upper.MatchString(code) {
				funcs[len(funcs)-1].upper = true
			}
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return funcs
}

// TestGates compares the CPU features that a tier asks for with those that its code needs, as the generator wrote them
// down. A tier must ask for all of them, and for no others.
func TestGates(t *testing.T) {
	t.Parallel()
	// Every amd64 CPU has SSE2. SFENCE, which the generator lists as MMX+, belongs to it.
	baseline := []string{"MMX+", "SSE", "SSE2"}
	tierOf := func(name string) ISA {
		if strings.HasPrefix(name, "avx512") {
			return AVX512
		}
		return AVX2
	}
	used := map[ISA]map[string]bool{AVX2: {}, AVX512: {}}
	// repCopy is written by hand, and every amd64 CPU has its instruction.
	funcs := slices.DeleteFunc(asmFuncs(t), func(f asmFunc) bool { return f.name == "repCopy" })
	for _, f := range funcs {
		tier := tierOf(f.name)
		if !strings.HasPrefix(f.name, tier.String()) {
			t.Errorf("%s: the name does not start with a tier", f.name)
		}
		if tier == AVX2 && f.upper {
			t.Errorf("%s: uses registers that need AVX-512", f.name)
		}
		for _, feature := range f.requires {
			if !slices.Contains(baseline, feature) {
				used[tier][feature] = true
			}
		}
	}
	gate := func(tier ISA) map[string]bool {
		names := map[string]bool{}
		for ; tier > Generic; tier-- {
			for _, f := range features[tier] {
				names[f.String()] = true
			}
		}
		return names
	}
	for tier, usedNames := range used {
		for name := range usedNames {
			if !gate(tier)[name] {
				t.Errorf("%v: the code needs %s, which the gate does not ask for", tier, name)
			}
		}
		for _, f := range features[tier] {
			if !usedNames[f.String()] {
				t.Errorf("%v: the gate asks for %v, which no code needs", tier, f)
			}
		}
	}
	// Every function is in a table.
	inTables := 0
	for _, tier := range assemblyKernels {
		for _, out := range tier {
			for _, k := range out {
				if k.cached != nil && k.stream != nil {
					inTables += 2
				}
			}
		}
	}
	for _, f := range fillKernels {
		if f != nil {
			inTables++
		}
	}
	for _, f := range fingerprintKernels {
		if f.sum != nil && f.copySum != nil {
			inTables += 2
		}
	}
	if inTables != len(funcs) {
		t.Errorf("got %d functions in the tables, want the %d that the assembly files have", inTables, len(funcs))
	}
}

// TestMissing asks which features other CPUs lack for each tier.
func TestMissing(t *testing.T) {
	t.Parallel()
	haswell := features[AVX2]
	noF16C := slices.DeleteFunc(slices.Clone(haswell), func(f cpuid.FeatureID) bool { return f == cpuid.F16C })
	cascadeLake := append(slices.Clone(haswell),
		cpuid.AVX512F, cpuid.AVX512BW, cpuid.AVX512DQ, cpuid.AVX512VL, cpuid.AVX512CD)
	iceLake := append(slices.Clone(cascadeLake), cpuid.AVX512VBMI)
	for _, c := range []struct {
		name     string
		features []cpuid.FeatureID
		want     map[ISA]string // part of what is reported missing; "" for nothing
	}{
		{"x86-64 of 2003", nil, map[ISA]string{Generic: "", AVX2: "AVX2", AVX512: "AVX512F"}},
		{"Haswell", haswell, map[ISA]string{AVX2: "", AVX512: "AVX512F"}},
		{"Haswell without F16C", noF16C, map[ISA]string{AVX2: "F16C", AVX512: "F16C"}},
		{"Cascade Lake, which lacks VBMI", cascadeLake, map[ISA]string{AVX2: "", AVX512: ""}},
		{"Ice Lake", iceLake, map[ISA]string{AVX2: "", AVX512: ""}},
		{"Ice Lake with AVX-512 switched off", haswell, map[ISA]string{AVX2: "", AVX512: "AVX512F"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for isa, want := range c.want {
				got := missingIn(isa, func(f cpuid.FeatureID) bool { return slices.Contains(c.features, f) })
				if (want == "") != (got == "") || !strings.Contains(got, want) {
					t.Errorf("%v: got %q, want %q", isa, got, want)
				}
			}
		})
	}
}
