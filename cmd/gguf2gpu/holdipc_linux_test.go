package main

import (
	"os"
	"strings"
	"syscall"
	"testing"
)

// TestIPCOfHIP7 attaches to a holder that shares memory as HIP 7 does, from its network namespace and from another one.
// From the other one it works only with the older way on both sides, and else the error says what to set. HIP 6 knows
// nothing of all that.
func TestIPCOfHIP7(t *testing.T) {
	t.Parallel()
	lib := buildSimulator(t)
	const old = "HSA_ENABLE_IPC_MODE_LEGACY=1"
	for name, tt := range map[string]struct {
		holder, client []string // of the environment
		real           bool     // the client is in another namespace indeed
		works          bool
	}{
		"the same namespace":         {[]string{"HIPSIM_VERSION=7"}, []string{"HIPSIM_VERSION=7"}, false, true},
		"another one":                {[]string{"HIPSIM_VERSION=7", "HIPSIM_NETWORK=1"}, []string{"HIPSIM_VERSION=7", "HIPSIM_NETWORK=2"}, false, false},
		"another one, old on both":   {[]string{"HIPSIM_VERSION=7", "HIPSIM_NETWORK=1", old}, []string{"HIPSIM_VERSION=7", "HIPSIM_NETWORK=2", old}, false, true},
		"another one, old on one":    {[]string{"HIPSIM_VERSION=7"}, []string{"HIPSIM_VERSION=7", old}, false, false},
		"another one, HIP 6":         {[]string{"HIPSIM_VERSION=6", "HIPSIM_NETWORK=1"}, []string{"HIPSIM_VERSION=6", "HIPSIM_NETWORK=2"}, false, true},
		"really another one":         {[]string{"HIPSIM_VERSION=7"}, []string{"HIPSIM_VERSION=7"}, true, false},
		"really another one, old":    {[]string{"HIPSIM_VERSION=7", old}, []string{"HIPSIM_VERSION=7", old}, true, true},
		"really another one, HIP 6.": {[]string{"HIPSIM_VERSION=6"}, []string{"HIPSIM_VERSION=6"}, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, "hip")
			common := []string{"GGUF2GPU_HIP_LIBRARY=" + lib, "HIPSIM_DELAY_US=10", "HIPSIM_POISON=0"}
			r.env = append(common, tt.holder...)
			h := r.hold(t, samplePath, "--share", "ipc").isReady(t)
			p := r.command(t, "attach", "--verify")
			p.Env = append(append(p.Env, common...), tt.client...)
			if tt.real {
				p.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
				if os.Geteuid() != 0 {
					p.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
					p.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}}
				}
				if err := p.Start(); err != nil {
					t.Skipf("this system gives no network namespace to a process: %v", err)
				}
				p.follow(t)
			} else {
				p.run(t)
			}
			if tt.works {
				p.exits(t, exitOK, "")
			} else {
				p.exits(t, exitFailed, "HSA_ENABLE_IPC_MODE_LEGACY=1 in the environment of both")
				for _, want := range []string{"hipIpcOpenMemHandle", "(17)", "--network=host", "CAP_SYS_PTRACE", "--share fd"} {
					if !strings.Contains(p.stderr.String(), want) {
						t.Errorf("no %q in %s", want, p.stderr)
					}
				}
			}
			nothingLeft(t, p.report, nil)
			h.ends(t, r)
		})
	}
}
