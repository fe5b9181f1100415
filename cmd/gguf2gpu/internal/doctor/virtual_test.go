package doctor

import "testing"

// TestDefects names the defects of the version of HIP that was found, and no others.
func TestDefects(t *testing.T) {
	t.Parallel()
	const (
		hangs, lies    = "not to come back", "although nothing was mapped"
		closed, access = "whose descriptor was closed", "the host is reported to get no access"
		leaks, slow    = "to lose the memory", "Linux 5.15"
	)
	gpu := []GPU{{}}
	for _, tt := range []struct {
		runtime, kernel string
		devices         []GPU
		want            []string
	}{
		{"5.7.31921", "6.8.0", gpu, nil},
		{"6.0.32831", "6.8.0", gpu, []string{closed, leaks}},
		{"6.4.43484", "5.15.0-130-generic", gpu, []string{hangs, closed, leaks, slow}},
		{"6.5.0", "6.8.0", gpu, []string{closed, leaks}},
		{"7.2.53211", "6.8.0", gpu, []string{lies, closed, leaks}},
		{"7.14.60850", "6.8.0", gpu, []string{closed, leaks}},
		{"7.15.1", "6.8.0", gpu, []string{access, leaks}},
		{"8.0.0", "6.8.0", gpu, []string{access, leaks}},
		{"5.7.31921", "5.15.0", gpu, nil},
		{"7.2.53211", "5.15.0", nil, nil},
		{"", "6.8.0", gpu, nil},
		{"rubbish", "6.8.0", gpu, nil},
	} {
		r := Report{Library: &Library{Runtime: tt.runtime}, Devices: tt.devices, Host: Host{Kernel: tt.kernel, Driver: true}}
		wantPieces(t, r.defects(), tt.want)
	}
	if got := (&Report{Devices: gpu}).defects(); got == nil || len(got) > 0 {
		t.Errorf("without a library: %q", got)
	}
}
