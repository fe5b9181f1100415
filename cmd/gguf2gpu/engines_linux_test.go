package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

const ranksOfTest = 4

// TestRanksUnderEngines starts the command as four ranks, as users do: by Open MPI's mpirun, by MPICH's mpiexec, by a
// Slurm of this host, with and without its PMI, and by mpirun in a Slurm batch script, where both engines have set
// their variables. What the ranks have on their devices is the whole model bit for bit, and each read no more than its
// share and the header.
func TestRanksUnderEngines(t *testing.T) {
	model := filepath.Join(t.TempDir(), "model.gguf")
	command(t, cleanEnv(), "gguf2gpu", "synth", "-o", model, "--preset", "small", "--progress", "none")
	shards := func(t *testing.T, start func(t *testing.T, script string)) {
		t.Run("layer", func(t *testing.T) { loadShards(t, start, model, "layer") })
		t.Run("tensor", func(t *testing.T) { loadShards(t, start, model, "tensor") })
	}
	t.Run("mpi", func(t *testing.T) {
		args := mpirunCommand(t)
		shards(t, func(t *testing.T, script string) { launch(t, append(args, "sh", "-c", script)) })
	})
	t.Run("pmi", func(t *testing.T) {
		needEngine(t, "pmi", "mpiexec.hydra")
		args := []string{"mpiexec.hydra", "-n", strconv.Itoa(ranksOfTest)}
		shards(t, func(t *testing.T, script string) { launch(t, append(args, "sh", "-c", script)) })
	})
	t.Run("slurm", func(t *testing.T) {
		s := startSlurm(t)
		for _, mpi := range []string{"none", "pmi2"} {
			t.Run(mpi, func(t *testing.T) {
				shards(t, func(t *testing.T, script string) { s.srun(t, "--mpi="+mpi, "sh", "-c", script) })
			})
		}
		t.Run("mpi in a batch script", func(t *testing.T) {
			args := mpirunCommand(t)
			loadShards(t, func(t *testing.T, script string) {
				if code, out := s.sbatch(t, append(args, "sh", "-c", script)...); code != exitOK {
					t.Fatalf("exit code %d:\n%s", code, out)
				}
			}, model, "layer")
		})
		t.Run("nothing in a batch script", func(t *testing.T) {
			// Slurm says there that this is task 0 of all.
			code, out := s.sbatch(t, "gguf2gpu", "load", model, "--shard", "layer", "--device", "soft")
			if code != exitUsage || !strings.Contains(out, "start it with srun") {
				t.Errorf("exit code %d, want %d and how to start it:\n%s", code, exitUsage, out)
			}
		})
	})
}

// loadShards lets start run a shell script once per rank, which loads the rank's shard of model, and looks at what came
// of it.
func loadShards(t *testing.T, start func(t *testing.T, script string), model, by string) {
	dir := t.TempDir()
	reading := "auto"
	if by == "layer" {
		reading = "direct" // the kernel counts what is read so, but not what is mapped
	}
	start(t, fmt.Sprintf(`gguf2gpu load '%s' --shard %s --io %s --device soft --dtype raw --readback '%s/{rank}-of-{world}' `+
		`--progress none --json >'%[4]s/'$$.json && cat /proc/$$/io >'%[4]s/'$$.json.io`, model, by, reading, dir))
	reports, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil || len(reports) != ranksOfTest {
		t.Fatalf("reports %q, %v; want one of each of %d ranks", reports, err, ranksOfTest)
	}
	whole, err := gguf.Open(model)
	if err != nil {
		t.Fatal(err)
	}
	defer whole.Close()
	var parts [ranksOfTest]map[string][]byte
	var have [ranksOfTest]uint64 // bytes
	for i := range parts {
		parts[i] = readShard(t, filepath.Join(dir, fmt.Sprintf("%d-of-%d", i, ranksOfTest)))
		for _, data := range parts[i] {
			have[i] += uint64(len(data))
		}
	}
	for i := range whole.Tensors() {
		x := &whole.Tensors()[i]
		var of [][]byte
		for _, part := range parts {
			if data, ok := part[x.Name]; ok {
				of = append(of, data)
				delete(part, x.Name)
			}
		}
		checkPutTogether(t, x, whole.Data(x), of, by)
	}
	for i, part := range parts {
		for name := range part {
			t.Errorf("rank %d has %q, which the model has not", i, name)
		}
	}
	checkReads(t, reports, have, uint64(whole.Parts()[0].DataOffset))
}

// checkPutTogether compares what the ranks have of tensor x, in their order, with the file.
func checkPutTogether(t *testing.T, x *gguf.Tensor, want []byte, of [][]byte, by string) {
	t.Helper()
	if by == "layer" {
		if len(of) != 1 || !bytes.Equal(of[0], want) {
			t.Errorf("%s: %d ranks have it, or its bytes differ; want one rank to have it as it is in the file", x.Name, len(of))
		}
		return
	}
	if len(of) != ranksOfTest {
		t.Errorf("%s: %d ranks have a slice, want %d", x.Name, len(of), ranksOfTest)
		return
	}
	var got []byte
	switch {
	case strings.Contains(x.Name, "_norm"):
		for i, data := range of {
			if !bytes.Equal(data, want) {
				t.Errorf("%s: rank %d has other bytes than the file; want a full copy", x.Name, i)
			}
		}
		return
	case strings.Contains(x.Name, "attn_output"), strings.Contains(x.Name, "ffn_down"): // columns: a piece of each row
		rows := int(x.Shape[1])
		for row := range rows {
			for _, data := range of {
				n := len(data) / rows
				got = append(got, data[row*n:][:n]...)
			}
		}
	default:
		got = bytes.Join(of, nil)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: the slices of all ranks, put together, are not the tensor", x.Name)
	}
	for i, data := range of { // nobody has it all
		if len(data) == 0 || len(data) >= len(want)/2 {
			t.Errorf("%s: rank %d has %d bytes of %d", x.Name, i, len(data), len(want))
		}
	}
}

// checkReads compares what each rank says that it has read with what it has. Raw tensors are as large on the device as
// in the file.
func checkReads(t *testing.T, reports []string, have [ranksOfTest]uint64, header uint64) {
	t.Helper()
	var seen [ranksOfTest]bool
	for _, path := range reports {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var r struct {
			ReadBytes   uint64 `json:"read_bytes"`
			DeviceBytes uint64 `json:"device_bytes"`
			Shard       struct {
				Rank  int `json:"rank"`
				World int `json:"world"`
			} `json:"shard"`
		}
		if err := json.Unmarshal(text, &r); err != nil {
			t.Fatalf("%v in %q", err, text)
		}
		if r.Shard.World != ranksOfTest || r.Shard.Rank < 0 || r.Shard.Rank >= ranksOfTest || seen[r.Shard.Rank] {
			t.Fatalf("a report of rank %d of %d, want one of each of %d", r.Shard.Rank, r.Shard.World, ranksOfTest)
		}
		seen[r.Shard.Rank] = true
		share := have[r.Shard.Rank]
		if share == 0 || r.ReadBytes < share || r.ReadBytes > share+header {
			t.Errorf("rank %d read %d bytes; its share is %d, and the header %d", r.Shard.Rank, r.ReadBytes, share, header)
		}
		counted := countedReads(t, path+".io")
		// More than the model's bytes is what any start of a program reads, and the rest of the pages at both ends.
		if counted > share+header+256<<10 {
			t.Errorf("the kernel has counted reads of %d bytes of rank %d, whose share is %d", counted, r.Shard.Rank, share)
		}
		t.Logf("rank %d: share %d bytes, read %d, counted by the kernel %d", r.Shard.Rank, share, r.ReadBytes, counted)
	}
}

// countedReads is how many bytes a process and its children have read, by a copy of its file io in /proc.
func countedReads(t *testing.T, path string) (n uint64) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(string(text), "rchar: %d", &n); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
	return n
}

// readShard returns the tensors of a safetensors file.
func readShard(t *testing.T, path string) map[string][]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n := binary.LittleEndian.Uint64(b)
	header, data := b[8:8+n], b[8+n:]
	var entries map[string]struct {
		Offsets []int `json:"data_offsets"`
	}
	if err := json.Unmarshal(header, &entries); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	tensors := make(map[string][]byte)
	for name, e := range entries {
		if name != "__metadata__" {
			tensors[name] = data[e.Offsets[0]:e.Offsets[1]]
		}
	}
	return tensors
}

// mpirunCommand is the beginning of a command line that runs what follows as ranks on this host, by Open MPI.
func mpirunCommand(t *testing.T) []string {
	t.Helper()
	needEngine(t, "mpi", "mpirun")
	if out, err := commandOutput(t, cleanEnv(), "mpirun", "--version"); err != nil || !bytes.Contains(out, []byte("Open MPI")) {
		lackEngine(t, "mpi", fmt.Sprintf("mpirun is not that of Open MPI: %q", out))
	}
	return []string{"mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", strconv.Itoa(ranksOfTest)}
}

// launch runs a launcher of ranks.
func launch(t *testing.T, args []string) {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() { killAllOf(t, dir) })
	command(t, append(cleanEnv(), launcherEnv(dir)...), args[0], args[1:]...)
}

// launcherEnv keeps a launcher's files in dir and, as far as that can be told, its sockets on the loopback interface.
func launcherEnv(dir string) []string {
	return []string{"TMPDIR=" + dir, "OMPI_MCA_plm=isolated", "OMPI_MCA_oob_tcp_if_include=lo", "HYDRA_IFACE=lo"}
}
