package rank

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// withoutSlurmPMI drops the reading of PMI if Slurm itself has set PMI's variables (srun --mpi=pmi2). Then they come
// from the scheduler and not from a launcher inside its job. A launcher would have set the local rank, too.
func withoutSlurmPMI(found []reading, getenv func(string) string) []reading {
	i := slices.IndexFunc(found, func(r reading) bool {
		return r.source == slurm && r.complete() && r.checkTask(getenv) == nil
	})
	if i < 0 {
		return found
	}
	task := found[i]
	return slices.DeleteFunc(found, func(r reading) bool {
		return r.source == pmi && r.rank == task.rank && r.world == task.world && r.local < 0
	})
}

// checkTask returns an error if Slurm's variables are not those of one task among SLURM_NTASKS. In a batch script and
// in the shell of salloc they look like task 0 of all tasks, so that this one process would load the first part, and
// nobody the rest.
func (r reading) checkTask(getenv func(string) string) error {
	const remedy = "start it with srun"
	if getenv("SLURM_STEP_ID") == "" {
		if getenv("SLURM_JOB_ID") != "" && r.world > 1 {
			return fmt.Errorf("SLURM_NTASKS is %d, but there is no SLURM_STEP_ID, so this is the batch script and not "+
				"one of the tasks: %s", r.world, remedy)
		}
		return nil
	}
	tasks, err := readNumber("SLURM_STEP_NUM_TASKS", getenv)
	if err == nil && tasks >= 0 && tasks != r.world {
		err = fmt.Errorf("SLURM_NTASKS is %d, but SLURM_STEP_NUM_TASKS is %d: %s", r.world, tasks, remedy)
	}
	return err
}

// tasksOnNode returns how many tasks the step has on this node, or -1 if that is not told. SLURM_STEP_TASKS_PER_NODE
// has a number for each node, of which SLURM_NODEID is ours; "4(x2),3" means 4, 4 and 3 tasks. It is worth no error:
// nothing but LocalWorld depends on it.
func tasksOnNode(getenv func(string) string) int {
	node, err := readNumber("SLURM_NODEID", getenv)
	if err != nil || node < 0 {
		return -1
	}
	for group := range strings.SplitSeq(getenv("SLURM_STEP_TASKS_PER_NODE"), ",") {
		count, repeat, repeated := strings.Cut(group, "(x")
		nodes := 1
		if repeated {
			if nodes, err = strconv.Atoi(strings.TrimSuffix(repeat, ")")); err != nil {
				return -1
			}
		}
		if node < nodes {
			tasks, err := strconv.ParseUint(count, 10, 31)
			if err != nil || tasks == 0 {
				return -1
			}
			return int(tasks)
		}
		node -= nodes
	}
	return -1
}
