package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
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

// TestHoldFetchesOnce counts what a server sends: with --ram, too, it is the file once, and what opening it takes.
func TestHoldFetchesOnce(t *testing.T) {
	r := newRig(t, "soft")
	path := filepath.Join(r.dir, "small.gguf")
	synth := r.command(t, "synth")
	synth.Args = []string{"gguf2gpu", "synth", "-o", path, "--preset", "small", "--progress", "none"}
	synth.run(t)
	synth.exits(t, exitOK, "")
	var sent atomic.Int64
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"one"`)
		http.ServeContent(countingWriter{w, &sent}, r, "small.gguf", time.Unix(1, 0), bytes.NewReader(b))
	}))
	defer server.Close()
	h := r.hold(t, server.URL+"/small.gguf", "--ram", "200MiB", "--dtype", "raw").isReady(t)
	until(t, "it is in page-locked memory", func() bool { return r.list(t)[0].Tiers.RAM > 0 })
	once := sent.Load()
	if ratio := float64(once) / float64(len(b)); ratio < 0.99 || ratio > 1.2 {
		t.Errorf("%d bytes were sent of a file of %d: %.2f times", once, len(b), ratio)
	}
	r.list(t, "--sleep", "small")
	r.list(t, "--wake", "small")
	if n := sent.Load(); n != once {
		t.Errorf("waking brought %d bytes", n-once)
	}
	if a := r.attach(t, "--verify", "--file", path); !a.Verified {
		t.Errorf("%+v", a)
	}
	h.ends(t, r)
}

// countingWriter counts the bytes of bodies.
type countingWriter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (w countingWriter) Write(b []byte) (int, error) {
	n, err := w.ResponseWriter.Write(b)
	w.n.Add(int64(n))
	return n, err
}
