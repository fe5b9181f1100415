package doctor

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// fakePCI makes a tree with a device below ports, outermost first: each has a vendor and a link as {lanes, most
// lanes, speed, best speed}. The last is a GPU and has the address 0000:NN:00.0 with the highest number.
func fakePCI(t *testing.T, class string, chain ...[5]string) probe {
	t.Helper()
	files := map[string]string{}
	dir, address := "sys/devices/pci0000:00", ""
	for i, d := range chain {
		address = "0000:0" + string(rune('1'+i)) + ":00.0"
		dir = filepath.Join(dir, address)
		for j, name := range []string{"vendor", "current_link_width", "max_link_width", "current_link_speed", "max_link_speed"} {
			files[filepath.Join(dir, name)] = d[j] + "\n"
		}
		files[filepath.Join(dir, "class")] = "0x060400\n" // a bridge
	}
	files[filepath.Join(dir, "class")] = class + "\n"
	p := fakeHost(t, files)
	bus := filepath.Join(p.root, "sys/bus/pci/devices")
	if err := os.MkdirAll(bus, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(p.root, dir), filepath.Join(bus, address)); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestPCILinks(t *testing.T) {
	t.Parallel()
	rootPort := [5]string{"0x1022", "16", "16", "32.0 GT/s PCIe", "32.0 GT/s PCIe"}
	inner := [5]string{"0x1002", "16", "16", "16.0 GT/s PCIe", "16.0 GT/s PCIe"}
	tests := []struct {
		name  string
		class string
		chain [][5]string
		want  []Link
		warn  []string
	}{
		{
			name: "at its best", class: "0x038000",
			chain: [][5]string{rootPort, {"0x1002", "16", "16", "32.0 GT/s PCIe", "32.0 GT/s PCIe"}},
			want: []Link{{
				GPU: "0000:02:00.0", Port: "0000:02:00.0", Lanes: 16, MaxLanes: 16, GTps: 32, MaxGTps: 32, GBps: 63.02, MaxGBps: 63.02,
			}},
		},
		{
			name: "a switch on the card hides the slot", class: "0x030000",
			chain: [][5]string{rootPort, {"0x1002", "4", "16", "8.0 GT/s PCIe", "16.0 GT/s PCIe"}, inner, inner},
			want: []Link{{
				GPU: "0000:04:00.0", Port: "0000:02:00.0", Lanes: 4, MaxLanes: 16, GTps: 8, MaxGTps: 16, GBps: 3.94, MaxGBps: 31.51,
			}},
			warn: []string{"uses 4 of its 16 lanes", "runs at 8 of 16 GT/s"},
		},
		{
			name: "an idle accelerator", class: "0x120000",
			chain: [][5]string{rootPort, {"0x1002", "16", "16", "2.5 GT/s PCIe", "16.0 GT/s PCIe"}},
			want: []Link{{
				GPU: "0000:02:00.0", Port: "0000:02:00.0", Lanes: 16, MaxLanes: 16, GTps: 2.5, MaxGTps: 16, GBps: 4, MaxGBps: 31.51,
			}},
			warn: []string{"look again during a load"},
		},
		{name: "a virtual function without a link", class: "0x120000", chain: [][5]string{{"0x1002", "0", "0", "Unknown", "Unknown"}}},
		{name: "the card's sound device", class: "0x040300", chain: [][5]string{inner}},
		{name: "another maker's GPU", class: "0x030000", chain: [][5]string{{"0x10de", "8", "16", "8.0 GT/s PCIe", "8.0 GT/s PCIe"}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := checkHost(fakePCI(t, tt.class, tt.chain...))
			if diff := cmp.Diff(tt.want, r.Links, cmpopts.EquateApprox(0, 0.01), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("links (-want +got):\n%s", diff)
			}
			wantPieces(t, r.warn(), tt.warn)
		})
	}
}
