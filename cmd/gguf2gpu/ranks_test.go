package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
)

// TestRankFlags finds the rank from --rank and --world, which win, or else from the environment.
func TestRankFlags(t *testing.T) {
	t.Parallel()
	const none = -1
	torchrun := map[string]string{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
	for _, tt := range []struct {
		name               string
		rank, world        int // of the flags
		env                map[string]string
		wantRank, wantSize int
		wantLocal          int
	}{
		{"flags", 2, 4, nil, 2, 4, none},
		{"one rank of one", 0, 1, nil, 0, 1, none},
		{"environment", none, none, torchrun, 5, 8, 1},
		{"flags against the environment", 0, 2, torchrun, 0, 2, 1},
		{"flags in a batch script", 3, 4, map[string]string{"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, 3, 4, 0},
		{"flags where the environment is nonsense", 1, 2, map[string]string{"RANK": "x", "WORLD_SIZE": "-3"}, 1, 2, none},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r, err := rankOf(tt.rank, tt.world, func(name string) string { return tt.env[name] })
			if err != nil || r.Rank != tt.wantRank || r.World != tt.wantSize || r.Local != tt.wantLocal {
				t.Errorf("got %+v, %v; want rank %d of %d, %d on this host", r, err, tt.wantRank, tt.wantSize, tt.wantLocal)
			}
		})
	}
	for _, tt := range []struct {
		name        string
		rank, world int
		env         map[string]string
		want        string // words of the error
	}{
		{"nothing", none, none, nil, "--shard --rank --world torchrun mpirun srun"},
		{"rank alone", 1, none, nil, "--rank --world"},
		{"rank alone, although the environment has the rest", 1, none, torchrun, "--rank --world"},
		{"world alone", none, 2, nil, "--rank --world"},
		{"rank too high", 4, 4, nil, "--rank --world 4 3"},
		{"a world of none", 0, 0, nil, "--world 0"},
		{"flags, and a bad local rank", 0, 2, map[string]string{"LOCAL_RANK": "x"}, `LOCAL_RANK "x"`},
		{"half an environment", none, none, map[string]string{"RANK": "1"}, "RANK WORLD_SIZE --rank --world"},
		{"PMIx", none, none, map[string]string{"PMIX_RANK": "1"}, "PMIX_RANK --rank --world"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r, err := rankOf(tt.rank, tt.world, func(name string) string { return tt.env[name] })
			if err == nil {
				t.Fatalf("got %+v and no error", r)
			}
			if code := codeOf(t.Context(), err); code != exitUsage {
				t.Errorf("exit code %d, want %d", code, exitUsage)
			}
			for word := range strings.FieldsSeq(tt.want) {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("%q is not in: %v", word, err)
				}
			}
		})
	}
}

// TestPickGPUOfRank checks that the local rank decides only where --device has no number.
func TestPickGPUOfRank(t *testing.T) {
	for _, v := range []string{"ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"} {
		t.Setenv(v, "")
	}
	rt, err := soft.OpenRuntime(soft.Options{Devices: 2, Memory: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer rt.Close()
	for _, tt := range []struct {
		device string
		local  int
		want   int
		notice string
	}{
		{"auto", -1, 0, ""},
		{"auto", 1, 1, ""},
		{"hip", 1, 1, ""},
		{"hip", 3, 1, "gguf2gpu: local rank 3 takes GPU 1, which another rank has, too"},
		{"hip:0", 1, 0, ""},
		{"hip:1", 2, 1, ""},
	} {
		spec, err := parseDevice(tt.device)
		if err != nil {
			t.Fatal(err)
		}
		var stderr strings.Builder
		devs, err := (&deviceFlags{device: &spec, local: tt.local}).pickGPUs(rt, &stderr)
		if err != nil {
			t.Fatal(err)
		}
		dev, got := devs[0], stderr.String()
		if dev.Index() != tt.want || !strings.HasPrefix(got, tt.notice) || (got == "") != (tt.notice == "") {
			t.Errorf("--device %s, local rank %d: device %d, stderr %q; want device %d and %q", tt.device, tt.local, dev.Index(), got,
				tt.want, tt.notice)
		}
	}
	soft.Of(rt).Inject(soft.Fault{Func: "hipGetDeviceCount", Code: amdhip.ErrNoDevice})
	spec := deviceSpec{kind: "hip"}
	if _, err := (&deviceFlags{device: &spec, local: 1}).pickGPUs(rt, nil); !errors.Is(err, amdhip.ErrNoDevice) {
		t.Errorf("without a GPU: %v, want %v", err, amdhip.ErrNoDevice)
	}
}
