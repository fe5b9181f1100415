package doctor

import "testing"

// TestWarnOfIPC: what HIP 7 needs for sharing memory is said before somebody attaches, where it may be missing.
func TestWarnOfIPC(t *testing.T) {
	t.Parallel()
	const mayAll, mayNothing = "Name:\tx\nCapEff:\t000001ffffffffff\n", "CapEff:\t0000000000000000\n"
	yama := map[string]string{"proc/sys/kernel/yama/ptrace_scope": "1\n", "proc/self/status": mayNothing}
	for name, tt := range map[string]struct {
		files   map[string]string
		runtime string
		env     string // HSA_ENABLE_IPC_MODE_LEGACY
		none    bool   // there is no GPU
		want    []string
	}{
		"HIP 7 on a host":             {runtime: "7.2.4"},
		"HIP 7 in a container":        {runtime: "7.2.4", files: map[string]string{".dockerenv": ""}, want: []string{"network, PID and IPC"}},
		"HIP 10 in a container":       {runtime: "10.0.0", files: map[string]string{".dockerenv": ""}, want: []string{"=1"}},
		"HIP 6 in a container":        {runtime: "6.4.3", files: map[string]string{".dockerenv": ""}},
		"no GPU in a container":       {runtime: "7.2.4", files: map[string]string{".dockerenv": ""}, none: true},
		"the old way":                 {runtime: "7.2.4", files: map[string]string{".dockerenv": ""}, env: "1"},
		"the old way not taken":       {runtime: "7.2.4", files: map[string]string{".dockerenv": ""}, env: "0", want: []string{"=1"}},
		"without the right":           {runtime: "7.2.4", files: yama, want: []string{"CAP_SYS_PTRACE"}},
		"without the right, on HIP 5": {runtime: "5.2.21153", files: yama},
		"with the right": {runtime: "7.2.4", files: map[string]string{
			"proc/sys/kernel/yama/ptrace_scope": "1\n", "proc/self/status": mayAll,
		}},
		"where nothing forbids it": {runtime: "7.2.4", files: map[string]string{
			"proc/sys/kernel/yama/ptrace_scope": "0\n", "proc/self/status": mayNothing,
		}},
	} {
		p := fakeHost(t, tt.files)
		p.lookup = func(name string) (string, bool) { return tt.env, name == legacyIPC && tt.env != "" }
		r := &Report{Library: &Library{Runtime: tt.runtime}, Host: checkHost(p), Devices: []GPU{{}}}
		if tt.none {
			r.Devices = nil
		}
		t.Run(name, func(t *testing.T) { wantPieces(t, r.warnIPC(), tt.want) })
	}
}
