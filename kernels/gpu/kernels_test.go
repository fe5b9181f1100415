package gpu

import (
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// TestKeysAreAllConversions checks that there is a kernel from every quantized type and from F32, F16 and BF16 to each
// output type but itself.
func TestKeysAreAllConversions(t *testing.T) {
	t.Parallel()
	keys := map[Key]bool{}
	for _, k := range Keys() {
		if keys[k] {
			t.Errorf("%v is there twice", k)
		}
		keys[k] = true
	}
	for _, from := range gguf.Types() {
		isFloat := from == gguf.F32 || from == gguf.F16 || from == gguf.BF16
		for _, to := range gguf.Types() {
			want := (isFloat || from.BlockElems() > 1) && to != from && (to == gguf.F32 || to == gguf.F16 || to == gguf.BF16)
			if Supported(to, from) != want || keys[Key{To: to, From: from}] != want {
				t.Errorf("%v to %v: supported %v, among the keys %v, want %v",
					from, to, Supported(to, from), keys[Key{To: to, From: from}], want)
			}
		}
	}
}

// TestSourceIsOneKernel checks that each program has one kernel with its own name, only the files that it needs, and no
// headers.
func TestSourceIsOneKernel(t *testing.T) {
	t.Parallel()
	names := map[string]bool{}
	for _, k := range Keys() {
		text, name := k.Source(), k.Name()
		if names[name] {
			t.Errorf("two kernels are named %s", name)
		}
		names[name] = true
		if strings.Count(text, `extern "C"`) != 1 || !strings.Contains(text, "void "+name+"("+lower(k.To)+" *out,") {
			t.Errorf("the program of %v does not have its kernel %s, and no other", k, name)
		}
		if !strings.HasPrefix(text, "#line 1 \"common.hip\"\n") || strings.Count(text, "#line ") != 2 {
			t.Errorf("the program of %v is not made of common.hip and one more file", k)
		}
		if strings.Contains(text, "#include") {
			t.Errorf("the program of %v needs a header", k)
		}
		if got, want := strings.Contains(text, "grid_iq2_xs["), strings.HasPrefix(k.From.String(), "IQ") &&
			k.From != gguf.IQ4_NL && k.From != gguf.IQ4_XS; got != want {
			t.Errorf("the program of %v has grids: %v, want %v", k, got, want)
		}
	}
	if k := (Key{To: gguf.F16, From: gguf.Q4_K}); k.Name() != "dequantize_q4_k_f16" || k.String() != "Q4_K to F16" {
		t.Errorf("%v is named %s", k, k.Name())
	}
}

func TestSourcePanicsWithoutKernel(t *testing.T) {
	t.Parallel()
	defer func() {
		if r, ok := recover().(string); !ok || !strings.Contains(r, "no kernel I32 to F16") {
			t.Errorf("panic %q", r)
		}
	}()
	_ = Key{To: gguf.F16, From: gguf.I32}.Source()
}
