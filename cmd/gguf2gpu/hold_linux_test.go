package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestHoldAndAttach holds a model as every dtype, attaches from other processes, and compares.
func TestHoldAndAttach(t *testing.T) {
	onRigs(t, func(t *testing.T, r *rig) {
		for _, dtype := range []string{"raw", "f16"} {
			h := r.hold(t, samplePath, "--dtype", dtype, "--json", "--verify").isReady(t)
			held := parse[holdReport](t, h)
			if held.Socket != r.socket || held.PID != h.Process.Pid || held.Device.Kind != r.device || len(held.Models) != 1 ||
				held.Models[0].Name != "tiny-llama" || held.Models[0].State != "resident" {
				t.Errorf("%+v", held)
			}
			readback, want := filepath.Join(r.dir, "attached.safetensors"), filepath.Join(r.dir, "loaded.safetensors")
			a := r.attach(t, "--verify", "--readback", readback)
			load := r.command(t, "load", samplePath, "--device", r.device, "--dtype", dtype, "--readback", want, "--progress", "none")
			load.Args = slices.Delete(load.Args, 2, 4) // --socket
			load.run(t)
			load.exits(t, exitOK, "")
			got, err := os.ReadFile(readback)
			if err != nil {
				t.Fatal(err)
			}
			if want, err := os.ReadFile(want); err != nil || !bytes.Equal(got, want) {
				t.Errorf("what was read back differs from that of load, %v", err)
			}
			if a.Model != "tiny-llama" || a.Architecture != "llama" || a.DType != dtype || !a.Verified || a.Device.Kind != r.device ||
				len(a.Tensors) != held.Models[0].Tensors || a.DeviceBytes != held.Models[0].Bytes || len(a.Files) != 1 {
				t.Errorf("%+v", a)
			}
			if a.FreeBefore != a.FreeAfter || a.FreeAfter == 0 {
				t.Errorf("free were %d bytes, and then %d", a.FreeBefore, a.FreeAfter)
			}
			if s := a.Seconds; s.Open <= 0 || s.Connect <= 0 || s.Map <= 0 || s.Total < s.Open+s.Connect+s.Map {
				t.Errorf("%+v", s)
			}
			if x := a.Tensors[0]; x.Name == "" || x.Bytes == 0 || len(x.Shape) == 0 || !strings.HasPrefix(x.Ptr, "0x") {
				t.Errorf("%+v", x)
			}
			plain := r.start(t, "attach", "tiny-llama", "--verify")
			plain.exits(t, exitOK, "")
			if out := plain.stdout.String(); !strings.Contains(out, "token_embd.weight") || !strings.Contains(out, "attached in") ||
				!strings.Contains(out, "verified") {
				t.Errorf("attach prints\n%s", out)
			}
			h.ends(t, r)
			if _, err := os.Lstat(r.socket); err == nil {
				t.Error("the socket is left")
			}
		}
	})
}

// TestHoldSeveral holds two models and one more, lists and drops them.
func TestHoldSeveral(t *testing.T) {
	r := newRig(t, "soft")
	small := filepath.Join(r.dir, "small.gguf")
	synth := r.command(t, "synth", "-o", small, "--preset", "tiny", "--progress", "none")
	synth.Args = slices.Delete(synth.Args, 2, 4)
	synth.run(t)
	synth.exits(t, exitOK, "")
	h := r.hold(t, samplePath, small, "--soft-memory", "40MiB").isReady(t)
	if out := h.stdout.String(); !strings.Contains(out, "NAME") || !strings.Contains(out, "tiny-llama") || !strings.Contains(out, "resident") {
		t.Errorf("hold prints\n%s", out)
	}
	models := r.list(t, "--add", samplePath, "--name", "raw", "--dtype", "raw", "--tensors", "^blk", "--dtype-for", "norm=f32")
	if len(models) != 3 || models[0].Name != "raw" || models[0].Policy.String() != "raw" || models[1].Name != "small" {
		t.Fatalf("%+v", models)
	}
	for _, name := range []string{"raw", "tiny-llama", "small"} {
		if a := r.attach(t, name, "--verify"); a.Model != name || !a.Verified {
			t.Errorf("%+v", a)
		}
	}
	for _, args := range []string{"attach", "hold --drop", "hold --sleep", "hold --wake", "hold --pin", "hold --unpin"} {
		words := append(append([]string{"__complete"}, strings.Fields(args)...), "")
		out := runCommand(t, append(words[:2:2], append([]string{"--socket", r.socket}, words[2:]...)...)...)
		if !strings.HasPrefix(out, "raw\nsmall\ntiny-llama\n") {
			t.Errorf("a shell completes %s with\n%s", args, out)
		}
	}
	stay := r.stay(t, "raw")
	for args, want := range map[string]struct {
		code exitCode
		text string
	}{
		"attach":                            {exitFailed, "several models are held"},
		"attach none":                       {exitFailed, "no such model is held"},
		"attach small --file " + samplePath: {exitUsage, "--file is for --verify"},
		"hold --drop raw":                   {exitFailed, "in use by processes that are attached, 1 of them"},
		"hold --drop none":                  {exitFailed, "no such model is held"},
		"hold --add " + samplePath:          {exitFailed, "held already"},
		"hold --add holdproc_linux_test.go": {exitBadModel, "not a GGUF file"},
		"hold --add none.gguf":              {exitFailed, "no such file"},
		"hold --add " + samplePath + " --name x --dtype f32 --dtype-for .=f32 --tensors nothing": {exitFailed, "no tensor's name matches"},
		"hold " + samplePath:                         {exitFailed, "another process holds models"},
		"attach small --verify --file " + samplePath: {exitMismatch, "not the file that the model was loaded from"},
	} {
		f := strings.Fields(args)
		p := r.start(t, f[0], f[1:]...)
		p.exits(t, want.code, want.text)
	}
	r.list(t, "--pin", "small")
	for i := 0; ; i++ { // until the memory is full of what makes no room
		p := r.start(t, "hold", "--add", samplePath, "--name", fmt.Sprint("more ", i))
		<-p.ended
		if p.ProcessState.Success() && i < 20 {
			r.list(t, "--pin", fmt.Sprint("more ", i))
			continue
		}
		p.exits(t, exitNoMemory, "not enough device memory")
		break
	}
	stay.ends(t, r)
	until(t, "raw can be dropped", func() bool {
		p := r.start(t, "hold", "--drop", "raw")
		<-p.ended
		return p.ProcessState.Success()
	})
	for _, m := range r.list(t) {
		if m.Name == "raw" || m.Attached != 0 {
			t.Errorf("%+v", m)
		}
	}
	h.ends(t, r)
	r.start(t, "hold", "--list").exits(t, exitFailed, "nobody holds models there")
	r.start(t, "attach").exits(t, exitFailed, "nobody holds models there")
}

// TestAttachShard attaches to one rank's part: JSON and text say which part it is, and of each tensor which slice.
func TestAttachShard(t *testing.T) {
	r := newRig(t, "soft")
	h := r.hold(t, samplePath, "--shard", "tensor", "--rank", "1", "--world", "2", "--shard-rule", "(ffn_down|attn_output)=replicate").isReady(t)
	a := r.attach(t, "--verify")
	if a.Shard == nil || a.Shard.By != "tensor" || a.Shard.Rank != 1 || a.Shard.World != 2 || a.Shard.Slices == 0 || !a.Verified {
		t.Fatalf("shard %+v, verified %t", a.Shard, a.Verified)
	}
	slices := 0
	for _, x := range a.Tensors {
		s := x.Slice
		if s == nil {
			continue
		}
		slices++
		if s.Dim >= len(s.Shape) || s.Shape[s.Dim] != 2*x.Shape[s.Dim] || len(s.Ranges) != 1 ||
			s.Ranges[0] != [2]uint64{x.Shape[s.Dim], s.Shape[s.Dim]} {
			t.Errorf("%s of %d is slice %+v", x.Name, x.Shape, s)
		}
	}
	if slices != a.Shard.Slices {
		t.Errorf("%d slices, the report says %d", slices, a.Shard.Slices)
	}
	p := r.start(t, "attach")
	p.exits(t, exitOK, "")
	if want := fmt.Sprintf("rank 1 of 2, by tensor: %d of the tensors are slices\n", slices); !strings.Contains(p.stdout.String(), want) {
		t.Errorf("no %q in:\n%s", want, p.stdout)
	}
	h.ends(t, r)
}

// TestHoldUsage ends at once, and leaves no socket.
func TestHoldUsage(t *testing.T) {
	r := newRig(t, "soft")
	hash := filepath.Join(r.dir, "sums")
	for args, want := range map[string]struct {
		code exitCode
		text string
	}{
		"--add":                      {exitUsage, "--add takes one MODEL"},
		"--list x":                   {exitUsage, "takes no MODEL"},
		"--list --drop x":            {exitUsage, "exclude each other"},
		"--sync x":                   {exitUsage, "--sync is not for hold"},
		"--readback x a b":           {exitUsage, "for one MODEL"},
		"--name x a b":               {exitUsage, "for one MODEL"},
		"--hash x a b":               {exitUsage, "for one MODEL"},
		"--ready-fd 77 x":            {exitUsage, "--ready-fd 77"},
		"--metrics nonsense x":       {exitUsage, "--metrics"},
		"--device soft none.gguf":    {exitFailed, "no such file"},
		"--device soft main.go":      {exitBadModel, "main.go"},
		"--device hip " + samplePath: {exitNoDevice, "none.so"},
		"--device soft --soft-memory 1MiB " + samplePath:                               {exitNoMemory, "not enough device memory"},
		"--device soft --verify --hash " + hash + " --expect main.go " + samplePath:    {exitFailed, "line 1"},
		"--device soft --expect sha256:" + strings.Repeat("ab", 32) + " " + samplePath: {exitMismatch, "wrong digest"},
	} {
		p := r.command(t, "hold", append(strings.Fields(args), "--progress", "none")...)
		p.Env = append(p.Env, "GGUF2GPU_HIP_LIBRARY="+filepath.Join(r.dir, "none.so"))
		p.run(t)
		p.exits(t, want.code, want.text)
		if _, err := os.Lstat(r.socket); err == nil {
			t.Errorf("%s: the socket is left", args)
		}
	}
	readback, trace := filepath.Join(r.dir, "x.safetensors"), filepath.Join(r.dir, "trace.json")
	h := r.hold(t, samplePath, "--hash", hash, "--verify", "--readback", readback, "--trace", trace).isReady(t)
	again := filepath.Join(r.dir, "y.safetensors")
	r.attach(t, "--readback", again)
	h.ends(t, r)
	held, err := os.ReadFile(readback)
	if attached, err2 := os.ReadFile(again); err != nil || err2 != nil || !bytes.Equal(held, attached) {
		t.Errorf("what hold reads back differs from what attach does: %v, %v", err, err2)
	}
	if b, err := os.ReadFile(trace); err != nil || !bytes.Contains(b, []byte("traceEvents")) {
		t.Errorf("the trace: %v, %.100s", err, b)
	}
	r.hold(t, samplePath, "--expect", hash).isReady(t).ends(t, r)
	blake3 := filepath.Join(r.dir, "blake3")
	r.hold(t, samplePath, "--hash", "blake3:"+blake3).isReady(t).ends(t, r)
	r.hold(t, samplePath, "--expect", blake3).isReady(t).ends(t, r)
	// The digest of the file is of this model alone.
	b, err := os.ReadFile(samplePath)
	if err != nil {
		t.Fatal(err)
	}
	h = r.hold(t, samplePath, "--expect", fmt.Sprintf("sha256:%x", sha256.Sum256(b))).isReady(t)
	r.attach(t, "--verify")
	if m := r.list(t, "--add", filepath.Join("..", "..", "testdata", "gguf", "all-types.gguf"), "--dtype", "raw"); len(m) != 2 {
		t.Errorf("%+v", m)
	}
	h.ends(t, r)
	r.start(t, "attach", "--file", "x").exits(t, exitUsage, "--file is for --verify")
}

// TestHoldWhileLoading attaches while the link is so slow that the load takes seconds.
func TestHoldWhileLoading(t *testing.T) {
	r := newRig(t, "soft")
	h := r.hold(t, samplePath, "--dtype", "raw", "--soft-link", "200KB/s", "--chunk", "64KiB", "--staging", "128KiB")
	until(t, "it listens", func() bool { _, err := os.Lstat(r.socket); return err == nil })
	until(t, "it loads", func() bool { return len(r.list(t)) == 1 })
	r.attach(t)
	stay := r.stay(t)
	if m := r.list(t)[0]; m.State != "loading" || m.Attached != 1 {
		t.Errorf("%+v", m)
	}
	if err := h.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := stay.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	stay.exits(t, exitOK, "")
	h.exits(t, exitOK, "") // who supervises it has to tell that from a crash

	h = r.hold(t, samplePath, "--dtype", "raw", "--soft-link", "4MB/s", "--chunk", "64KiB", "--staging", "128KiB")
	until(t, "it listens", func() bool { _, err := os.Lstat(r.socket); return err == nil })
	until(t, "it loads", func() bool { return len(r.list(t)) == 1 })
	if a := r.attach(t, "--verify"); !a.Verified {
		t.Errorf("%+v", a)
	}
	h.isReady(t).ends(t, r)
}

// TestHoldForSystemd lets hold be started as systemd does: with a socket, and with another to tell its state to.
func TestHoldForSystemd(t *testing.T) {
	r := newRig(t, "soft")
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(r.dir, "n"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	said := func() string {
		b := make([]byte, 4096)
		if err := notify.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		n, err := notify.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	listening, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()

	p := r.command(t, "hold", samplePath, "--device", "soft", "--progress", "none")
	command := filepath.Join(r.dir, "gguf2gpu") // what it is called decides what the test's binary does
	if err := os.Symlink(p.Path, command); err != nil {
		t.Fatal(err)
	}
	p.Args = append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, command, "hold"}, p.Args[4:]...)
	p.Path = "/bin/sh"
	p.Env = append(p.Env, "LISTEN_FDS=1", "NOTIFY_SOCKET="+notify.LocalAddr().String())
	p.ExtraFiles = []*os.File{listening}
	p.run(t)
	if got := said(); !strings.HasPrefix(got, "READY=1\nSTATUS=holding 1 models, ") {
		t.Errorf("systemd is told %q", got)
	}
	if a := r.attach(t, "--verify"); !a.Verified {
		t.Errorf("%+v", a)
	}
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := said(); got != "STOPPING=1" {
		t.Errorf("systemd is told %q", got)
	}
	p.exits(t, exitOK, "")
	if _, err := os.Lstat(r.socket); err != nil {
		t.Errorf("systemd's socket is gone: %v", err)
	}
}

func TestHoldMetrics(t *testing.T) {
	r := newRig(t, "soft")
	h := r.hold(t, samplePath, "--metrics", ":0").isReady(t)
	m := regexp.MustCompile(`msg=metrics address=(127\.0\.0\.1:[0-9]+)`).FindStringSubmatch(h.stderr.String())
	if m == nil {
		t.Fatal("the address is not told, or not loopback")
	}
	get := func(path string) (int, string, string) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+m[1]+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, resp.Header.Get("Content-Type"), string(b)
	}
	stay := r.stay(t)
	code, kind, text := get("/metrics")
	if code != http.StatusOK || kind != "text/plain; version=0.0.4; charset=utf-8" {
		t.Errorf("%d, %s", code, kind)
	}
	for _, want := range []string{
		"gguf2gpu_models 1\n", `gguf2gpu_model_attached{model="tiny-llama",dtype="f16"} 1` + "\n", "gguf2gpu_model_load_seconds{",
		"gguf2gpu_model_link_efficiency{", "gguf2gpu_model_device_bytes{", "gguf2gpu_attachments_total 1\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	if code, _, _ := get("/"); code != http.StatusNotFound {
		t.Errorf("/ gives %d", code)
	}
	stay.ends(t, r)
	h.ends(t, r)
}
