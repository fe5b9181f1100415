package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestLocalRankTakesGPU starts ranks on a host with two simulated GPUs: each must take the GPU of its local rank.
func TestLocalRankTakesGPU(t *testing.T) {
	t.Parallel()
	lib := buildSimulator(t)
	sample := filepath.Join("..", "..", "testdata", "tiny-llama.gguf")
	for _, tt := range []struct {
		env, args string
		want      int
		notice    string
	}{
		{"LOCAL_RANK=0", "--shard layer", 0, ""},
		{"LOCAL_RANK=1", "--shard layer", 1, ""},
		{"LOCAL_RANK=2", "--shard layer", 0, "local rank 2 takes GPU 0"},
		{"LOCAL_RANK=3", "--shard layer --device hip", 1, "local rank 3 takes GPU 1"},
		{"LOCAL_RANK=3", "--shard layer --device hip:0", 0, ""},
		{"LOCAL_RANK=1", "--shard layer --rank 0 --world 2", 1, ""},
		{"LOCAL_RANK=1", "", 0, ""}, // nothing is divided, so ranks do not matter
	} {
		t.Run(tt.env+" "+tt.args, func(t *testing.T) {
			var stderr bytes.Buffer
			cmd := exec.Command("gguf2gpu", append([]string{"load", sample, "--dtype", "raw", "--progress", "none", "--json"},
				strings.Fields(tt.args)...)...)
			cmd.Env = append(cleanEnv(), "GGUF2GPU_HIP_LIBRARY="+lib, "HIPSIM_DEVICES=2", "RANK=3", "WORLD_SIZE=4", tt.env)
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("%v\n%s", err, &stderr)
			}
			var r loadReport
			if err := json.Unmarshal(out, &r); err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprint(r.Device.Kind, r.Device.Index); got != fmt.Sprint("hip", tt.want) {
				t.Errorf("device %s, want hip%d", got, tt.want)
			}
			if got := stderr.String(); !strings.Contains(got, tt.notice) || (got == "") != (tt.notice == "") {
				t.Errorf("stderr %q, want %q", got, tt.notice)
			}
		})
	}
}
