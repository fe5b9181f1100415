package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gguf2gpu/gguf2gpu/loader/hold"
)

// keeper starts 'hold --keeper', and returns its socket.
func (r *rig) keeper(t *testing.T) (p *process, socket string) {
	t.Helper()
	other := *r
	other.socket = filepath.Join(r.dir, "keeper")
	p = other.command(t, "hold", "--keeper", "--ready-fd", "3")
	ready, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.ready, p.ExtraFiles = ready, []*os.File{write}
	p.run(t)
	return p.isReady(t), other.socket
}

// TestTiersByCommand puts a model to sleep, wakes it, pins it and unpins it, and attaches to it asleep.
func TestTiersByCommand(t *testing.T) {
	onRigs(t, func(t *testing.T, r *rig) {
		h := r.hold(t, samplePath, "--ram", "64MiB", "--dtype", "raw", "--share", "fd").isReady(t)
		until(t, "it is in host memory, too", func() bool { return r.list(t)[0].Tiers.RAM > 0 })
		at := r.attach(t).Tensors[0].Ptr
		if m := r.list(t, "--sleep", "tiny-llama")[0]; m.State != "asleep" || m.Tiers.VRAM != 0 || m.Tiers.RAM == 0 {
			t.Errorf("%+v", m)
		}
		if m := r.list(t, "--wake", "tiny-llama")[0]; m.State != "resident" || m.Wakes != 1 || m.Tiers.VRAM == 0 {
			t.Errorf("%+v", m)
		}
		if m := r.list(t, "--pin", "tiny-llama")[0]; !m.Pinned {
			t.Errorf("%+v", m)
		}
		r.start(t, "hold", "--sleep", "tiny-llama").exits(t, exitFailed, "pinned")
		r.list(t, "--unpin", "tiny-llama")
		r.list(t, "--sleep", "tiny-llama")
		if a := r.attach(t, "--verify"); !a.Verified || a.Share != "fd" || a.Tensors[0].Ptr != at {
			t.Errorf("%s at %s, before at %s", a.Share, a.Tensors[0].Ptr, at)
		}
		r.start(t, "hold", "--wake", "none").exits(t, exitFailed, "no such model")
		r.start(t, "hold", "--wake", "a", "--sleep", "b").exits(t, exitUsage, "exclude each other")
		h.ends(t, r)
	})
}

// TestHolderKilledWithKeeper kills the holder under three attached processes, again and again: they go on, another one
// adopts the model, they attach to that, and all bytes are right.
func TestHolderKilledWithKeeper(t *testing.T) {
	onRigs(t, func(t *testing.T, r *rig) {
		keeper, socket := r.keeper(t)
		args := []string{samplePath, "--keep", socket, "--share", "fd"}
		h := r.hold(t, args...).isReady(t)
		until(t, "it is kept", func() bool { return strings.Contains(keeper.stderr.String(), "keeping id=") })
		var all []*process
		for range 3 {
			all = append(all, r.stay(t))
		}
		r.wantAttached(t, 3)
		for i := range 4 {
			if i == 2 { // one that is stopped meanwhile comes later
				if err := all[0].Process.Signal(syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
			}
			h.kill()
			h = r.hold(t, args...).isReady(t)
			if !strings.Contains(h.stderr.String(), "taken over") {
				t.Errorf("round %d: the model was not adopted:\n%s", i, h.stderr)
			}
			if i == 2 {
				if err := all[0].Process.Signal(syscall.SIGCONT); err != nil {
					t.Fatal(err)
				}
			}
			r.wantAttached(t, 3)
			if m := r.list(t)[0]; !m.Adopted || m.State != "resident" {
				t.Errorf("%+v", m)
			}
			if a := r.attach(t, "--verify"); !a.Verified {
				t.Errorf("round %d: %+v", i, a)
			}
		}
		for _, p := range all {
			p.ends(t, r)
		}
		r.wantAttached(t, 0)
		h.ends(t, r) // the keeper goes on
		h = r.hold(t, args...).isReady(t)
		if m := r.list(t, "--drop", "tiny-llama"); len(m) != 0 {
			t.Errorf("%+v", m)
		}
		until(t, "it is given up", func() bool { return strings.Contains(keeper.stderr.String(), "gave up") })
		h.ends(t, r)
		keeper.ends(t, newRig(t, "soft"))
	})
}

// TestHolderKilledWithoutKeeper: attached processes have the memory, and go on with it until they end.
func TestHolderKilledWithoutKeeper(t *testing.T) {
	onRigs(t, func(t *testing.T, r *rig) {
		h := r.hold(t, samplePath, "--share", "fd").isReady(t)
		memory := sharedMemory(t, fmt.Sprint(h.Process.Pid))
		stay := r.stay(t)
		h.kill()
		h = r.hold(t, samplePath, "--share", "fd").isReady(t)
		if theirs := sharedMemory(t, fmt.Sprint(stay.Process.Pid)); len(theirs) == 0 {
			t.Error("the attached process has no memory any more")
		}
		if a := r.attach(t, "--verify"); !a.Verified {
			t.Errorf("%+v", a)
		}
		stay.ends(t, r)
		wantNobodyHas(t, memory)
		h.ends(t, r)
	})
}

// TestSignals: SIGHUP ends a holder in good order, and attached processes are told.
func TestSignals(t *testing.T) {
	if signal.Ignored(syscall.SIGHUP) {
		t.Skip("the tests run with SIGHUP ignored, as under nohup, and a holder leaves it so")
	}
	for _, share := range []string{"fd", "ipc"} {
		r := newRig(t, "soft")
		h := r.hold(t, samplePath, "--share", share).isReady(t)
		stay := r.stay(t)
		if err := h.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		until(t, "the attached process is told", func() bool { return strings.Contains(stay.stderr.String(), "the holder is ending") })
		if share == "fd" {
			h.exits(t, exitOK, "")
			stay.ends(t, r)
			continue
		}
		stay.ends(t, r)
		h.exits(t, exitOK, "")
	}
}

// TestStoppedHolder: who waits for a holder that is stopped is told so.
func TestStoppedHolder(t *testing.T) {
	r := newRig(t, "soft")
	h := r.hold(t, samplePath).isReady(t)
	if err := h.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	p := r.start(t, "attach")
	want := fmt.Sprintf("waiting for the holder, process %d, which is stopped", h.Process.Pid)
	until(t, "it says for whom it waits", func() bool { return strings.Contains(p.stderr.String(), want) })
	if err := h.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	p.exits(t, exitOK, "")
	h.ends(t, r)
}

// TestStoppedKeeper: a keeper that is stopped does not hold up a model that goes to sleep. It is said for whom the
// memory waits, and all is well when the keeper goes on.
func TestStoppedKeeper(t *testing.T) {
	r := newRig(t, "soft")
	keeper, socket := r.keeper(t)
	h := r.hold(t, samplePath, "--share", "fd", "--keep", socket).isReady(t)
	until(t, "it is kept", func() bool { return strings.Contains(keeper.stderr.String(), "keeping id=") })
	if err := keeper.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if m := r.list(t, "--sleep", "tiny-llama"); m[0].State != "stored" || m[0].Tiers.VRAM != 0 {
		t.Errorf("%+v", m)
	}
	want := fmt.Sprintf("the keeper, process %d, which is stopped", keeper.Process.Pid)
	if !strings.Contains(h.stderr.String(), want) {
		t.Errorf("no %q in %s", want, h.stderr)
	}
	if strings.Contains(keeper.stderr.String(), "gave up") {
		t.Error("the keeper was not stopped")
	}
	if err := keeper.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	until(t, "it is given up", func() bool { return strings.Contains(keeper.stderr.String(), "gave up") })
	if a := r.attach(t, "--verify"); !a.Verified {
		t.Errorf("%+v", a)
	}
	h.ends(t, r)
	keeper.ends(t, r)
}

// TestHealth asks a holder whether it is ready.
func TestHealth(t *testing.T) {
	r := newRig(t, "soft")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	h := r.hold(t, samplePath, "--metrics", addr, "--ram", "64MiB").isReady(t)
	status := func(path string) (int, string) {
		answer, err := http.Get("http://" + addr + path)
		if err != nil {
			return 0, ""
		}
		defer answer.Body.Close()
		b, _ := io.ReadAll(answer.Body)
		return answer.StatusCode, string(b)
	}
	until(t, "it is healthy", func() bool { code, _ := status("/healthz"); return code == http.StatusOK })
	r.list(t, "--sleep", "tiny-llama")
	r.list(t, "--wake", "tiny-llama")
	_, text := status("/metrics")
	for _, want := range []string{"gguf2gpu_wakes_total 1\n", "gguf2gpu_build_info{", `gguf2gpu_model_tier_bytes{model="tiny-llama",tier="vram"}`} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	h.ends(t, r)
}

// systemd stands for the service manager: it has a socket for notifications and a store of descriptors.
type systemd struct {
	conn  *net.UnixConn
	path  string
	store map[string]*os.File
}

// newSystemd begins to listen.
func newSystemd(t *testing.T, r *rig) *systemd {
	t.Helper()
	s := &systemd{path: filepath.Join(r.dir, "notify"), store: make(map[string]*os.File)}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: s.path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	s.conn = conn
	t.Cleanup(func() { conn.Close() })
	return s
}

// hear takes messages until one has that text.
func (s *systemd) hear(t *testing.T, text string) {
	t.Helper()
	for {
		b, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
		if err := s.conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		n, c, _, _, err := s.conn.ReadMsgUnix(b, oob)
		if err != nil {
			t.Fatal(err)
		}
		fields := make(map[string]string)
		for line := range strings.SplitSeq(string(b[:n]), "\n") {
			key, value, _ := strings.Cut(line, "=")
			fields[key] = value
		}
		if messages, err := unix.ParseSocketControlMessage(oob[:c]); err == nil && len(messages) == 1 {
			fds, err := unix.ParseUnixRights(&messages[0])
			if err != nil {
				t.Fatal(err)
			}
			s.store[fields["FDNAME"]] = os.NewFile(uintptr(fds[0]), fields["FDNAME"])
		}
		if fields["FDSTOREREMOVE"] == "1" && s.store[fields["FDNAME"]] != nil {
			s.store[fields["FDNAME"]].Close()
			delete(s.store, fields["FDNAME"])
		}
		if strings.Contains(string(b[:n]), text) {
			return
		}
	}
}

// hold starts a holder as systemd would, with what is in the store.
func (s *systemd) hold(t *testing.T, r *rig) *process {
	t.Helper()
	var names []string
	var files []*os.File
	for name, f := range s.store {
		dup, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		names, files = append(names, name), append(files, os.NewFile(uintptr(dup), name))
	}
	p := r.command(t, "hold", samplePath, "--device", r.device, "--progress", "none", "--share", "fd")
	p.ExtraFiles = files
	p.Env = append(p.Env, "NOTIFY_SOCKET="+s.path, "FDSTORE=16")
	// systemd knows the number of the process before it runs; a shell does, too.
	command := filepath.Join(r.dir, "gguf2gpu") // what it is called decides what the test's binary does
	if err := os.Symlink(p.Path, command); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	p.Args = append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, command}, p.Args[1:]...)
	p.Path = "/bin/sh"
	p.Env = append(p.Env, fmt.Sprintf("LISTEN_FDS=%d", len(files)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	p.run(t)
	return p
}

// TestSystemdStore kills a holder whose models systemd keeps: the next one adopts them, and what sleeps is given up.
func TestSystemdStore(t *testing.T) {
	r := newRig(t, "soft")
	s := newSystemd(t, r)
	h := s.hold(t, r)
	s.hear(t, "READY=1")
	for len(s.store) < 2 {
		s.hear(t, "FDSTORE=1")
	}
	h.kill()
	h = s.hold(t, r)
	s.hear(t, "READY=1")
	if m := r.list(t)[0]; !m.Adopted {
		t.Errorf("%+v", m)
	}
	if a := r.attach(t, "--verify"); !a.Verified {
		t.Errorf("%+v", a)
	}
	r.list(t, "--sleep", "tiny-llama")
	s.hear(t, "1 stored")
	if len(s.store) > 0 {
		t.Errorf("the store still has %v", s.store)
	}
	h.ends(t, r)
}

// TestModelJSON pins the names of the fields that others read.
func TestModelJSON(t *testing.T) {
	b, err := json.Marshal(hold.Model{Name: "x", Devices: []int{0}})
	if err != nil {
		t.Fatal(err)
	}
	for _, field := range []string{
		"name", "state", "attached", "pinned", "last_used", "devices", `tier_bytes":{"vram":0,"ram":0}`, "share", "device_bytes",
	} {
		if !strings.Contains(string(b), `"`+field) {
			t.Errorf("no %s in %s", field, b)
		}
	}
}
