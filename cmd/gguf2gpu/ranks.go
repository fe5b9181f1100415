package main

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// place is where a process stands among those that load the shards of one model together.
type place struct {
	rank, world int
	local       int // the number among the ranks of this host; -1 if nothing tells
}

// engine is something that starts ranks, with the environment variables by which each rank knows itself.
type engine struct {
	name              string
	rank, size, local string // local is "" where there is none
	kind              engineKind
}

// engineKind orders engines by how far their word goes.
type engineKind int

const (
	launcher  engineKind = iota // starts the very processes that are ranks
	plain                       // names that anybody may set, by hand or in a wrapper
	scheduler                   // what it sets is inherited by everything in a job or pod; a launcher in there counts its ranks anew
)

var (
	torchrun  = engine{"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", launcher}
	torchLike = engine{"torchrun's names", "RANK", "WORLD_SIZE", "LOCAL_RANK", plain}
	openMPI   = engine{"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", launcher}
	pmi       = engine{"PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", launcher}
	slurm     = engine{"Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", scheduler}
	lws       = engine{"LeaderWorkerSet", "LWS_WORKER_INDEX", "LWS_GROUP_SIZE", "", scheduler}
)

// said is what the variables of an engine say; -1 for what is not set.
type said struct {
	engine
	index, world, nth int // the values of rank, size and local
}

// findPlace finds this process's place: rank and world are the values of --rank and --world, negative if they were not given, and
// win over what getenv knows of torchrun, Open MPI, PMI, Slurm and LeaderWorkerSet. A launcher wins over a scheduler; all else that
// differs, or that says half, is a usage error that names the variables.
func findPlace(rank, world int, getenv func(string) string) (place, error) {
	torch := torchLike
	if getenv("TORCHELASTIC_RUN_ID") != "" {
		torch = torchrun // nobody else sets that
	}
	engines := []engine{torch, openMPI, pmi, slurm, lws}
	if rank >= 0 || world >= 0 {
		return placeOfFlags(rank, world, engines, getenv)
	}
	var found []said
	for _, e := range engines {
		s, err := e.read(getenv)
		if err != nil {
			return place{}, err
		}
		if s.index >= 0 || s.world >= 0 || s.nth >= 0 {
			found = append(found, s)
		}
	}
	found = withoutSlurmPMI(found, getenv)
	slices.SortStableFunc(found, func(a, b said) int { return cmp.Compare(a.kind, b.kind) })
	for _, s := range found {
		if s.complete() {
			return s.among(found, getenv)
		}
	}
	return place{}, noPlace(found, getenv)
}

func placeOfFlags(rank, world int, engines []engine, getenv func(string) string) (place, error) {
	switch {
	case world < 0:
		return place{}, usageErrorf("--rank is given without --world, the number of ranks")
	case rank < 0:
		return place{}, usageErrorf("--world is given without --rank, which of them this is, counted from 0")
	case rank >= world:
		return place{}, outOf("--rank", rank, "--world", world)
	}
	p := place{rank, world, -1}
	for _, e := range engines {
		local, err := readNumber(e.local, getenv)
		if err != nil || local >= 0 {
			p.local = local
			return p, err
		}
	}
	return p, nil
}

// read reads the variables of e. Each alone must make sense, and so must those that are set together.
func (e engine) read(getenv func(string) string) (s said, err error) {
	s.engine = e
	for _, v := range []struct {
		name string
		to   *int
	}{{e.rank, &s.index}, {e.size, &s.world}, {e.local, &s.nth}} {
		if *v.to, err = readNumber(v.name, getenv); err != nil {
			return said{}, err
		}
	}
	switch {
	case s.world < 0:
	case s.index >= s.world:
		return said{}, outOf(e.rank, s.index, e.size, s.world)
	case s.nth >= s.world:
		return said{}, outOf(e.local, s.nth, e.size, s.world)
	}
	return s, nil
}

// readNumber is the number in the variable name, or -1 if that is not set.
func readNumber(name string, getenv func(string) string) (int, error) {
	if name == "" || getenv(name) == "" {
		return -1, nil
	}
	n, err := strconv.ParseUint(strings.TrimSpace(getenv(name)), 10, 31)
	if err != nil {
		return -1, usageErrorf("%s in the environment is %q and should be a number from 0: correct it, or give --rank and --world",
			name, getenv(name))
	}
	return int(n), nil
}

func outOf(rank string, n int, size string, of int) error {
	if of == 0 {
		return usageErrorf("%s is 0: there must be at least one rank", size)
	}
	return usageErrorf("%s is %d, but %s is %d: ranks are counted from 0 to %d", rank, n, size, of, of-1)
}

func (s said) complete() bool { return s.index >= 0 && s.world >= 0 }

// withoutSlurmPMI leaves PMI out where it is Slurm's own (srun --mpi=pmi2): it belongs to the scheduler then, not to a launcher in
// its job, which would have set the local rank, too.
func withoutSlurmPMI(found []said, getenv func(string) string) []said {
	i := slices.IndexFunc(found, func(s said) bool { return s.engine == slurm && s.complete() && s.isTask(getenv) == nil })
	if i < 0 {
		return found
	}
	step := found[i]
	return slices.DeleteFunc(found, func(s said) bool {
		return s.engine == pmi && s.index == step.index && s.world == step.world && s.nth < 0
	})
}

// among is the place that s says, if the others that were found agree with it.
func (s said) among(found []said, getenv func(string) string) (place, error) {
	if s.engine == slurm {
		if err := s.isTask(getenv); err != nil {
			return place{}, err
		}
	}
	p := place{s.index, s.world, s.nth}
	for _, o := range found {
		same := o.index == s.index && o.world == s.world
		inside := s.kind == launcher && o.kind == scheduler
		if o.engine == slurm && (!o.complete() || o.isTask(getenv) != nil) {
			inside = true // of a job, whatever its tasks are
		}
		if !inside && o.differs(s) {
			return place{}, usageErrorf("%v contradicts %v: unset those of one, or give --rank and --world", s, o)
		}
		if same && p.local < 0 {
			p.local = o.nth
		}
	}
	return p, nil
}

// isTask is an error where Slurm's variables are those of a job, in its batch script or in salloc's shell. They say that this is
// task 0 of many there, and it would load the first share without a word.
func (s said) isTask(getenv func(string) string) error {
	const how = "start it with srun, or give --rank and --world"
	if getenv("SLURM_STEP_ID") == "" {
		if getenv("SLURM_JOB_ID") != "" && s.world > 1 {
			return usageErrorf("SLURM_NTASKS is %d, but this is the batch script and not one of the tasks, as there is no SLURM_STEP_ID: %s",
				s.world, how)
		}
		return nil
	}
	tasks, err := readNumber("SLURM_STEP_NUM_TASKS", getenv)
	if err == nil && tasks >= 0 && tasks != s.world {
		err = usageErrorf("SLURM_NTASKS is %d, but SLURM_STEP_NUM_TASKS is %d: %s", s.world, tasks, how)
	}
	return err
}

// differs reports whether both say something, and not the same.
func (s said) differs(o said) bool {
	both := func(a, b int) bool { return a >= 0 && b >= 0 && a != b }
	return both(s.index, o.index) || both(s.world, o.world) || both(s.nth, o.nth)
}

// String is the variables with their values.
func (s said) String() string {
	var words []string
	for _, v := range []struct {
		name string
		n    int
	}{{s.rank, s.index}, {s.size, s.world}, {s.local, s.nth}} {
		if v.n >= 0 {
			words = append(words, v.name+"="+strconv.Itoa(v.n))
		}
	}
	return fmt.Sprintf("%s (%s)", strings.Join(words, " "), s.name)
}

// noPlace is the error when nobody says all.
func noPlace(found []said, getenv func(string) string) error {
	const or = "start it through torchrun, mpirun or srun, or give --rank and --world"
	for _, s := range found {
		switch {
		case s.index >= 0:
			return usageErrorf("%s is set, but %s is not: %s", s.rank, s.size, or)
		case s.world >= 0:
			return usageErrorf("%s is set, but %s is not: %s", s.size, s.rank, or)
		default:
			return usageErrorf("%s is set, but %s and %s are not: %s", s.local, s.rank, s.size, or)
		}
	}
	if r := getenv("PMIX_RANK"); r != "" {
		return usageErrorf("PMIX_RANK is set to %s, but PMIx does not say in the environment how many ranks there are: "+
			"give --rank and --world", r)
	}
	return usageErrorf("--shard needs to know which rank of how many this is: %s", or)
}

// deviceOfRank is which of count devices, at least one, the rank with that local number takes: one each, in turn. The notice is for
// stderr, unless it is empty.
func deviceOfRank(local, count int, getenv func(string) string) (index int, notice string) {
	if local < count {
		return local, ""
	}
	if count == 1 {
		for _, v := range []string{"ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"} {
			if getenv(v) != "" {
				return 0, "" // each rank sees a device of its own
			}
		}
	}
	index = local % count
	return index, fmt.Sprintf("local rank %d takes GPU %d, which another rank has, too: the number of GPUs here is %d", local, index, count)
}
