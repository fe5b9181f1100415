package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestHoldRanks holds the parts of two ranks in one process, on two devices and on one. Processes of torchrun get the
// part of their rank. All that is done with one rank's part works for each, and after kill -9 the next holder takes
// them over.
func TestHoldRanks(t *testing.T) {
	onDevices := func(t *testing.T, r *rig, devices int) {
		divided := []string{"--shard", "tensor", "--world", "2", "--shard-rule", "(ffn_down|attn_output)=replicate"}
		keeper, socket := r.keeper(t)
		holding := append(slices.Clip(divided), samplePath, "--rank", "0-1", "--ram", "64MiB", "--share", "fd", "--keep", socket)
		h := r.hold(t, append(slices.Clip(holding), "--verify", "--hash", filepath.Join(r.dir, "held-{rank}"),
			"--readback", filepath.Join(r.dir, "held-{rank}-of-{world}.safetensors"))...).isReady(t)
		for rank := range 2 {
			number := strconv.Itoa(rank)
			sums, out := filepath.Join(r.dir, "loaded-"+number), filepath.Join(r.dir, "loaded-"+number+".safetensors")
			p := r.command(t, "load")
			p.Args = append([]string{
				"gguf2gpu", "load", samplePath, "--rank", number, "--device", "soft", "--hash", sums, "--readback", out,
				"--progress", "none",
			}, divided...)
			p.run(t)
			p.exits(t, exitOK, "")
			wantSameFile(t, filepath.Join(r.dir, "held-"+number), sums)
			wantSameFile(t, filepath.Join(r.dir, "held-"+number+"-of-2.safetensors"), out)
			again := filepath.Join(r.dir, "attached-{rank}.safetensors")
			a := r.attachAs(t, rank, 2, "tiny-llama", "--verify", "--readback", again)
			if a.Model != "tiny-llama@"+number || a.Shard == nil || a.Shard.Rank != rank || !a.Verified || len(a.Devices) != 1 ||
				a.Device.Index != min(rank, devices-1) {
				t.Errorf("rank %d: %q, %+v, verified %t, on %+v", rank, a.Model, a.Shard, a.Verified, a.Devices)
			}
			wantSameFile(t, strings.ReplaceAll(again, "{rank}", number), out)
			if a = r.attach(t, "--rank", number); a.Shard == nil || a.Shard.Rank != rank {
				t.Errorf("--rank %d: %+v", rank, a.Shard)
			}
		}
		r.start(t, "attach").exits(t, exitFailed, `"tiny-llama" is held in parts, for rank 0 of 2, rank 1 of 2: say for which rank`)
		r.start(t, "attach", "--rank", "2").exits(t, exitFailed, "and not for rank 2")
		r.start(t, "attach", "--rank", "1", "--world", "4").exits(t, exitFailed, "and not for rank 1 of 4")
		p := r.start(t, "hold", "--list")
		p.exits(t, exitOK, "")
		for _, want := range []string{"RANK", "tiny-llama@0  0 of 2", "tiny-llama@1  1 of 2"} {
			if !strings.Contains(p.stdout.String(), want) {
				t.Errorf("no %q in:\n%s", want, p.stdout)
			}
		}
		r.list(t, "--sleep", "tiny-llama")
		for _, m := range r.list(t) {
			if m.State != "asleep" || m.Shard == nil || m.Shard.Model != "tiny-llama" {
				t.Errorf("%+v", m)
			}
		}
		if a := r.attachAs(t, 1, 2, "--verify"); !a.Verified {
			t.Error("what was woken by attaching is not verified")
		}
		r.list(t, "--wake", "tiny-llama")
		stay := r.stay(t, "--rank", "1")
		until(t, "both are kept", func() bool { return strings.Contains(keeper.stderr.String(), "models=2") })
		h.kill()
		h = r.hold(t, holding...).isReady(t)
		for _, m := range r.list(t) {
			if !m.Adopted || m.State != "resident" {
				t.Errorf("%+v", m)
			}
		}
		until(t, "who was attached comes back", func() bool { return r.list(t)[1].Attached == 1 })
		stay.ends(t, r)
		h.ends(t, r)
		keeper.ends(t, r)
	}
	for _, devices := range []int{1, 2} {
		t.Run(fmt.Sprint(devices), func(t *testing.T) {
			t.Parallel()
			onDevices(t, newRig(t, fmt.Sprintf("soft:%d", devices)), devices)
		})
	}
}

// attachAs is attach in a process that torchrun has started.
func (r *rig) attachAs(t *testing.T, rank, world int, args ...string) attachReport {
	t.Helper()
	p := r.command(t, "attach", append(args, "--json")...)
	p.Env = append(p.Env, "TORCHELASTIC_RUN_ID=none", fmt.Sprintf("RANK=%d", rank), fmt.Sprintf("WORLD_SIZE=%d", world),
		fmt.Sprintf("LOCAL_RANK=%d", rank), fmt.Sprintf("LOCAL_WORLD_SIZE=%d", world))
	p.run(t)
	p.exits(t, exitOK, "")
	return parse[attachReport](t, p)
}

func wantSameFile(t *testing.T, got, want string) {
	t.Helper()
	a, err := os.ReadFile(got)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(want)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) == 0 || string(a) != string(b) {
		t.Errorf("%s has %d bytes, which are not the %d of %s", got, len(a), len(b), want)
	}
}

// TestHoldRanksUsage refuses what makes no sense with several ranks, and leaves no socket.
func TestHoldRanksUsage(t *testing.T) {
	r := newRig(t, "soft")
	for args, want := range map[string]string{
		"--rank 0,1":                                "--shard layer or --shard tensor must say how to divide",
		"--shard layer --rank 0,1":                  "--rank is given without --world",
		"--shard layer --rank 0-2":                  "--rank is given without --world",
		"--shard layer --rank 1-0":                  "numbers from 0 on, and ranges such as 0-3",
		"--shard layer --rank 0,x":                  "numbers from 0 on, and ranges such as 0-3",
		"--shard layer --rank 0-1,1":                "rank 1 is named twice",
		"--shard layer --rank 0-99999":              "more than 1024 ranks",
		"--shard layer --rank 1,2,3":                "--rank is 3, but --world is 3",
		"--shard layer --rank 0,1 ":                 "--rank names 2 ranks, --device 3 devices",
		"--shard layer --rank 0,1 --split none":     "--split and --split-ratio are for one rank",
		"--shard layer --rank 0,1 --hash sums":      "--hash sums: each of several ranks has a file of its own",
		"--shard layer --rank 0,1 --hash blake3:-":  "--hash -: each of several ranks has a file of its own",
		"--shard layer --rank 0,1 --readback x":     "--readback x: each of several ranks has a file of its own",
		"--shard layer --rank 0,1 --trace t-{rank}": "--trace t-{rank}: this process holds the parts of several ranks",
	} {
		words := strings.Fields(args)
		if !strings.Contains(want, "without --world") && !strings.Contains(want, "must say how") {
			words = append(words, "--world", "3")
		}
		p := r.start(t, "hold", append(words, samplePath, "--device", "soft:3", "--progress", "none")...)
		p.exits(t, exitUsage, want)
		if _, err := os.Lstat(r.socket); err == nil {
			t.Errorf("%s: the socket is left", args)
		}
	}
	for _, args := range [][]string{{"load", samplePath}, {"verify", samplePath}, {"load", samplePath, "--plan"}} {
		p := r.command(t, args[0])
		p.Args = append(append([]string{"gguf2gpu"}, args...), "--shard", "layer", "--rank", "0,1", "--world", "2")
		p.run(t)
		p.exits(t, exitUsage, "--rank 0,1: this command has the part of one rank; hold can have those of several")
	}
	for args, want := range map[string]string{
		"--world 2": "--world is given without --rank", "--rank 2 --world 2": "--rank is 2, but --world is 2",
	} {
		r.start(t, "attach", strings.Fields(args)...).exits(t, exitUsage, want)
	}
}
