package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestHoldFromElsewhere holds models of a hub, a registry, a bucket and a server. Whoever attaches compares them with
// where they are from, by their identity. One with a wrong digest is not held.
func TestHoldFromElsewhere(t *testing.T) {
	env := map[string]string{}
	for _, v := range startHubs(t, samplePath) {
		t.Setenv(v[0], v[1])
		env[v[0]] = v[1]
	}
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	r := newRig(t, "soft")
	h := r.hold(t, "hf:org/tiny:Q4_K_M", "oci://"+env["REGISTRY"]+"/library/tiny", "s3://models/m/other-Q8_0.gguf",
		"--verify").isReady(t)
	for name, want := range map[string]struct{ model, digest string }{
		"tiny:Q4_K_M": {"hf:org/tiny:Q4_K_M", "sha256:"}, "tiny": {"oci://", "sha256:"},
	} {
		a := r.attach(t, name, "--verify")
		if len(a.Files) != 1 || !strings.HasPrefix(a.Files[0].Name, want.model) || a.Files[0].Source == nil || !a.Verified ||
			!strings.HasPrefix(a.Files[0].Source.Digest, want.digest) || a.Files[0].Source.Revision == "" {
			t.Errorf("%s: %+v", name, a.Files)
		}
	}
	if m := r.list(t, "--add", "ollama:"+env["REGISTRY"]+"/library/tiny", "--name", "added"); len(m) != 4 {
		t.Errorf("%+v", m)
	}
	// What it was loaded from may be compared with a copy, and with nothing else.
	if a := r.attach(t, "added", "--verify", "--file", samplePath); !a.Verified {
		t.Errorf("%+v", a)
	}
	r.start(t, "attach", "added", "--verify", "--file", "hf:org/tiny:Q2_K").exits(t, exitMismatch, "not the file that the model was loaded from")
	r.start(t, "hold", "--add", "ollama:"+env["REGISTRY"]+"/library/none").exits(t, exitFailed, "no such model")
	r.start(t, "hold", "--add", "-", "--name", "x").exits(t, exitUsage, "hold takes no stream")
	h.ends(t, r)
	b, err := os.ReadFile(samplePath)
	if err != nil {
		t.Fatal(err)
	}
	right := fmt.Sprintf("sha256:%x", sha256.Sum256(b))
	h = r.hold(t, "hf:org/tiny:Q4_K_M", "--expect", right).isReady(t)
	r.list(t, "--add", "s3://models/m/other-Q8_0.gguf")
	h.ends(t, r)
	wrong := "sha256:" + strings.Repeat("ab", 32)
	r.start(t, "hold", "s3://models/m/other-Q8_0.gguf", "--expect", wrong, "--device", "soft", "--progress", "none").exits(
		t, exitMismatch, "wrong digest")
	r.start(t, "hold", "ollama:"+env["REGISTRY"]+"/library/liar", "--device", "soft", "--progress", "none").exits(t, exitMismatch, "wrong digest")
}
