package rank

import (
	"fmt"
	"strconv"
	"strings"
)

// source is something that tells a process its rank, with the environment variables that it sets.
type source struct {
	name                                       string
	rankVar, worldVar, localVar, localWorldVar string // "": it has none
	kind                                       kind
}

// kind orders sources: where two disagree, the one with the lower kind may be right.
type kind int

const (
	launcher  kind = iota // starts the very processes that are ranks
	byHand                // names that anybody may set, by hand or in a wrapper script
	scheduler             // its variables are inherited inside a job or pod, where a launcher may start ranks anew
)

var (
	torchrun = source{"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", launcher}
	// torchrun's variables are widely used without torchrun.
	torchLike = source{"torchrun's variables", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", byHand}
	openMPI   = source{
		"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
		"OMPI_COMM_WORLD_LOCAL_SIZE", launcher,
	}
	pmi   = source{"PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", launcher}
	slurm = source{"Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "", scheduler}
	lws   = source{"LeaderWorkerSet", "LWS_WORKER_INDEX", "LWS_GROUP_SIZE", "", "", scheduler}
)

// sources lists all sources. Only torchrun sets TORCHELASTIC_RUN_ID.
func sources(getenv func(string) string) []source {
	torch := torchLike
	if getenv("TORCHELASTIC_RUN_ID") != "" {
		torch = torchrun
	}
	return []source{torch, openMPI, pmi, slurm, lws}
}

// reading is what the variables of a source say; -1 stands for what is not set.
type reading struct {
	source
	rank, world, local, localWorld int
}

// read reads the variables of s and checks that they make sense together.
func (s source) read(getenv func(string) string) (r reading, err error) {
	r.source = s
	for _, v := range []struct {
		name string
		to   *int
	}{{s.rankVar, &r.rank}, {s.worldVar, &r.world}, {s.localVar, &r.local}, {s.localWorldVar, &r.localWorld}} {
		if *v.to, err = readNumber(v.name, getenv); err != nil {
			return reading{}, err
		}
	}
	if s == slurm {
		if n := tasksOnNode(getenv); n > r.local {
			r.localWorld = n
		}
	}
	for _, v := range []struct {
		name     string
		n        int
		sizeName string
		size     int
	}{
		{s.rankVar, r.rank, s.worldVar, r.world},
		{s.localVar, r.local, s.worldVar, r.world},
		{s.localVar, r.local, s.localWorldVar, r.localWorld},
	} {
		if v.size == 0 {
			return reading{}, fmt.Errorf("%s is 0: there must be at least one rank; correct it", v.sizeName)
		}
		if v.sizeName != "" && v.size > 0 && v.n >= v.size {
			return reading{}, outOfRange(v.name, v.n, v.sizeName, v.size)
		}
	}
	return r, nil
}

// readNumber returns the number in the variable name, or -1 if that is not set.
func readNumber(name string, getenv func(string) string) (int, error) {
	if name == "" || getenv(name) == "" {
		return -1, nil
	}
	n, err := strconv.ParseUint(strings.TrimSpace(getenv(name)), 10, 31)
	if err != nil {
		return -1, fmt.Errorf("%s in the environment is %q and should be a number from 0: correct it",
			name, getenv(name))
	}
	return int(n), nil
}

func outOfRange(name string, n int, sizeName string, size int) error {
	return fmt.Errorf("%s is %d, but %s is %d: ranks are counted from 0 to %d; correct it",
		name, n, sizeName, size, size-1)
}

func (r reading) complete() bool { return r.rank >= 0 && r.world >= 0 }

// contradicts reports whether both readings have a value for the same thing, and not the same value.
func (r reading) contradicts(o reading) bool {
	differ := func(a, b int) bool { return a >= 0 && b >= 0 && a != b }
	return differ(r.rank, o.rank) || differ(r.world, o.world) || differ(r.local, o.local)
}

// String returns the variables with their values, and the name of the source.
func (r reading) String() string {
	var words []string
	for _, v := range []struct {
		name string
		n    int
	}{{r.rankVar, r.rank}, {r.worldVar, r.world}, {r.localVar, r.local}} {
		if v.n >= 0 {
			words = append(words, v.name+"="+strconv.Itoa(v.n))
		}
	}
	return fmt.Sprintf("%s (%s)", strings.Join(words, " "), r.name)
}
