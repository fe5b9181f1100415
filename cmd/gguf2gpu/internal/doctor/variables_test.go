package doctor

import (
	"strings"
	"testing"
)

// TestWarnOfVariables sets each variable to several values: those that change what is measured are named with the
// value, and all are in the report.
func TestWarnOfVariables(t *testing.T) {
	t.Parallel()
	for _, v := range tunings {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			warned := 0
			for _, value := range []string{"0", "1", "4", "7"} {
				p := fakeHost(t, nil)
				p.lookup = func(name string) (string, bool) {
					if name == v.name {
						return value, true
					}
					return "", false
				}
				r := checkHost(p)
				if r.Environment[v.name] != value {
					t.Errorf("the report has %q", r.Environment)
				}
				got := r.warnVariables()
				if want := v.effect != "" && v.changes(value); len(got) > 1 || want != (len(got) == 1) {
					t.Errorf("%s=%s: got %q, want one: %t", v.name, value, got, want)
				}
				warned += len(got)
				for _, text := range got {
					if !strings.HasPrefix(text, v.name+"="+value+" "+v.effect) {
						t.Errorf("got %q", text)
					}
				}
			}
			if want := v.effect != ""; want != (warned > 0) {
				t.Errorf("%d values are warned of, want any: %t", warned, want)
			}
		})
	}
}

func TestWarnOfLibraryFaults(t *testing.T) {
	t.Parallel()
	for version, want := range map[string][]string{
		"7.14.60850": nil,
		"7.15.70127": {"HIP 7.15: giving the CPU access"},
		"7.150.1":    nil,
		"7.16.1":     nil,
	} {
		r := &Report{Library: &Library{Runtime: version}, Devices: []GPU{{}}}
		wantPieces(t, r.warn(), want)
		r.Devices = nil
		wantPieces(t, r.warn(), nil)
	}
}
