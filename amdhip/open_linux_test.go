package amdhip

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// symbols returns the names of the table's functions.
func symbols() (required, optional []string) { return hip.Symbols(reflect.TypeFor[hip.API]()) }

// unbound returns the fields of the table that are nil.
func unbound(table *hip.API) (names []string) {
	v := reflect.ValueOf(table).Elem()
	for i := range v.NumField() {
		if f := v.Field(i); f.Kind() == reflect.Func && f.IsNil() {
			names = append(names, hip.Symbol(v.Type().Field(i).Name))
		}
	}
	return names
}

func TestOpenBindsAll(t *testing.T) {
	rt, _ := openSim(t)
	if names := unbound(rt.api); len(names) > 0 {
		t.Errorf("not bound: %v", names)
	}
	if rt.Kind() != "hip" || filepath.Base(rt.Library()) != "libamdhip64.so" || rt.Backend() != nil {
		t.Errorf("got kind %q, library %q, backend %v", rt.Kind(), rt.Library(), rt.Backend())
	}
	// Twice is fine, and so is a second runtime after the first is closed.
	again := must(Open(Options{Library: rt.Library()}))(t)
	check(t, again.Close())
	check(t, again.Close())
	if _, err := rt.DeviceCount(); err != nil {
		t.Error(err)
	}
	_, err := again.DeviceCount()
	wantIs(t, err, ErrClosed)
	_, _, err = again.Version()
	wantIs(t, err, ErrClosed)
	_, err = again.Device(0)
	wantIs(t, err, ErrClosed)
}

func TestOpenWithoutOptionalSymbols(t *testing.T) {
	path := buildSim(t, "-DHIPSIM_NO_OPTIONAL")
	rt := closing(t, must(Open(Options{Library: path}))(t), nil)
	_, optional := symbols()
	if got, want := fmt.Sprint(unbound(rt.api)), fmt.Sprint(optional); got != want {
		t.Errorf("unbound: got %s, want %s", got, want)
	}
	d := device(t, rt, 0)
	if d.Arch() != "" || d.UUID() != "" {
		t.Errorf("got arch %q, uuid %q, want none", d.Arch(), d.UUID())
	}
	s := closing(t, must(d.NewStream())(t), nil)
	m := closing(t, must(d.Malloc(64))(t), nil)
	calls := map[string]func() error{
		"hipMallocAsync":             func() error { _, err := s.MallocAsync(64); return err },
		"hipFreeAsync":               func() error { return s.FreeAsync(m) },
		"hipDeviceCanAccessPeer":     func() error { _, err := d.CanAccessPeer(d); return err },
		"hipDeviceEnablePeerAccess":  func() error { return d.EnablePeerAccess(d) },
		"hipDeviceDisablePeerAccess": func() error { return d.DisablePeerAccess(d) },
		"hipMemcpyPeerAsync":         func() error { return s.CopyPeer(m.Ptr(), m.Ptr(), d, 1) },
		"hipIpcGetMemHandle":         func() error { _, err := m.IPCHandle(); return err },
		"hipIpcOpenMemHandle":        func() error { _, err := d.OpenIPC(IPCHandle{}); return err },
		"hipModuleLoadData":          func() error { _, err := d.LoadModule([]byte("code")); return err },
	}
	for name, call := range calls {
		err := call()
		wantIs(t, err, ErrUnsupported)
		if err != nil && !strings.Contains(err.Error(), name) {
			t.Errorf("%v does not name %s", err, name)
		}
	}
}

func TestOpenMissingSymbols(t *testing.T) {
	_, err := Open(Options{Library: buildSim(t, "-DHIPSIM_NO_ERROR_STRING")})
	wantIs(t, err, ErrNoLibrary)
	if err == nil || !strings.HasSuffix(err.Error(), "lacks hipGetErrorString") {
		t.Errorf("got %v, want the name of the missing symbol", err)
	}
	_, err = Open(Options{Library: "libm.so.6"})
	wantIs(t, err, ErrNoLibrary)
	required, _ := symbols()
	if err == nil || !strings.HasSuffix(err.Error(), strings.Join(required, ", ")) {
		t.Errorf("got %v, want all required symbols", err)
	}
}

func TestOpenExplicitIsFinal(t *testing.T) {
	good := buildSim(t)
	bad := filepath.Join(t.TempDir(), "libamdhip64.so.6")
	check(t, os.WriteFile(bad, []byte("no library"), 0o644))
	for _, tt := range []struct {
		name, option, env, want string
	}{
		{"option", bad, good, bad},
		{"environment", "", bad, bad},
		{"missing file", filepath.Join(t.TempDir(), "nothing.so"), good, "nothing.so"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("GGUF2GPU_HIP_LIBRARY", tt.env)
			t.Setenv("ROCM_PATH", filepath.Dir(good))
			_, err := Open(Options{Library: tt.option})
			wantIs(t, err, ErrNoLibrary)
			e, ok := errors.AsType[*LibraryError](err)
			if !ok || len(e.Attempts) != 1 || !strings.HasSuffix(e.Attempts[0].Path, tt.want) {
				t.Errorf("got %v, want one attempt at %s", err, tt.want)
			}
		})
	}
}

func TestOpenByEnvironment(t *testing.T) {
	dir := t.TempDir()
	check(t, os.Mkdir(filepath.Join(dir, "lib"), 0o755))
	image := must(os.ReadFile(buildSim(t)))(t)
	want := filepath.Join(dir, "lib", "libamdhip64.so.6")
	check(t, os.WriteFile(want, image, 0o755))
	check(t, os.WriteFile(filepath.Join(dir, "lib", "libamdhip64.so.7"), []byte("no library"), 0o644))
	t.Setenv("GGUF2GPU_HIP_LIBRARY", "")
	t.Setenv("ROCM_PATH", filepath.Join(dir, "missing"))
	t.Setenv("HIP_PATH", dir)
	rt := closing(t, must(Open(Options{}))(t), nil)
	if rt.Library() != want {
		t.Errorf("got %s, want %s", rt.Library(), want)
	}
}

func TestVersions(t *testing.T) {
	for version, want := range map[string]string{
		"5": "5.2.21153", "5.7": "5.7.31921", "6": "6.4.43484", "7.2": "7.2.53211",
	} {
		t.Run(want, func(t *testing.T) {
			rt, _ := openSim(t, "VERSION="+version)
			r, d, err := rt.Version()
			if err != nil || VersionString(r) != want || VersionString(d) != want {
				t.Errorf("got %s, %s, %v, want %s", VersionString(r), VersionString(d), err, want)
			}
			roundTrip(t, device(t, rt, 0))
		})
	}
}

func TestArchFromOldStruct(t *testing.T) {
	rt := closing(t, must(Open(Options{Library: buildSim(t, "-DHIPSIM_NO_R0600")}))(t), nil)
	if got, want := device(t, rt, 0).Arch(), "gfx90a:sramecc+:xnack-"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestSimEnvironment runs a program with the simulator as a user would: settings come from the environment and the
// statistics survive the exit.
func TestSimEnvironment(t *testing.T) {
	if os.Getenv("HIPSIM_CHILD") != "" {
		rt := must(Open(Options{}))(t)
		d := device(t, rt, 1)
		_, err := d.Malloc(4096)
		wantCode(t, err, "hipMalloc", ErrOutOfMemory)
		roundTrip(t, d)
		return
	}
	report := filepath.Join(t.TempDir(), "report")
	cmd := exec.Command(os.Args[0], "-test.run=^TestSimEnvironment$")
	cmd.Env = append(os.Environ(), "HIPSIM_CHILD=1", "GGUF2GPU_HIP_LIBRARY="+buildSim(t), "HIPSIM_REPORT="+report,
		"HIPSIM_DEVICES=2", "HIPSIM_FAIL=hipMalloc:1:2")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var stats map[string]int64
	check(t, json.Unmarshal(must(os.ReadFile(report))(t), &stats))
	for name, want := range map[string]int64{
		"faults": 1, "misuses": 0, "copies": 2, "copied_bytes": 2 * roundTripSize, "peak_device_bytes": roundTripSize,
		"device_allocations": 0, "host_allocations": 0, "streams": 0,
	} {
		if stats[name] != want {
			t.Errorf("%s: got %d, want %d", name, stats[name], want)
		}
	}
}
