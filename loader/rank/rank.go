package rank

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
)

// Rank says which process this is.
type Rank struct {
	Rank       int    // counted from 0 up to World-1
	World      int    // the number of ranks on all hosts together, at least 1
	Local      int    // the number among the ranks of this host, counted from 0; -1 if the environment does not tell
	LocalWorld int    // the number of ranks on this host; 0 if the environment does not tell
	Source     string // what told Rank and World, in words: "torchrun", "Open MPI", "Slurm", ...
}

// ErrUnknown matches, by [errors.Is], the error of [Detect] in an environment without any of the variables. A program
// that can also run alone may take it for a world of one rank.
var ErrUnknown = errors.New("the environment does not say which rank of how many this is")

// howToStart ends the errors of variables that are missing.
const howToStart = "start it through torchrun, mpirun or srun"

// Detect finds the rank of this process in the environment that getenv reads. A variable that is empty counts as not
// set.
//
// It returns an error that matches [ErrUnknown] when nothing says which rank this is. It returns another error when a
// value is not a number, when a rank is not below the number of ranks, when only half is said, when two sources
// contradict each other, and in a batch script of Slurm, whose variables are those of its first task. All errors name
// the variables and end with what to do, so that a caller can go on with ", or ..." and its own way to name the rank.
func Detect(getenv func(string) string) (Rank, error) {
	var found []reading
	for _, s := range sources(getenv) {
		r, err := s.read(getenv)
		if err != nil {
			return Rank{}, err
		}
		if r.rank >= 0 || r.world >= 0 || r.local >= 0 {
			found = append(found, r)
		}
	}
	found = withoutSlurmPMI(found, getenv)
	slices.SortStableFunc(found, func(a, b reading) int { return cmp.Compare(a.kind, b.kind) })
	for _, r := range found {
		if r.complete() {
			return decide(r, found, getenv)
		}
	}
	return Rank{}, incomplete(found, getenv)
}

// Local returns the number of this process among the ranks of its host, for a caller that knows rank and world from
// elsewhere. It is -1 if the environment does not tell. The first of the variables that is set decides, in the order
// of the package's table. A value that is not a number is an error that names the variable.
func Local(getenv func(string) string) (int, error) {
	for _, s := range sources(getenv) {
		if local, err := readNumber(s.localVar, getenv); err != nil || local >= 0 {
			return local, err
		}
	}
	return -1, nil
}

// Device returns which of count GPUs the rank with the number local on its host should use. Both are counted from 0,
// and count must be at least 1. Each rank takes one; if there are more ranks than GPUs, they start over at GPU 0.
//
// shared reports that another rank has this GPU, too. That is not assumed where a process sees a single GPU because
// ROCR_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES is set: launchers give each rank a GPU of its own
// so.
func Device(local, count int, getenv func(string) string) (index int, shared bool) {
	if local < count {
		return local, false
	}
	if count == 1 {
		for _, name := range []string{"ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"} {
			if getenv(name) != "" {
				return 0, false
			}
		}
	}
	return local % count, true
}

// decide makes chosen the rank, if the other readings in found agree with it.
func decide(chosen reading, found []reading, getenv func(string) string) (Rank, error) {
	if chosen.source == slurm {
		if err := chosen.checkTask(getenv); err != nil {
			return Rank{}, err
		}
	}
	r := Rank{chosen.rank, chosen.world, chosen.local, max(0, chosen.localWorld), chosen.name}
	for _, other := range found {
		same := other.rank == chosen.rank && other.world == chosen.world
		outer := chosen.kind == launcher && other.kind == scheduler
		if other.source == slurm && (!other.complete() || other.checkTask(getenv) != nil) {
			outer = true // these are the variables of a job, which may run ranks of any kind inside
		}
		if !outer && other.contradicts(chosen) {
			return Rank{}, fmt.Errorf("%v contradicts %v: unset those of one", chosen, other)
		}
		if same && r.Local < 0 {
			r.Local = other.local
		}
		if same && r.LocalWorld == 0 && r.Local == other.local {
			r.LocalWorld = max(0, other.localWorld)
		}
	}
	return r, nil
}

// incomplete is the error when no source tells both rank and world. found has what the sources do tell.
func incomplete(found []reading, getenv func(string) string) error {
	for _, r := range found {
		switch {
		case r.rank >= 0:
			return fmt.Errorf("%s is set, but %s is not: %s", r.rankVar, r.worldVar, howToStart)
		case r.world >= 0:
			return fmt.Errorf("%s is set, but %s is not: %s", r.worldVar, r.rankVar, howToStart)
		default:
			return fmt.Errorf("%s is set, but %s and %s are not: %s", r.localVar, r.rankVar, r.worldVar, howToStart)
		}
	}
	if rank := getenv("PMIX_RANK"); rank != "" {
		return fmt.Errorf("PMIX_RANK is set to %s, but PMIx does not say in the environment how many ranks there are: "+
			"set RANK and WORLD_SIZE", rank)
	}
	return fmt.Errorf("%w: %s", ErrUnknown, howToStart)
}
