// Package rank finds out which of several processes this one is, when they load the parts of one model together.
// Whatever starts such processes tells each of them by environment variables:
//
//	started by      rank                 number of ranks      rank on this host          ranks on this host
//	torchrun        RANK                 WORLD_SIZE           LOCAL_RANK                 LOCAL_WORLD_SIZE
//	Open MPI        OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE
//	MPICH, PMI      PMI_RANK             PMI_SIZE             MPI_LOCALRANKID            MPI_LOCALNRANKS
//	Slurm's srun    SLURM_PROCID         SLURM_NTASKS         SLURM_LOCALID              SLURM_STEP_TASKS_PER_NODE
//	LeaderWorkerSet LWS_WORKER_INDEX     LWS_GROUP_SIZE
//
// [Detect] reads them all, because one may run inside another: mpirun in a batch script of Slurm, torchrun in a pod
// of a LeaderWorkerSet. Then a launcher, which starts the very processes that are ranks, wins over a scheduler, whose
// variables everything inside a job or pod inherits. Anything else that is contradictory or incomplete is an error.
// Guessing would let two processes load the same part, or leave one out, without a word.
//
// The package reads variables through a function that the caller gives, most often [os.Getenv]. It has no other
// input.
package rank
