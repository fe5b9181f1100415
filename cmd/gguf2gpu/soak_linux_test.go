package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/loader/hold"
)

// soakTime is the variable of the environment that says how long TestSoak lasts, such as 1h, and soakSeed the one with
// the seed of what was found. 'make soak HOURS=1' sets the first one.
const soakTime, soakSeed = "GGUF2GPU_SOAK", "GGUF2GPU_SEED"

// soak is a holder with a keeper, and what is done to them.
type soak struct {
	*rig
	rng     *rand.Rand
	keeper  *process
	args    []string // of the holder
	holder  *process
	staying []*process
	counts  map[string]int
	first   usage // of the keeper and of this process
	kept    usage
}

// usage is what a process has at one moment, when nothing is going on.
type usage struct {
	files  int
	memory int64 // bytes of resident memory that is its own
}

// TestSoak does at random what happens in months: loads with all kinds of settings, faults and flipped bits, models
// that are added, dropped, put to sleep and woken, processes that attach and are killed, holders that are killed,
// stopped and started again. Nothing hangs, what ends well is verified, what ends badly says why, and neither the
// holder nor the keeper grows. The seed is printed; it makes the same choices again. Without GGUF2GPU_SOAK it is a
// short one, with the same seed each time.
func TestSoak(t *testing.T) {
	t.Parallel()
	seed, operations, end := uint64(15), 60, time.Time{}
	if text := os.Getenv(soakTime); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil {
			t.Fatalf("%s: %v", soakTime, err)
		}
		end, operations, seed = time.Now().Add(d), 1<<40, rand.Uint64()
	}
	if text := os.Getenv(soakSeed); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("%s: %v", soakSeed, err)
		}
	}
	t.Logf("%s=%d makes the same choices again", soakSeed, seed)
	r := newRig(t, "hip:0,1")
	r.env = []string{"GGUF2GPU_HIP_LIBRARY=" + buildSimulator(t), "HIPSIM_DELAY_US=10", "HIPSIM_POISON=0", "HIPSIM_DEVICES=2"}
	s := &soak{rig: r, rng: rand.New(rand.NewPCG(seed, 0)), counts: make(map[string]int)}
	var socket string
	s.keeper, socket = r.keeper(t)
	s.args = []string{samplePath, "--name", "m0", "--dtype", "raw", "--keep", socket, "--ram", "8MiB", "--vram", "6MiB", "--stall", "5s"}
	s.holder = r.hold(t, s.args...).isReady(t)
	for n := 0; n < operations && (end.IsZero() || time.Now().Before(end)) && !t.Failed(); n++ {
		s.once(t)
		if n%50 == 49 {
			s.calm(t)
		}
		if os.Getenv(soakTime) != "" && n%200 == 199 {
			t.Logf("%v: %d operations: %v", time.Now().Format(time.TimeOnly), n+1, s.counts)
		}
	}
	s.calm(t)
	s.holder.ends(t, newRig(t, "soft"))
	s.keeper.ends(t, newRig(t, "soft"))
	t.Logf("done: %v", s.counts)
}

// once does one thing.
func (s *soak) once(t *testing.T) {
	t.Helper()
	name := fmt.Sprintf("m%d", s.rng.IntN(4))
	switch n := s.rng.IntN(100); {
	case n < 20:
		s.load(t)
	case n < 45:
		s.told(t, "attach", "attach", name, "--verify")
	case n < 55:
		s.told(t, "sleep", "hold", "--sleep", name)
	case n < 65:
		s.told(t, "wake", "hold", "--wake", name)
	case n < 72:
		s.told(t, "add", "hold", "--add", samplePath, "--name", name, "--dtype", []string{"raw", "f16", "bf16"}[s.rng.IntN(3)])
	case n < 78:
		s.told(t, "drop", "hold", "--drop", name)
	case n < 82:
		s.told(t, "pin", "hold", []string{"--pin", "--unpin"}[s.rng.IntN(2)], name)
	case n < 88:
		s.counts["stay"]++
		s.staying = append(s.staying, s.start(t, "attach", name, "--stay"))
		if len(s.staying) > 3 {
			s.leave(t)
		}
	case n < 93 && len(s.staying) > 0:
		s.leave(t)
	case n < 96:
		s.counts["stop"]++
		_ = s.holder.Process.Signal(syscall.SIGSTOP)
		asked := s.start(t, "hold", "--list")
		time.Sleep(time.Duration(s.rng.IntN(20)) * time.Millisecond)
		_ = s.holder.Process.Signal(syscall.SIGCONT)
		asked.exits(t, exitOK, "")
	case n < 98:
		s.counts["kill holder"]++
		s.holder.kill()
		s.holder = s.hold(t, s.args...).isReady(t)
	default:
		s.told(t, "list", "hold", "--list")
	}
}

// told runs a command that the holder may refuse, for a reason that can be: the name is not held or held already, it is
// in use, pinned, or there is no room.
func (s *soak) told(t *testing.T, what string, command string, args ...string) {
	t.Helper()
	p := s.start(t, command, args...)
	select {
	case <-p.ended:
	case <-time.After(time.Minute):
		_ = p.Process.Signal(syscall.SIGQUIT)
		<-p.ended
		t.Fatalf("%v does not end", p.Args)
	}
	s.counts[what]++
	text := p.stderr.String()
	may := func(reason string) bool { return strings.Contains(text, reason) }
	switch code := exitCode(p.ProcessState.ExitCode()); {
	case code == exitOK:
	case (code == exitFailed || code == exitNoMemory) && slices.ContainsFunc([]string{
		"no such model", "is held already",
		"in use by processes", "is pinned", "the budget is", "not enough device memory",
	}, may):
		s.counts["refused"]++
	default:
		t.Errorf("%v: exit code %d: %s\nthe holder: %s", p.Args, code, text, s.holder.stderr)
		return
	}
	_ = os.RemoveAll(filepath.Dir(p.report)) // a soak starts many
}

// leave ends a process that is attached, or kills it.
func (s *soak) leave(t *testing.T) {
	t.Helper()
	p := s.staying[0]
	s.staying = s.staying[1:]
	if s.rng.IntN(2) == 0 {
		s.counts["kill client"]++
		p.kill()
		return
	}
	_ = p.Process.Signal(syscall.SIGTERM) // it may have ended, if there was no such model
	<-p.ended
}

// load loads and verifies in a process of its own: as it is, with calls that fail or block, or with bits that flip.
func (s *soak) load(t *testing.T) {
	t.Helper()
	pick := func(from ...string) string { return from[s.rng.IntN(len(from))] }
	args := []string{
		samplePath, "--device", pick("hip", "hip:1", "hip:0,1", "soft:2"), "--dtype", pick("raw", "f32", "f16", "bf16"), "--verify",
		"--chunk", pick("64KiB", "256KiB", "1MiB"), "--staging", pick("4MiB", "16MiB"), "--threads", pick("1", "2", "3"),
		"--streams", pick("1", "2", "4"), "--io", pick("auto", "mmap", "direct"), "--progress", "none",
	}
	fault := ""
	for range s.rng.IntN(3) {
		call := pick("hipMemcpyAsync", "hipMalloc", "hipEventRecord", "hipEventQuery", "hipHostRegister", "hipStreamCreateWithFlags",
			"hipFree", "hipMemGetInfo", "hipStreamDestroy", "hipHostUnregister", "hipStreamQuery", "hipSetDevice")
		fault += fmt.Sprintf(",%s:%d:%s", call, 1+s.rng.IntN(40), pick("999", "2", "0:block", "0:block=30"))
	}
	if strings.Contains(fault, "block") {
		args = append(args, "--stall", "3s") // without a fault, no load on this machine is to pass for one
	}
	p := (&rig{dir: s.dir, socket: s.socket, env: s.env}).command(t, "load", args...)
	p.Args = slices.DeleteFunc(p.Args, func(a string) bool { return a == "--socket" || a == s.socket })
	p.Env = append(p.Env, "HIPSIM_FAIL="+strings.TrimPrefix(fault, ","), fmt.Sprint("HIPSIM_SEED=", s.rng.IntN(1000)),
		fmt.Sprint("HIPSIM_WAITS=", s.rng.IntN(2)))
	if s.rng.IntN(3) == 0 {
		p.Env = append(p.Env, fmt.Sprintf("HIPSIM_FLIP=%d:%d:%d", 1+s.rng.IntN(10), s.rng.IntN(1<<16), s.rng.IntN(8)))
	}
	p.run(t)
	select {
	case <-p.ended:
	case <-time.After(2 * time.Minute):
		t.Fatalf("it does not end: %v with %q", p.Args, fault)
	}
	s.counts["load"]++
	report, code := read(p.report), exitCode(p.ProcessState.ExitCode())
	flipped := bytes.Contains(report, []byte(`"flips":`)) && !bytes.Contains(report, []byte(`"flips":0`))
	struck := len(report) > 0 && !bytes.Contains(report, []byte(`"faults":0`))
	switch {
	case code == exitOK && !flipped:
	case code == exitMismatch && flipped:
		s.counts["flip found"]++
	case slices.Contains([]exitCode{exitFailed, exitNoDevice, exitNoMemory}, code) && struck:
		s.counts["fault"]++
	default:
		t.Errorf("%v with faults %q: exit code %d, flipped %v: %s", p.Args[1:], fault, code, flipped, p.stderr)
		return
	}
	_ = os.RemoveAll(filepath.Dir(p.report)) // a soak starts many
}

// calm lets everybody go and drops all models, and compares what the holder and the keeper have with what they had the
// first time.
func (s *soak) calm(t *testing.T) {
	t.Helper()
	for len(s.staying) > 0 {
		s.leave(t)
	}
	for i := range 4 {
		name := fmt.Sprintf("m%d", i)
		until(t, "nobody is attached", func() bool {
			return !slices.ContainsFunc(s.list(t), func(m hold.Model) bool { return m.Attached > 0 })
		})
		s.told(t, "drop", "hold", "--drop", name)
	}
	until(t, "the keeper has nothing", func() bool { return openOf(s.keeper) <= max(s.kept.files, 16) })
	keeper, holder := usageOf(t, s.keeper), usageOf(t, s.holder)
	if s.counts["calm"]++; s.counts["calm"] == 1 {
		s.kept, s.first = keeper, holder
	}
	const slack = 24 << 20 // the Go runtime's, and what the first uses of something leave
	if keeper.files > s.kept.files || keeper.memory > s.kept.memory+slack {
		t.Errorf("the keeper has %+v, and had %+v", keeper, s.kept)
	}
	if holder.files > s.first.files+4 || holder.memory > s.first.memory+2*slack {
		t.Errorf("the holder has %+v, and had %+v", holder, s.first)
	}
	s.told(t, "add", "hold", "--add", samplePath, "--name", "m0", "--dtype", "raw")
}

func openOf(p *process) int {
	files, _ := os.ReadDir(filepath.Join("/proc", fmt.Sprint(p.Process.Pid), "fd"))
	return len(files)
}

func usageOf(t *testing.T, p *process) usage {
	t.Helper()
	status := string(read(filepath.Join("/proc", fmt.Sprint(p.Process.Pid), "status")))
	_, after, _ := strings.Cut(status, "RssAnon:")
	var kb int64
	if _, err := fmt.Sscan(after, &kb); err != nil {
		t.Fatalf("%v in %s", err, status)
	}
	return usage{files: openOf(p), memory: kb << 10}
}
