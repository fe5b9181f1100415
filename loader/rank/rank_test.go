package rank

import (
	"errors"
	"strings"
	"testing"
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
	slurmTask       = "SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=3 SLURM_LOCALID=1 " +
		"SLURM_NTASKS=4 "
	torchrunRank = "TORCHELASTIC_RUN_ID=none RANK=29 WORLD_SIZE=32 LOCAL_RANK=5 LOCAL_WORLD_SIZE=8 GROUP_RANK=3 "
	mpirunRank   = "OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=1 PMIX_RANK=5 "
)

func TestDetect(t *testing.T) {
	t.Parallel()
	const none = -1
	for _, tt := range []struct {
		name, env string
		want      Rank
	}{
		{"torchrun", torchrunRank, Rank{29, 32, 5, 8, "torchrun"}},
		{
			"a training operator, which has no local rank",
			"RANK=5 WORLD_SIZE=8",
			Rank{5, 8, none, 0, "torchrun's variables"},
		},
		{"mpirun", mpirunRank, Rank{5, 8, 1, 0, "Open MPI"}},
		{"mpiexec of MPICH", "PMI_RANK=5 PMI_SIZE=8 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=4", Rank{5, 8, 1, 4, "PMI"}},
		{"a process manager that only speaks PMI", "PMI_RANK=5 PMI_SIZE=8", Rank{5, 8, none, 0, "PMI"}},
		{"srun", slurmTask, Rank{3, 4, 1, 0, "Slurm"}},
		{
			"srun, and nothing but what counts",
			"SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=4",
			Rank{0, 4, 0, 0, "Slurm"},
		},
		{"srun with PMI", slurmTask + "PMI_RANK=3 PMI_SIZE=4", Rank{3, 4, 1, 0, "Slurm"}},
		{"srun with PMIx", slurmTask + "PMIX_RANK=3", Rank{3, 4, 1, 0, "Slurm"}},
		{
			"LeaderWorkerSet",
			"LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2 LWS_LEADER_ADDRESS=x",
			Rank{1, 2, none, 0, "LeaderWorkerSet"},
		},
		{"empty is not set", "RANK= WORLD_SIZE= LOCAL_RANK= " + slurmTask, Rank{3, 4, 1, 0, "Slurm"}},

		// One inside another.
		{"mpirun in a batch script", batchScript + mpirunRank, Rank{5, 8, 1, 0, "Open MPI"}},
		{
			"mpirun in a batch script of as many tasks",
			batchScript + "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4",
			Rank{0, 4, 0, 0, "Open MPI"},
		},
		{
			"mpirun's daemon on the second node",
			"SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=1 SLURM_LOCALID=0 SLURM_NTASKS=2 " + mpirunRank,
			Rank{5, 8, 1, 0, "Open MPI"},
		},
		{
			"mpiexec of MPICH in a batch script of as many tasks",
			batchScript + "PMI_RANK=0 PMI_SIZE=4 MPI_LOCALRANKID=0",
			Rank{0, 4, 0, 0, "PMI"},
		},
		{
			"mpiexec of MPICH in an interactive step",
			interactiveStep + "PMI_RANK=0 PMI_SIZE=4 MPI_LOCALRANKID=0",
			Rank{0, 4, 0, 0, "PMI"},
		},
		{"PMI in a batch script", batchScript + "PMI_RANK=0 PMI_SIZE=4", Rank{0, 4, 0, 0, "PMI"}},
		{"torchrun in salloc", "SLURM_JOB_ID=7 SLURM_NTASKS=2 " + torchrunRank, Rank{29, 32, 5, 8, "torchrun"}},
		{"torchrun once per node", slurmTask + torchrunRank, Rank{29, 32, 5, 8, "torchrun"}},
		{
			"torchrun once per node, with PMI and PMIx",
			slurmTask + "PMI_RANK=3 PMI_SIZE=4 PMIX_RANK=3 " + torchrunRank,
			Rank{29, 32, 5, 8, "torchrun"},
		},
		{"torchrun in a pod", "LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2 " + torchrunRank, Rank{29, 32, 5, 8, "torchrun"}},
		{"a loop in a batch script", batchScript + "RANK=1 WORLD_SIZE=2", Rank{1, 2, none, 0, "torchrun's variables"}},
		{
			"a loop in salloc",
			"SLURM_JOB_ID=7 SLURM_NTASKS=4 RANK=1 WORLD_SIZE=2",
			Rank{1, 2, none, 0, "torchrun's variables"},
		},
		{
			"a launcher's local rank counts, not the scheduler's",
			slurmTask + "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=3",
			Rank{3, 4, 3, 0, "Open MPI"},
		},

		// Several that agree.
		{"torchrun's names set by mpirun's", mpirunRank + "RANK=5 WORLD_SIZE=8", Rank{5, 8, 1, 0, "Open MPI"}},
		{
			"torchrun's names set by mpirun's in a batch script",
			batchScript + mpirunRank + "RANK=5 WORLD_SIZE=8",
			Rank{5, 8, 1, 0, "Open MPI"},
		},
		{
			"torchrun's names set by Slurm's",
			slurmTask + "RANK=3 WORLD_SIZE=4",
			Rank{3, 4, 1, 0, "torchrun's variables"},
		},
		{"only the size for a program that knows Slurm", slurmTask + "WORLD_SIZE=4", Rank{3, 4, 1, 0, "Slurm"}},
		{"only the local rank", slurmTask + "LOCAL_RANK=1", Rank{3, 4, 1, 0, "Slurm"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := Detect(environment(tt.env))
			if err != nil || got != tt.want {
				t.Errorf("got %+v, %v; want %+v", got, err, tt.want)
			}
		})
	}
}

func TestDetectRefuses(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, env string
		want      string // words of the error
	}{
		{"nothing", "HOME=/root", "torchrun mpirun srun"},

		{"torchrun without size", "RANK=1", "RANK WORLD_SIZE"},
		{"torchrun without rank", "WORLD_SIZE=2", "WORLD_SIZE RANK"},
		{"torchrun, the local rank alone", "LOCAL_RANK=1", "LOCAL_RANK RANK WORLD_SIZE"},
		{"Open MPI without size", "OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE"},
		{"PMI without rank", "PMI_SIZE=1", "PMI_SIZE PMI_RANK"},
		{"PMIx", "PMIX_RANK=1", "PMIX_RANK"},
		{"salloc", "SLURM_JOB_ID=7 SLURM_NTASKS=4", "SLURM_NTASKS SLURM_PROCID srun"},
		{"LeaderWorkerSet without size", "LWS_WORKER_INDEX=1", "LWS_WORKER_INDEX LWS_GROUP_SIZE"},
		{"a batch script", batchScript, "SLURM_NTASKS srun batch"},
		{"the shell of an interactive step", interactiveStep, "SLURM_NTASKS SLURM_STEP_NUM_TASKS srun"},

		{"no number", "RANK=one WORLD_SIZE=2", `RANK "one"`},
		{"negative", "RANK=1 WORLD_SIZE=-2", `WORLD_SIZE "-2"`},
		{"beyond an int", "SLURM_PROCID=0 SLURM_NTASKS=99999999999", "SLURM_NTASKS 99999999999"},
		{"a bad local rank", "PMI_RANK=0 PMI_SIZE=1 MPI_LOCALRANKID=0x", `MPI_LOCALRANKID "0x"`},
		{"a bad step", "SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=x", "SLURM_STEP_NUM_TASKS"},
		{"rank as high as size", "LWS_WORKER_INDEX=2 LWS_GROUP_SIZE=2", "LWS_WORKER_INDEX LWS_GROUP_SIZE 1"},
		{"local rank as high as size", "RANK=0 WORLD_SIZE=2 LOCAL_RANK=2", "LOCAL_RANK WORLD_SIZE"},
		{"a size of none", "RANK=0 WORLD_SIZE=0", "WORLD_SIZE 0"},

		{
			"two launchers", "RANK=1 WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4",
			"RANK=1 WORLD_SIZE=2 torchrun OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4 Open MPI",
		},
		{
			"two launchers, other ranks", "PMI_RANK=1 PMI_SIZE=4 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4",
			"PMI_RANK=1 OMPI_COMM_WORLD_RANK=0",
		},
		{
			"two launchers, other local ranks", mpirunRank + "RANK=5 WORLD_SIZE=8 LOCAL_RANK=5",
			"LOCAL_RANK=5 OMPI_COMM_WORLD_LOCAL_RANK=1",
		},
		{"half a launcher against a whole one", mpirunRank + "WORLD_SIZE=4", "WORLD_SIZE=4 OMPI_COMM_WORLD_SIZE=8"},
		{"half a launcher against Slurm", slurmTask + "WORLD_SIZE=8", "WORLD_SIZE=8 SLURM_NTASKS=4"},
		{"half a launcher in a batch script", batchScript + "RANK=2", "SLURM_NTASKS srun"},
		{
			"torchrun's names without torchrun against Slurm", slurmTask + "RANK=0 WORLD_SIZE=1",
			"RANK=0 WORLD_SIZE=1 SLURM_PROCID=3 SLURM_NTASKS=4",
		},
		{
			"torchrun's names without torchrun against a pod's", "LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2 RANK=0 WORLD_SIZE=2",
			"RANK=0 WORLD_SIZE=2 LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2",
		},
		{"torchrun against mpirun", torchrunRank + mpirunRank, "RANK=29 OMPI_COMM_WORLD_RANK=5"},
		{
			"two schedulers", slurmTask + "LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2",
			"SLURM_PROCID=3 SLURM_NTASKS=4 LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := Detect(environment(tt.env))
			if err == nil {
				t.Fatalf("got %+v and no error", got)
			}
			for word := range strings.FieldsSeq(tt.want) {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("%q is not in: %v", word, err)
				}
			}
		})
	}
}

func TestDetectNothing(t *testing.T) {
	t.Parallel()
	if _, err := Detect(environment("HOME=/root")); !errors.Is(err, ErrUnknown) {
		t.Errorf("got %v, want %v", err, ErrUnknown)
	}
	if _, err := Detect(environment("RANK=1")); err == nil || errors.Is(err, ErrUnknown) {
		t.Errorf("got %v, want another error than %v: the environment says something", err, ErrUnknown)
	}
}

// TestLocalWorld finds the number of ranks on the host.
func TestLocalWorld(t *testing.T) {
	t.Parallel()
	step := func(node, tasks string) string {
		return slurmTask + "SLURM_NODEID=" + node + " SLURM_STEP_TASKS_PER_NODE=" + tasks
	}
	for _, tt := range []struct {
		env  string
		want int
	}{
		{mpirunRank + "OMPI_COMM_WORLD_LOCAL_SIZE=4", 4},
		{step("0", "4"), 4},
		{step("1", "4(x2),3"), 4},
		{step("2", "4(x2),3"), 3},
		{step("3", "4(x2),3"), 0}, // no such node
		{step("0", "1"), 0},       // cannot be, with a local rank of 1
		{step("0", "many"), 0},
		{step("0", "4(xmany)"), 0},
		{step("first", "4"), 0},
		{slurmTask + "SLURM_STEP_TASKS_PER_NODE=4", 0},
		{"RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2", 2},
		{"RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 " + mpirunRank + "OMPI_COMM_WORLD_LOCAL_SIZE=4", 4},
	} {
		if r, err := Detect(environment(tt.env)); err != nil || r.LocalWorld != tt.want {
			t.Errorf("%s: %+v, %v; want %d ranks on this host", tt.env, r, err, tt.want)
		}
	}
	for _, env := range []string{
		"RANK=1 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2", "RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=0",
		"RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=x",
	} {
		if r, err := Detect(environment(env)); err == nil || !strings.Contains(err.Error(), "LOCAL_WORLD_SIZE") {
			t.Errorf("%s: %+v, %v; want an error that names LOCAL_WORLD_SIZE", env, r, err)
		}
	}
}

func TestLocal(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		env  string
		want int
	}{
		{"", -1},
		{"RANK=5 WORLD_SIZE=8 LOCAL_RANK=1", 1},
		{mpirunRank + slurmTask + "RANK=0 WORLD_SIZE=1", 1},
		{batchScript, 0},
		{"RANK=x WORLD_SIZE=-3 PMI_RANK=9", -1}, // does not matter
	} {
		if got, err := Local(environment(tt.env)); err != nil || got != tt.want {
			t.Errorf("%q: %d, %v; want %d", tt.env, got, err, tt.want)
		}
	}
	got, err := Local(environment("LOCAL_RANK=x"))
	if err == nil || !strings.Contains(err.Error(), `LOCAL_RANK in the environment is "x"`) {
		t.Errorf("got %d, %v; want an error with the variable and its value", got, err)
	}
}

func TestDevice(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		local, count int
		env          string
		want         int
		shared       bool
	}{
		{local: 0, count: 4, want: 0},
		{local: 3, count: 4, want: 3},
		{local: 4, count: 4, want: 0, shared: true},
		{local: 6, count: 4, want: 2, shared: true},
		{local: 1, count: 1, want: 0, shared: true},
		{local: 3, count: 1, env: "HIP_VISIBLE_DEVICES=3", want: 0},
		{local: 3, count: 1, env: "ROCR_VISIBLE_DEVICES=GPU-123", want: 0},
		{local: 2, count: 2, env: "ROCR_VISIBLE_DEVICES=0,1", want: 0, shared: true},
	} {
		index, shared := Device(tt.local, tt.count, environment(tt.env))
		if index != tt.want || shared != tt.shared {
			t.Errorf("local rank %d, %d devices, %s: device %d, shared %v; want device %d, shared %v",
				tt.local, tt.count, tt.env, index, shared, tt.want, tt.shared)
		}
	}
}
