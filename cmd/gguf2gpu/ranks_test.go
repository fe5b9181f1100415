package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// environment makes a getenv of words such as "RANK=1 WORLD_SIZE=2".
func environment(words string) func(string) string {
	vars := map[string]string{}
	for word := range strings.FieldsSeq(words) {
		name, value, _ := strings.Cut(word, "=")
		vars[name] = value
	}
	return func(name string) string { return vars[name] }
}

const (
	batchScript     = "SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=4 "
	interactiveStep = batchScript + "SLURM_STEP_ID=4294967290 SLURM_STEP_NUM_TASKS=1 "
	slurmTask       = "SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 "
	torchrunRank    = "TORCHELASTIC_RUN_ID=none RANK=29 WORLD_SIZE=32 LOCAL_RANK=5 LOCAL_WORLD_SIZE=8 GROUP_RANK=3 "
	mpirunRank      = "OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=1 PMIX_RANK=5 "
)

func TestFindPlace(t *testing.T) {
	const none = -1
	for _, tt := range []struct {
		name, env   string
		rank, world int // of the flags
		want        place
	}{
		{"flags", "", 2, 4, place{2, 4, none}},
		{"one rank of one", "", 0, 1, place{0, 1, none}},
		{"torchrun", torchrunRank, none, none, place{29, 32, 5}},
		{"a training operator, which has no local rank", "RANK=5 WORLD_SIZE=8", none, none, place{5, 8, none}},
		{"mpirun", mpirunRank, none, none, place{5, 8, 1}},
		{"mpiexec of MPICH", "PMI_RANK=5 PMI_SIZE=8 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=4", none, none, place{5, 8, 1}},
		{"a process manager that only speaks PMI", "PMI_RANK=5 PMI_SIZE=8", none, none, place{5, 8, none}},
		{"srun", slurmTask, none, none, place{3, 4, 1}},
		{"srun, and nothing but what counts", "SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=4", none, none, place{0, 4, 0}},
		{"srun with PMI", slurmTask + "PMI_RANK=3 PMI_SIZE=4", none, none, place{3, 4, 1}},
		{"srun with PMIx", slurmTask + "PMIX_RANK=3", none, none, place{3, 4, 1}},
		{"LeaderWorkerSet", "LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2 LWS_LEADER_ADDRESS=x", none, none, place{1, 2, none}},
		{"empty is not set", "RANK= WORLD_SIZE= LOCAL_RANK= " + slurmTask, none, none, place{3, 4, 1}},

		// An engine inside of another.
		{"mpirun in a batch script", batchScript + mpirunRank, none, none, place{5, 8, 1}},
		{"mpirun in a batch script of as many tasks", batchScript + "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4", none, none,
			place{0, 4, 0}},
		{"mpirun's daemon on the second node", "SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=1 SLURM_LOCALID=0 SLURM_NTASKS=2 " +
			mpirunRank, none, none, place{5, 8, 1}},
		{"mpiexec of MPICH in a batch script of as many tasks", batchScript + "PMI_RANK=0 PMI_SIZE=4 MPI_LOCALRANKID=0", none, none,
			place{0, 4, 0}},
		{"mpiexec of MPICH in an interactive step", interactiveStep + "PMI_RANK=0 PMI_SIZE=4 MPI_LOCALRANKID=0", none, none,
			place{0, 4, 0}},
		{"PMI in a batch script", batchScript + "PMI_RANK=0 PMI_SIZE=4", none, none, place{0, 4, 0}},
		{"torchrun in salloc", "SLURM_JOB_ID=7 SLURM_NTASKS=2 " + torchrunRank, none, none, place{29, 32, 5}},
		{"torchrun once per node", slurmTask + torchrunRank, none, none, place{29, 32, 5}},
		{"torchrun once per node, with PMI and PMIx", slurmTask + "PMI_RANK=3 PMI_SIZE=4 PMIX_RANK=3 " + torchrunRank,
			none, none, place{29, 32, 5}},
		{"torchrun in a pod", "LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2 " + torchrunRank, none, none, place{29, 32, 5}},
		{"a loop in a batch script", batchScript + "RANK=1 WORLD_SIZE=2", none, none, place{1, 2, none}},
		{"a loop in salloc", "SLURM_JOB_ID=7 SLURM_NTASKS=4 RANK=1 WORLD_SIZE=2", none, none, place{1, 2, none}},
		{"a launcher's local rank counts, not the scheduler's", slurmTask + "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 " +
			"OMPI_COMM_WORLD_LOCAL_RANK=3", none, none, place{3, 4, 3}},

		// Several that agree.
		{"torchrun's names set by mpirun's", mpirunRank + "RANK=5 WORLD_SIZE=8", none, none, place{5, 8, 1}},
		{"torchrun's names set by mpirun's in a batch script", batchScript + mpirunRank + "RANK=5 WORLD_SIZE=8", none, none,
			place{5, 8, 1}},
		{"torchrun's names set by Slurm's", slurmTask + "RANK=3 WORLD_SIZE=4", none, none, place{3, 4, 1}},
		{"only the size for a program that knows Slurm", slurmTask + "WORLD_SIZE=4", none, none, place{3, 4, 1}},
		{"only the local rank", slurmTask + "LOCAL_RANK=1", none, none, place{3, 4, 1}},

		// Flags win, and the local rank still tells the device.
		{"flags against torchrun", "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1", 0, 2, place{0, 2, 1}},
		{"flags against all", mpirunRank + slurmTask + "RANK=0 WORLD_SIZE=1", 1, 2, place{1, 2, 1}},
		{"flags in a batch script", batchScript, 3, 4, place{3, 4, 0}},
		{"flags where the environment is nonsense", "RANK=x WORLD_SIZE=-3 PMI_RANK=9", 1, 2, place{1, 2, none}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := findPlace(tt.rank, tt.world, environment(tt.env))
			if err != nil || got != tt.want {
				t.Errorf("got %+v, %v; want %+v", got, err, tt.want)
			}
		})
	}
}

func TestFindNoPlace(t *testing.T) {
	const none = -1
	for _, tt := range []struct {
		name, env   string
		rank, world int
		want        string // words of the error
	}{
		{"nothing", "HOME=/root", none, none, "--rank --world torchrun mpirun srun"},
		{"rank alone", "", 1, none, "--rank --world"},
		{"rank alone, although the environment has the rest", "RANK=1 WORLD_SIZE=2", 1, none, "--rank --world"},
		{"world alone", "", none, 2, "--rank --world"},
		{"rank too high", "", 4, 4, "--rank --world 4 3"},
		{"a world of none", "", 0, 0, "--world 0"},
		{"flags, and a bad local rank", "LOCAL_RANK=x", 0, 2, `LOCAL_RANK "x"`},

		{"torchrun without size", "RANK=1", none, none, "RANK WORLD_SIZE --world"},
		{"torchrun without rank", "WORLD_SIZE=2", none, none, "WORLD_SIZE RANK --rank"},
		{"torchrun, the local rank alone", "LOCAL_RANK=1", none, none, "LOCAL_RANK RANK WORLD_SIZE"},
		{"Open MPI without size", "OMPI_COMM_WORLD_RANK=1", none, none, "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE"},
		{"PMI without rank", "PMI_SIZE=1", none, none, "PMI_SIZE PMI_RANK"},
		{"PMIx", "PMIX_RANK=1", none, none, "PMIX_RANK --world"},
		{"salloc", "SLURM_JOB_ID=7 SLURM_NTASKS=4", none, none, "SLURM_NTASKS SLURM_PROCID srun"},
		{"LeaderWorkerSet without size", "LWS_WORKER_INDEX=1", none, none, "LWS_WORKER_INDEX LWS_GROUP_SIZE"},
		{"a batch script", batchScript, none, none, "SLURM_NTASKS srun batch"},
		{"the shell of an interactive step", interactiveStep, none, none, "SLURM_NTASKS SLURM_STEP_NUM_TASKS srun"},

		{"no number", "RANK=one WORLD_SIZE=2", none, none, `RANK "one"`},
		{"negative", "RANK=1 WORLD_SIZE=-2", none, none, `WORLD_SIZE "-2"`},
		{"beyond an int", "SLURM_PROCID=0 SLURM_NTASKS=99999999999", none, none, "SLURM_NTASKS 99999999999"},
		{"a bad local rank", "PMI_RANK=0 PMI_SIZE=1 MPI_LOCALRANKID=0x", none, none, `MPI_LOCALRANKID "0x"`},
		{"a bad step", "SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=x", none, none, "SLURM_STEP_NUM_TASKS"},
		{"rank as high as size", "LWS_WORKER_INDEX=2 LWS_GROUP_SIZE=2", none, none, "LWS_WORKER_INDEX LWS_GROUP_SIZE 1"},
		{"local rank as high as size", "RANK=0 WORLD_SIZE=2 LOCAL_RANK=2", none, none, "LOCAL_RANK WORLD_SIZE"},
		{"a size of none", "RANK=0 WORLD_SIZE=0", none, none, "WORLD_SIZE 0"},

		{"two launchers", "RANK=1 WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4", none, none,
			"RANK=1 WORLD_SIZE=2 torchrun OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4 Open MPI --rank"},
		{"two launchers, other ranks", "PMI_RANK=1 PMI_SIZE=4 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4", none, none,
			"PMI_RANK=1 OMPI_COMM_WORLD_RANK=0"},
		{"two launchers, other local ranks", mpirunRank + "RANK=5 WORLD_SIZE=8 LOCAL_RANK=5", none, none,
			"LOCAL_RANK=5 OMPI_COMM_WORLD_LOCAL_RANK=1"},
		{"half a launcher against a whole one", mpirunRank + "WORLD_SIZE=4", none, none, "WORLD_SIZE=4 OMPI_COMM_WORLD_SIZE=8"},
		{"half a launcher against Slurm", slurmTask + "WORLD_SIZE=8", none, none, "WORLD_SIZE=8 SLURM_NTASKS=4"},
		{"half a launcher in a batch script", batchScript + "RANK=2", none, none, "SLURM_NTASKS srun"},
		{"torchrun's names without torchrun against Slurm", slurmTask + "RANK=0 WORLD_SIZE=1", none, none,
			"RANK=0 WORLD_SIZE=1 SLURM_PROCID=3 SLURM_NTASKS=4 --rank"},
		{"torchrun's names without torchrun against a pod's", "LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2 RANK=0 WORLD_SIZE=2", none, none,
			"RANK=0 WORLD_SIZE=2 LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2"},
		{"torchrun against mpirun", torchrunRank + mpirunRank, none, none, "RANK=29 OMPI_COMM_WORLD_RANK=5"},
		{"two schedulers", slurmTask + "LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2", none, none,
			"SLURM_PROCID=3 SLURM_NTASKS=4 LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := findPlace(tt.rank, tt.world, environment(tt.env))
			if err == nil {
				t.Fatalf("got %+v and no error", got)
			}
			if code := codeOf(t.Context(), err); code != exitUsage {
				t.Errorf("exit code %d, want %d", code, exitUsage)
			}
			for word := range strings.FieldsSeq(tt.want) {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("%q is not in: %v", word, err)
				}
			}
			t.Log(err)
		})
	}
}

func TestDeviceOfRank(t *testing.T) {
	for _, tt := range []struct {
		local, count int
		env          string
		want         int
		notice       bool
	}{
		{local: 0, count: 4, want: 0},
		{local: 3, count: 4, want: 3},
		{local: 4, count: 4, want: 0, notice: true},
		{local: 6, count: 4, want: 2, notice: true},
		{local: 1, count: 1, want: 0, notice: true},
		{local: 3, count: 1, env: "HIP_VISIBLE_DEVICES=3", want: 0},
		{local: 3, count: 1, env: "ROCR_VISIBLE_DEVICES=GPU-123", want: 0},
		{local: 2, count: 2, env: "ROCR_VISIBLE_DEVICES=0,1", want: 0, notice: true},
	} {
		index, notice := deviceOfRank(tt.local, tt.count, environment(tt.env))
		if index != tt.want || (notice != "") != tt.notice {
			t.Errorf("local rank %d, %d devices, %s: device %d, notice %q; want device %d, a notice %v", tt.local, tt.count, tt.env, index,
				notice, tt.want, tt.notice)
		}
	}
}

// TestPickGPUOfRank lets the local rank decide only where --device has no number.
func TestPickGPUOfRank(t *testing.T) {
	for _, v := range []string{"ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"} {
		t.Setenv(v, "")
	}
	rt, err := amdhip.OpenSoftware(amdhip.SoftwareOptions{Devices: 2, Memory: 1 << 20})
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
		dev := devs[0]
		if got := stderr.String(); dev.Index() != tt.want || !strings.HasPrefix(got, tt.notice) || (got == "") != (tt.notice == "") {
			t.Errorf("--device %s, local rank %d: device %d, stderr %q; want device %d and %q", tt.device, tt.local, dev.Index(), got,
				tt.want, tt.notice)
		}
	}
	rt.Software().Inject(amdhip.Fault{Func: "hipGetDeviceCount", Code: amdhip.ErrNoDevice})
	spec := deviceSpec{kind: "hip"}
	if _, err := (&deviceFlags{device: &spec, local: 1}).pickGPUs(rt, nil); !errors.Is(err, amdhip.ErrNoDevice) {
		t.Errorf("without a GPU: %v, want %v", err, amdhip.ErrNoDevice)
	}
}
