package doctor

import (
	"encoding/json"
	"testing"
)

// TestReportAdvises gives advice when no GPU is usable, and warns of what is missing when one is.
func TestReportAdvises(t *testing.T) {
	t.Parallel()
	gpu := []GPU{{Name: "gfx1100"}}
	good := Host{KFD: DeviceFile{Exists: true, Usable: true}, GPUNodes: 1, RenderNodes: []DeviceFile{{Usable: true}}}
	for _, tt := range []struct {
		name         string
		report       Report
		advice, warn []string // one piece of each line
	}{
		{"all well", Report{Library: &Library{}, Devices: gpu, Host: good}, nil, nil},
		{"no library", Report{Host: good}, []string{"install the HIP runtime"}, nil},
		{"an error after the first GPU", Report{Library: &Library{}, Devices: gpu, Error: "x"}, []string{"/dev/kfd"}, nil},
		{
			"no compiler",
			Report{Library: &Library{CompilerError: "x"}, Devices: gpu, Host: good},
			nil,
			[]string{"without hipRTC"},
		},
		{"no compiler and no GPU", Report{Library: &Library{CompilerError: "x"}, Host: good}, nil, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			wantPieces(t, tt.report.advise(), tt.advice)
			wantPieces(t, tt.report.warn(), tt.warn)
		})
	}
}

// TestCheck looks at this machine, whatever it has. JSON has lists and never null for them.
func TestCheck(t *testing.T) {
	t.Parallel()
	text, err := json.Marshal(Check())
	if err != nil {
		t.Fatal(err)
	}
	var r map[string]json.RawMessage
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"attempts", "devices", "advice", "warnings", "defects"} {
		if len(r[name]) == 0 || r[name][0] != '[' {
			t.Errorf("%s is %s, want a list", name, r[name])
		}
	}
}
