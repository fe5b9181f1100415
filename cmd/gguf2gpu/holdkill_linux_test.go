package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// sharedMemory lists the device memory that processes have mapped or hold open, by the names that the software device
// and the simulator give it.
func sharedMemory(t *testing.T, pid string) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	maps, _ := os.ReadFile(filepath.Join("/proc", pid, "maps")) // the process may have ended, or be another user's
	for line := range strings.Lines(string(maps)) {
		if i := strings.Index(line, "/memfd:"); i >= 0 {
			f := strings.Fields(line)
			found[f[4]+strings.TrimSpace(line[i:])] = true // with the number of the file
		}
	}
	return found
}

// wantNobodyHas waits until no process has any of this memory.
func wantNobodyHas(t *testing.T, memory map[string]bool) {
	t.Helper()
	if len(memory) == 0 {
		t.Error("there was no memory that is shared")
	}
	until(t, "nobody has the memory any more", func() bool {
		all, err := filepath.Glob("/proc/[0-9]*")
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range all {
			for name := range sharedMemory(t, filepath.Base(dir)) {
				if memory[name] {
					return false
				}
			}
		}
		return true
	})
}

// TestHolderKilled kills the holder while a process is attached: that ends with an error, another holder takes the
// socket, and no memory is left.
func TestHolderKilled(t *testing.T) {
	onRigs(t, func(t *testing.T, r *rig) {
		h := r.hold(t, samplePath, "--share", "ipc").isReady(t)
		memory := sharedMemory(t, strconv.Itoa(h.Process.Pid))
		stay := r.stay(t)
		if theirs := sharedMemory(t, strconv.Itoa(stay.Process.Pid)); len(theirs) == 0 {
			t.Error("the attached process has no memory mapped")
		} else {
			for name := range theirs {
				if !memory[name] {
					t.Errorf("the attached process has memory of its own: %s", name)
				}
			}
		}
		h.kill()
		stay.exits(t, exitFailed, "the process that holds the model is gone")
		stay.leavesNothing(t, r)
		wantNobodyHas(t, memory)
		r.start(t, "attach").exits(t, exitFailed, "nobody holds models there")

		h = r.hold(t, samplePath, "--share", "ipc").isReady(t)
		if a := r.attach(t, "--verify"); !a.Verified {
			t.Errorf("%+v", a)
		}
		h.ends(t, r)
	})
}

// TestClientKilled kills attached processes: the holder goes on for others, and for those that want the model gone.
func TestClientKilled(t *testing.T) {
	onRigs(t, func(t *testing.T, r *rig) {
		h := r.hold(t, samplePath).isReady(t)
		memory := sharedMemory(t, strconv.Itoa(h.Process.Pid))
		var stay []*process
		for range 3 {
			stay = append(stay, r.stay(t))
		}
		r.wantAttached(t, 3)
		stay[0].kill()
		stay[1].kill()
		r.wantAttached(t, 1)
		if a := r.attach(t, "--verify"); !a.Verified {
			t.Errorf("%+v", a)
		}
		r.start(t, "hold", "--drop", "tiny-llama").exits(t, exitFailed, "in use")
		// One that is stopped counts as attached, and can be killed as well.
		if err := stay[2].Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		r.wantAttached(t, 1)
		stay[2].kill()
		r.wantAttached(t, 0)
		if left := r.list(t, "--drop", "tiny-llama"); len(left) != 0 {
			t.Errorf("%+v", left)
		}
		wantNobodyHas(t, memory)
		h.ends(t, r)
	})
}

// TestKilledAtAnyTime kills holder and attached process after times that grow, so that it strikes in every phase:
// before the connection, while memory is mapped, during the load, and while it is read back.
func TestKilledAtAnyTime(t *testing.T) {
	onRigs(t, func(t *testing.T, r *rig) {
		var clean, gone int
		for i := range 24 {
			r.socket = filepath.Join(r.dir, fmt.Sprint("s", i))
			args := []string{samplePath, "--dtype", "f32", "--chunk", "64KiB", "--staging", "128KiB"}
			if r.device == "soft" {
				args = append(args, "--soft-link", "300MB/s") // 44 ms
			}
			h := r.hold(t, args...)
			until(t, "it listens", func() bool { _, err := os.Lstat(r.socket); return err == nil })
			memory := map[string]bool{}
			until(t, "it has memory", func() bool { memory = sharedMemory(t, strconv.Itoa(h.Process.Pid)); return len(memory) > 0 })
			a := r.start(t, "attach", "--verify")
			time.Sleep(time.Duration(i/2*6) * time.Millisecond)
			first, second := h, a
			if i%2 == 1 {
				first, second = a, h
			}
			first.kill()
			if second == a {
				<-a.ended
				text := a.stderr.String()
				switch a.ProcessState.ExitCode() {
				case int(exitOK):
					clean++
				case int(exitFailed):
					gone++
				default:
					t.Fatalf("attach: %v\n%s", a.ProcessState, text)
				}
				if strings.Contains(text, "goroutine") || a.ProcessState.ExitCode() == int(exitFailed) && strings.Count(text, "\n") != 1 {
					t.Fatalf("attach prints\n%s", text)
				}
			} else {
				h.isReady(t)
				if a := r.attach(t, "--verify"); !a.Verified {
					t.Errorf("%+v", a)
				}
				h.ends(t, r)
			}
			wantNobodyHas(t, memory)
		}
		t.Logf("of 12 attached processes whose holder was killed %d had ended well, and %d ended with an error", clean, gone)
		if gone == 0 {
			t.Error("no attached process noticed")
		}
	})
}

// TestHoldGrace ends the holder while processes are attached.
func TestHoldGrace(t *testing.T) {
	r := newRig(t, "soft")
	h := r.hold(t, samplePath, "--share", "ipc", "--grace", "1h").isReady(t)
	stay := r.stay(t)
	if err := h.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	until(t, "nobody is let in", func() bool {
		p := r.start(t, "attach")
		<-p.ended
		return !p.ProcessState.Success() && strings.Contains(p.stderr.String(), "nobody holds models there")
	})
	// Another holder may start already, and keeps its socket when the first one is gone.
	next := r.hold(t, samplePath, "--share", "ipc").isReady(t)
	if got := len(sharedMemory(t, strconv.Itoa(stay.Process.Pid))); got == 0 {
		t.Error("in the grace time, the attached process has nothing mapped")
	}
	stay.ends(t, r)
	h.exits(t, exitOK, "")
	r.attach(t, "--verify")
	next.ends(t, r)

	h = r.hold(t, samplePath, "--share", "ipc", "--grace", "50ms").isReady(t)
	stay = r.stay(t)
	h.ends(t, r)
	stay.exits(t, exitFailed, "the process that holds the model is gone")

	h = r.hold(t, samplePath, "--share", "ipc", "--grace", "1h").isReady(t)
	stay = r.stay(t)
	if err := h.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	until(t, "it was told", func() bool { return strings.Contains(h.stderr.String(), "msg=ending") })
	until(t, "another signal ends it at once", func() bool { // once it no longer listens to signals, which takes it a moment
		_ = h.Process.Signal(syscall.SIGTERM)
		select {
		case <-h.ended:
			return true
		default:
			return false
		}
	})
	if s, ok := h.ProcessState.Sys().(syscall.WaitStatus); !ok || s.Signal() != syscall.SIGTERM {
		t.Errorf("a second signal: %v", h.ProcessState)
	}
	stay.exits(t, exitFailed, "the process that holds the model is gone")
}

// TestHundredProcesses attaches a hundred processes to one holder, which has as many descriptors, threads, mappings and
// as much memory afterwards as before.
func TestHundredProcesses(t *testing.T) {
	onRigs(t, func(t *testing.T, r *rig) {
		h := r.hold(t, samplePath).isReady(t)
		dir := filepath.Join("/proc", strconv.Itoa(h.Process.Pid))
		count := func(what string) int {
			names, err := os.ReadDir(filepath.Join(dir, what))
			if err != nil {
				t.Fatal(err)
			}
			return len(names)
		}
		attach := func(n int) {
			for range n {
				p := r.start(t, "attach")
				p.exits(t, exitOK, "")
				p.leavesNothing(t, r)
			}
			r.wantAttached(t, 0)
		}
		attach(5)
		descriptors, memory, mappings := count("fd"), resident(t, dir), len(sharedMemory(t, strconv.Itoa(h.Process.Pid)))
		n := 100
		if testing.Short() {
			n = 20
		}
		attach(n)
		if now := count("fd"); now > descriptors {
			t.Errorf("%d descriptors, before that %d", now, descriptors)
		}
		if now := len(sharedMemory(t, strconv.Itoa(h.Process.Pid))); now > mappings {
			t.Errorf("%d mappings, before that %d", now, mappings)
		}
		if now := resident(t, dir); now > memory+16<<20 { // Go's heap takes some before it is collected
			t.Errorf("%d bytes resident, before that %d", now, memory)
		}
		h.ends(t, r)
	})
}

// resident is VmRSS of a process, in bytes.
func resident(t *testing.T, dir string) uint64 {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), "\nVmRSS:")
	f := strings.Fields(rest)
	if !ok || len(f) == 0 {
		t.Fatalf("no VmRSS in %s", text)
	}
	kb, err := strconv.ParseUint(f[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kb * 1024
}

// TestOtherUser connects as another user, which takes root to try.
func TestOtherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can start processes of other users")
	}
	const nobody = 65534
	r := newRig(t, "soft")
	for _, dir := range []string{r.dir, filepath.Dir(r.dir)} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(r.dir, "gguf2gpu") // the test's own binary is where only root can look
	if err := os.WriteFile(exe, self, 0o755); err != nil {
		t.Fatal(err)
	}
	as := func(groups []uint32, command string, args ...string) *process {
		p := r.command(t, command, args...)
		p.Path = exe
		p.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody, Groups: groups}}
		p.run(t)
		return p
	}
	h := r.hold(t, samplePath, "--share", "ipc").isReady(t)
	as(nil, "attach").exits(t, exitFailed, "permission denied") // by the socket's mode
	if err := os.Chmod(r.socket, 0o666); err != nil {
		t.Fatal(err)
	}
	as(nil, "attach").exits(t, exitFailed, "belongs to user 65534, who may not use models of user 0 (nobody else may)")
	as([]uint32{0}, "hold", "--list").exits(t, exitFailed, "belongs to user 65534")
	h.ends(t, r)

	h = r.hold(t, samplePath, "--share", "ipc", "--allow-group").isReady(t)
	if info, err := os.Stat(r.socket); err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	as([]uint32{0}, "hold", "--list").exits(t, exitOK, "")
	as([]uint32{0}, "hold", "--drop", "tiny-llama").exits(t, exitFailed, "belongs to another user, and may not drop models")
	// The software device's memory is open to processes of the same user only, whoever is let in.
	as([]uint32{0}, "attach").exits(t, exitFailed, "hipIpcOpenMemHandle")
	if err := os.Chmod(r.socket, 0o666); err != nil {
		t.Fatal(err)
	}
	as([]uint32{1, 2, 3}, "hold", "--list").exits(t, exitFailed, "members of group")
	r.wantAttached(t, 0)
	h.ends(t, r)
}

// TestNoise sends what is not of the protocol to a holder that is a process.
func TestNoise(t *testing.T) {
	r := newRig(t, "soft")
	h := r.hold(t, samplePath).isReady(t)
	stay := r.stay(t)
	for i := range 50 {
		conn, err := net.Dial("unix", r.socket)
		if err != nil {
			t.Fatal(err)
		}
		noise := make([]byte, i*37%1000)
		for j := range noise {
			noise[j] = byte((i + 1) * (j + 7) * 31)
		}
		_, _ = conn.Write(noise) // it may have been closed on the first bytes
		if i%2 == 0 {
			defer conn.Close() // those stay to the end
		} else {
			conn.Close()
		}
	}
	if a := r.attach(t, "--verify"); !a.Verified {
		t.Errorf("%+v", a)
	}
	r.wantAttached(t, 1)
	stay.ends(t, r)
	h.ends(t, r)
}

// TestIPCFaults fails the calls that share memory, across the C boundary, on either side: an error that names the call,
// nothing left, and the other side goes on.
func TestIPCFaults(t *testing.T) {
	r := newRig(t, "hip")
	r.env = []string{"GGUF2GPU_HIP_LIBRARY=" + buildSimulator(t), "HIPSIM_DELAY_US=10", "HIPSIM_POISON=0"}
	failing := func(fault, command string, args ...string) *process {
		p := r.command(t, command, args...)
		p.Env = append(p.Env, "HIPSIM_FAIL="+fault)
		p.run(t)
		return p
	}
	for fault, code := range map[string]exitCode{"hipIpcGetMemHandle:1:999": exitFailed, "hipIpcGetMemHandle:1:2": exitFailed} {
		p := failing(fault, "hold", samplePath, "--share", "ipc", "--device", "hip", "--progress", "none")
		p.exits(t, code, "hipIpcGetMemHandle")
		nothingLeft(t, p.report, nil)
	}
	h := r.hold(t, samplePath, "--share", "ipc").isReady(t)
	for _, tt := range []struct {
		fault, text string
		code        exitCode
		left        map[string]int
	}{
		{fault: "hipIpcOpenMemHandle:1:201", text: "hipErrorInvalidContext", code: exitFailed},
		{fault: "hipIpcOpenMemHandle:1:17", text: "hipIpcOpenMemHandle", code: exitFailed},
		{fault: "hipIpcOpenMemHandle:1:2", text: "hipIpcOpenMemHandle", code: exitFailed},
		{fault: "hipMemGetInfo:1:999", text: "hipMemGetInfo", code: exitFailed},
		{fault: "hipMemGetInfo:2:999", text: "hipMemGetInfo", code: exitFailed},
		{fault: "hipMemcpyAsync:1:700:async", text: "hipErrorIllegalAddress", code: exitFailed},
		{fault: "hipGetDeviceCount:1:100", text: "hipErrorNoDevice", code: exitNoDevice},
		{fault: "hipIpcCloseMemHandle:1:999", text: "hipIpcCloseMemHandle", code: exitFailed, left: map[string]int{"ipc_opens": 1}},
	} {
		p := failing(tt.fault, "attach", "--verify")
		p.exits(t, tt.code, tt.text)
		if text := p.stderr.String(); strings.Count(text, "\n") != 1 {
			t.Errorf("%s: want one line on stderr:\n%s", tt.fault, text)
		}
		nothingLeft(t, p.report, tt.left)
	}
	p := r.command(t, "attach")
	p.Env = append(p.Env, "HIPSIM_DEVICES=0")
	p.run(t)
	p.exits(t, exitNoDevice, "")
	p = r.command(t, "attach")
	p.Env = append(p.Env, "GGUF2GPU_HIP_LIBRARY="+filepath.Join(r.dir, "none.so"))
	p.run(t)
	p.exits(t, exitNoDevice, "none.so")
	r.wantAttached(t, 0)
	if a := r.attach(t, "--verify"); !a.Verified {
		t.Errorf("%+v", a)
	}
	h.ends(t, r)
}
