package amdhip

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// versionTraits is what differs between AMD's runtimes and shows through this package, see the package documentation.
var versionTraits = []struct {
	version  string   // of the simulator
	noDevice Status   // what calls answer without a GPU
	virtual  bool     // virtual memory
	export   bool     // by descriptors
	aborts   bool     // when it compiles for an architecture that it does not know
	text     string   // of ErrNotReady
	compiler []string // where hipRTC is: sources of the simulator's second library; nil: in the first
}{
	{version: "5.2", noDevice: ErrInvalidDevice, aborts: true, text: "hipErrorNotReady"},
	{version: "5.7", noDevice: ErrNoDevice, virtual: true, aborts: true, text: "device not ready"},
	{version: "6.4", noDevice: ErrNoDevice, virtual: true, export: true, aborts: true, text: "device not ready"},
	{
		version: "7.2", noDevice: ErrNoDevice, virtual: true, export: true, text: "device not ready",
		compiler: []string{"hiprtc.c"},
	},
}

// TestVersionTraits looks at the simulator of each version through this package.
func TestVersionTraits(t *testing.T) {
	for _, tt := range versionTraits {
		t.Run(tt.version, func(t *testing.T) {
			rt, sim := openSim(t, "VERSION="+tt.version)
			if got := rt.api.HipGetErrorString(ErrNotReady); got != tt.text {
				t.Errorf("got %q, want %q", got, tt.text)
			}
			d := device(t, rt, 0)
			if d.VirtualMemory() != tt.virtual {
				t.Errorf("virtual memory: got %t", d.VirtualMemory())
			}
			if tt.virtual {
				exportAndImport(t, d, tt.export)
			}
			sim.set("DEVICES", "0")
			var p uintptr
			if got := rt.api.HipMalloc(&p, 64); got != tt.noDevice {
				t.Errorf("without a GPU: got %v, want %v", got, tt.noDevice)
			}
			_, err := rt.Device(0)
			wantIs(t, err, ErrNoDevice)
			sim.set("DEVICES", "1")
		})
	}
}

// exportAndImport shares memory by a descriptor, in whichever way the version takes that, or wants to be told that it
// cannot.
func exportAndImport(t *testing.T, d *Device, can bool) {
	t.Helper()
	minimum, _, err := d.Granularity()
	check(t, err)
	private := must(d.CreatePhysical(minimum, PhysicalOptions{}))(t)
	check(t, private.Close())
	shared, err := d.CreatePhysical(minimum, PhysicalOptions{Exportable: true})
	if !can {
		wantIs(t, err, ErrUnsupported)
		return
	}
	check(t, err)
	f := must(shared.Export())(t)
	imported := must(d.ImportPhysical(f, minimum))(t)
	check(t, errors.Join(f.Close(), imported.Close(), shared.Close()))
}

// TestUnknownArchOfVersions compiles for an architecture that the simulated compiler does not know, in a process of its
// own, which versions up to HIP 6 end.
func TestUnknownArchOfVersions(t *testing.T) {
	const child = "AMDHIP_TEST_VERSION"
	compileIn := func(library string) error {
		rt := must(Open(Options{Library: library}))(t)
		defer rt.Close()
		_, err := rt.Compile("add_one.hip", addOneSource, "--gpu-architecture=gfx9999")
		return err
	}
	if library := os.Getenv(child); library != "" {
		fmt.Printf("answer: %v\n", compileIn(library))
		return
	}
	for _, tt := range versionTraits {
		t.Run(tt.version, func(t *testing.T) {
			library := filepath.Join(t.TempDir(), "libamdhip64.so")
			sources := []string{"hipsim.c", "hiprtc.c"}
			if tt.compiler != nil {
				sources = sources[:1]
				buildLibrary(t, filepath.Join(filepath.Dir(library), "libhiprtc.so."+tt.version[:1]), tt.compiler)
			}
			buildLibrary(t, library, sources)
			cmd := exec.Command(must(os.Executable())(t), "-test.run=^TestUnknownArchOfVersions$")
			cmd.Env = append(os.Environ(), child+"="+library, "HIPSIM_VERSION="+tt.version)
			out, err := cmd.CombinedOutput()
			if tt.aborts {
				if err == nil || !bytes.Contains(out, []byte("SIGABRT")) {
					t.Errorf("got %v, want an abort:\n%.500s", err, out)
				}
				return
			}
			if err != nil || !bytes.Contains(out, []byte(ErrRTCCompilation.Error())) {
				t.Errorf("got %v, want an error of the compiler:\n%.500s", err, out)
			}
		})
	}
}
