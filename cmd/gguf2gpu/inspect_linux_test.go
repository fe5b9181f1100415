package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// TestInspectMemory inspects files with large headers, each in a process of its own: it needs at most 64 MiB beside the
// mapping of the file and of its own program.
func TestInspectMemory(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector takes memory of its own")
	}
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	peak := func(args ...string) int64 {
		t.Helper()
		var stderr bytes.Buffer
		cmd := exec.Command(self, append([]string{reportPeak}, args...)...)
		cmd.Stderr = &stderr
		if err := cmd.Run(); err != nil {
			t.Fatalf("%q: %v\n%s", args, err, &stderr)
		}
		n, err := strconv.ParseInt(strings.TrimSpace(stderr.String()), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	idle := peak("inspect", samplePath)
	empty := make([]byte, 12) // an array without elements
	for name, m := range map[string]modelFile{
		"text":    {keys: map[string]any{"k": strings.Repeat("\x1bx\xff\"", 100<<20/4)}},
		"arrays":  {keys: map[string]any{"k": array(gguf.KindArray, 1<<20, bytes.Repeat(empty, 1<<20))}},
		"texts":   {keys: map[string]any{"k": array(gguf.KindString, 1<<20, make([]byte, 8<<20))}},
		"tensors": {tensors: manyTensors(300_000)},
	} {
		t.Run(name, func(t *testing.T) {
			path := m.write(t, "m.gguf")
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			for _, flags := range []string{"--json=false", "--json", "--full", "--full --json"} {
				got := peak(append([]string{"inspect", path}, strings.Fields(flags)...)...) - info.Size() - idle
				if got > 64<<20 {
					t.Errorf("%s: %d MiB beside the mapping", flags, got>>20)
				}
			}
		})
	}
}

func manyTensors(n int) []modelTensor {
	all := make([]modelTensor, n)
	for i := range all {
		all[i] = modelTensor{fmt.Sprintf("%06d", i), gguf.I8, []uint64{0}}
	}
	return all
}
