package amdhip

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestNeeds64Bits compiles the package for platforms of 32 bits: it must say why it cannot be compiled, and only that.
func TestNeeds64Bits(t *testing.T) {
	t.Parallel()
	for _, arch := range []string{"386", "arm"} {
		cmd := exec.Command("go", "build", ".")
		cmd.Env = append(os.Environ(), "GOOS=linux", "CGO_ENABLED=0", "GOARCH="+arch)
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), "undefined: gguf2gpu_needs_a_64_bit_platform") ||
			strings.Count(string(out), "\n") > 2 {
			t.Errorf("%s: %v\n%s", arch, err, out)
		}
	}
}
