package main

import (
	"bytes"
	"io"
	"os"
	"slices"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/loader/hold"
)

// TestHoldStream holds what comes by a pipe. It cannot be loaded again, so it sleeps in host memory, and stays where it
// is if there is none of that.
func TestHoldStream(t *testing.T) {
	t.Parallel()
	model, err := os.ReadFile(samplePath)
	if err != nil {
		t.Fatal(err)
	}
	// holds starts a holder whose standard input is a pipe with the model.
	holds := func(t *testing.T, r *rig, args ...string) *process {
		t.Helper()
		p := r.holding(t, append([]string{"-", "--name", "m"}, args...)...)
		p.Stdin = io.MultiReader(bytes.NewReader(model)) // no file, so that it comes by a pipe
		p.run(t)
		return p.isReady(t)
	}
	t.Run("with host memory", func(t *testing.T) {
		t.Parallel()
		r := newRig(t, "soft")
		h := holds(t, r, "--ram", "16MiB")
		for _, order := range []struct{ flag, state string }{{"--sleep", "asleep"}, {"--wake", "resident"}, {"--sleep", "asleep"}} {
			if all := r.list(t, order.flag, "m"); len(all) != 1 || all[0].State != order.state || all[0].Tiers.RAM == 0 {
				t.Errorf("%s: %+v", order.flag, all)
			}
		}
		a := r.attach(t, "m", "--verify", "--file", samplePath) // which wakes it
		want := hold.FileIdentity{
			Path: "-", Name: "-", Size: int64(len(model)), HeaderSHA256: a.Files[0].HeaderSHA256, Once: true,
		}
		if !a.Verified || !slices.Equal(a.Files, []hold.FileIdentity{want}) {
			t.Errorf("%+v", a.Files)
		}
		r.start(t, "attach", "m", "--verify").exits(t, exitUsage, "m came as a stream: --file says what to compare it with")
		r.start(t, "hold", "--add", "-", "--name", "x").exits(t, exitUsage, "the process that holds models has another one")
		h.ends(t, r)
	})
	t.Run("without", func(t *testing.T) {
		t.Parallel()
		r := newRig(t, "soft")
		h := holds(t, r, "--vram", "10MB")
		r.start(t, "hold", "--sleep", "m").exits(t, exitFailed, "it came as a stream, and could not be loaded again")
		r.start(t, "hold", "--add", samplePath, "--name", "other").exits(t, exitNoMemory, "(from a stream)")
		if a := r.attach(t, "m", "--verify", "--file", samplePath); !a.Verified {
			t.Errorf("%+v", a)
		}
		h.ends(t, r)
	})
	r := newRig(t, "soft")
	for says, args := range map[string][]string{
		"- needs --name":               {"-"},
		"read MODEL a second time":     {"-", "--name", "m", "--verify"},
		"each part of several ranks":   {"-", "--name", "m", "--shard", "layer", "--rank", "0-1", "--world", "2"},
		"it is empty":                  {"-", "--name", "m"},
		"fd:99: there is no such desc": {"fd:99", "--name", "m"},
	} {
		code := exitUsage
		if says == "it is empty" {
			code = exitBadModel
		}
		r.start(t, "hold", append(args, "--device", "soft", "--progress", "none")...).exits(t, code, says)
	}
}

// TestHoldDescriptor holds a file by its descriptor: it is loaded again from there, and others find it by its path.
func TestHoldDescriptor(t *testing.T) {
	t.Parallel()
	r := newRig(t, "soft")
	h := r.holding(t, "fd:4", "--name", "m")
	f, err := os.Open(samplePath)
	if err != nil {
		t.Fatal(err)
	}
	h.ExtraFiles = append(h.ExtraFiles, f) // behind that of --ready-fd
	h.run(t)
	h.isReady(t)
	for _, order := range []struct{ flag, state string }{{"--sleep", "stored"}, {"--wake", "resident"}} {
		if all := r.list(t, order.flag, "m"); len(all) != 1 || all[0].State != order.state {
			t.Errorf("%s: %+v", order.flag, all)
		}
	}
	if a := r.attach(t, "m", "--verify"); !a.Verified {
		t.Errorf("%+v", a)
	}
	h.ends(t, r)
}
