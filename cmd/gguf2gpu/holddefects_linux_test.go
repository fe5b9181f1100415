package main

import (
	"os"
	"strings"
	"testing"
)

// TestRuntimeDefects holds, puts to sleep, wakes and attaches to a model with runtimes that have the defects which
// AMD's have or had with virtual memory. With --share auto models are shared by descriptors where the defect is in
// something that holding does not do, else by IPC handles, which is said. No call is wrong, and no memory is lost by
// asking for an IPC handle of virtual memory, which would end the process here.
func TestRuntimeDefects(t *testing.T) {
	lib := buildSimulator(t)
	for _, tt := range []struct {
		defect string
		share  string // what auto takes
		said   string // by the holder
	}{
		{"second-export", "fd", ""},
		{"early-close", "fd", ""},
		{"host-access", "fd", ""},
		{"host-access-void", "fd", ""},
		{"hint-ignored", "fd", ""},
		{"map-lies", "ipc", "hipMemSetAccess"},
		{"map-hangs", "ipc", "does not end within 5s"},
		{"second-export,early-close,host-access,hint-ignored", "fd", ""},
	} {
		t.Run(tt.defect, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, "hip")
			r.env = []string{
				"GGUF2GPU_HIP_LIBRARY=" + lib, "HIPSIM_VERSION=7", "HIPSIM_DELAY_US=10", "HIPSIM_POISON=0",
				"HIPSIM_DEFECTS=ipc-aborts," + tt.defect,
			}
			h := r.hold(t, samplePath, "--ram", "64MiB", "--dtype", "raw").isReady(t)
			until(t, "it is in host memory, too", func() bool { return r.list(t)[0].Tiers.RAM > 0 })
			for range 2 {
				if a := r.attach(t, "--verify"); !a.Verified || a.Share != tt.share {
					t.Errorf("shared by %s, want %s; verified %t", a.Share, tt.share, a.Verified)
				}
				if m := r.list(t, "--sleep", "tiny-llama")[0]; m.State != "asleep" {
					t.Errorf("%+v", m)
				}
				r.list(t, "--wake", "tiny-llama")
			}
			if said := strings.Contains(h.stderr.String(), "does not work"); said != (tt.said != "") ||
				!strings.Contains(h.stderr.String(), tt.said) {
				t.Errorf("the holder should say %q:\n%s", tt.said, h.stderr)
			}
			if tt.defect == "map-hangs" { // the call that does not come back keeps what it has
				h.kill()
				return
			}
			h.ends(t, r)
			wantRight(t, h)
		})
	}
}

// TestRuntimeDefectsWithKeeper lets runtimes with the defects of descriptors adopt what a keeper has.
func TestRuntimeDefectsWithKeeper(t *testing.T) {
	lib := buildSimulator(t)
	for _, defect := range []string{"second-export", "early-close", "hint-ignored"} {
		t.Run(defect, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, "hip")
			r.env = []string{
				"GGUF2GPU_HIP_LIBRARY=" + lib, "HIPSIM_DELAY_US=10", "HIPSIM_POISON=0",
				"HIPSIM_DEFECTS=ipc-aborts," + defect,
			}
			keeper, socket := r.keeper(t)
			args := []string{samplePath, "--keep", socket, "--dtype", "raw", "--ram", "64MiB"}
			h := r.hold(t, args...).isReady(t)
			until(t, "it is kept", func() bool { return strings.Contains(keeper.stderr.String(), "keeping id=") })
			stay := r.stay(t)
			h.kill()
			h = r.hold(t, args...).isReady(t)
			if m := r.list(t)[0]; !m.Adopted {
				t.Errorf("%+v", m)
			}
			r.wantAttached(t, 1)
			stay.ends(t, r)
			wantRight(t, stay)
			until(t, "it is in host memory, too", func() bool { return r.list(t)[0].Tiers.RAM > 0 })
			r.list(t, "--sleep", "tiny-llama")
			if a := r.attach(t, "--verify"); !a.Verified {
				t.Errorf("%+v", a)
			}
			h.ends(t, r)
			wantRight(t, h)
			keeper.ends(t, newRig(t, "soft"))
		})
	}
}

// TestAttachWithDefectiveRuntime attaches with a runtime that cannot map what a holder with a good one shares: an error
// that says what to do, and the holder goes on.
func TestAttachWithDefectiveRuntime(t *testing.T) {
	r := newRig(t, "hip")
	r.env = []string{"GGUF2GPU_HIP_LIBRARY=" + buildSimulator(t), "HIPSIM_DELAY_US=10", "HIPSIM_POISON=0"}
	h := r.hold(t, samplePath, "--share", "fd").isReady(t)
	for _, tt := range []struct {
		env, text string
	}{
		{"HIPSIM_DEFECTS=map-lies", "hipMemSetAccess"},
		{"HIPSIM_VMM=0", "has no virtual memory"},
		{"HIPSIM_VERSION=7 HIPSIM_DEFECTS=map-lies", "hipMemSetAccess"}, // tried first, as the versions differ
		{"HIPSIM_VERSION=7 HIPSIM_DEFECTS=map-hangs", "does not end within 5s"},
	} {
		p := r.command(t, "attach")
		p.Env = append(p.Env, strings.Fields(tt.env)...)
		p.run(t)
		p.exits(t, exitFailed, tt.text)
		if text := p.stderr.String(); !strings.Contains(text, "--share ipc") || strings.Count(text, "\n") != 1 {
			t.Errorf("%s: want one line that says what to do:\n%s", tt.env, text)
		}
		if !strings.Contains(tt.env, "hangs") { // that call keeps what it has
			nothingLeft(t, p.report, nil)
		}
	}
	p := r.command(t, "attach", "--verify")
	p.Env = append(p.Env, "HIPSIM_VERSION=7")
	p.run(t)
	p.exits(t, exitOK, "")
	nothingLeft(t, p.report, nil)
	if a := r.attach(t, "--verify"); !a.Verified {
		t.Errorf("%+v", a)
	}
	h.ends(t, r)
}

// wantRight wants a process that has ended to have lost no memory by asking for an IPC handle of virtual memory.
func wantRight(t *testing.T, p *process) {
	t.Helper()
	text, err := os.ReadFile(p.report)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), `"ipc_leaks":0,`) {
		t.Errorf("memory is lost: %s", text)
	}
}
