package main

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
)

// parseDeviceFlags returns the device flags of a command line. It sets the environment so that no GPU is found.
func parseDeviceFlags(t *testing.T, args ...string) *deviceFlags {
	t.Helper()
	t.Setenv("GGUF2GPU_HIP_LIBRARY", "")
	for _, name := range []string{"ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"} {
		t.Setenv(name, "")
	}
	fs := pflag.NewFlagSet("test", pflag.ContinueOnError)
	f := addDeviceFlags(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestNamedLibrary: a library that was named and cannot be used is an error with its reason.
func TestNamedLibrary(t *testing.T) {
	for _, device := range []string{"auto", "hip", "hip:1"} {
		f := parseDeviceFlags(t, "--device", device)
		t.Setenv("GGUF2GPU_HIP_LIBRARY", "/nowhere/libamdhip64.so")
		var stderr bytes.Buffer
		rt, _, err := f.open(t.Context(), &stderr, nil)
		if err == nil {
			t.Errorf("%s: opened a device of kind %q", device, rt.Kind())
			rt.Close()
			continue
		}
		if code := codeOf(t.Context(), err); code != exitNoDevice || !strings.Contains(err.Error(), "/nowhere/libamdhip64.so") {
			t.Errorf("%s: %v, code %d", device, err, code)
		}
		if stderr.Len() > 0 {
			t.Errorf("%s: stderr got %q", device, &stderr)
		}
	}
}

func TestOpenDevice(t *testing.T) {
	tests := []struct {
		name   string
		args   []string
		notice string // a piece of what stderr gets; "": nothing
	}{
		{"auto without a GPU", nil, "; using the software device"},
		{"soft", []string{"--device", "soft"}, ""},
		{"soft of some size", []string{"--device", "soft", "--soft-memory", "64MiB", "--soft-link", "1GB/s"}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := parseDeviceFlags(t, tt.args...)
			var stderr bytes.Buffer
			rt, dev, err := f.open(t.Context(), &stderr, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer rt.Close()
			if rt.Kind() != "soft" {
				t.Errorf("opened a device of kind %q, want soft", rt.Kind())
			}
			got := stderr.String()
			if !strings.Contains(got, tt.notice) || (got == "") != (tt.notice == "") || strings.Count(got, "\n") > 1 {
				t.Errorf("stderr got %q, want one line with %q", got, tt.notice)
			}
			if want := *f.softMemory; want != 0 && dev.TotalMemory() != want {
				t.Errorf("the device has %d bytes, want %d", dev.TotalMemory(), want)
			}
		})
	}
}

func TestOpenDeviceRefused(t *testing.T) {
	tests := []struct {
		name string
		args []string
		want exitCode
		text string // a piece of the error
	}{
		{"soft flags on a GPU", []string{"--device", "hip:1", "--soft-link", "1GB/s"}, exitUsage, "hip:1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rt, _, err := parseDeviceFlags(t, tt.args...).open(t.Context(), nil, nil)
			if err == nil {
				rt.Close()
				t.Fatal("a device was opened")
			}
			if got := codeOf(t.Context(), err); got != tt.want || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("code %d, error %q; want code %d and %q", got, err, tt.want, tt.text)
			}
		})
	}
}

func TestPickGPU(t *testing.T) {
	t.Parallel()
	rt, err := soft.OpenRuntime(soft.Options{Devices: 2, Memory: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer rt.Close()
	pickGPU := func(rt *amdhip.Runtime, index int) (*amdhip.Device, error) {
		f := deviceFlags{device: &deviceSpec{kind: "hip", index: index, named: true}, local: -1}
		devs, err := f.pickGPUs(rt, io.Discard)
		if err != nil {
			return nil, err
		}
		return devs[0], nil
	}
	if dev, err := pickGPU(rt, 1); err != nil || dev.Index() != 1 {
		t.Errorf("pickGPU(1) = %v, %v; want device 1", dev, err)
	}
	if _, err := pickGPU(rt, 2); err == nil || !strings.Contains(err.Error(), "has 2, numbered from 0") {
		t.Errorf("pickGPU(2): %v, want the number of devices", err)
	}
	soft.Of(rt).Inject(soft.Fault{Func: "hipGetDeviceCount", Code: amdhip.ErrNoDevice})
	if _, err := pickGPU(rt, 0); !errors.Is(err, amdhip.ErrNoDevice) {
		t.Errorf("pickGPU without a GPU: %v, want %v", err, amdhip.ErrNoDevice)
	}
}

func TestParseDevice(t *testing.T) {
	t.Parallel()
	tests := []struct {
		in   string
		want deviceSpec // zero: refused
	}{
		{"auto", deviceSpec{kind: "auto"}},
		{"soft", deviceSpec{kind: "soft"}},
		{"hip", deviceSpec{kind: "hip"}},
		{"hip:0", deviceSpec{kind: "hip", named: true}},
		{"hip:3", deviceSpec{kind: "hip", index: 3, named: true}},
		{"hip:0,2", deviceSpec{kind: "hip", list: "0,2"}},
		{"hip:all", deviceSpec{kind: "hip", list: "all"}},
		{"soft:4", deviceSpec{kind: "soft", list: "4"}},
		{"hip:0,0", deviceSpec{}},
		{"hip:0,", deviceSpec{}},
		{"soft:0", deviceSpec{}},
		{"soft:65", deviceSpec{}},
		{"soft:all", deviceSpec{}},
		{"auto:2", deviceSpec{}},
		{"hip:", deviceSpec{}},
		{"hip:-1", deviceSpec{}},
		{"hip:1e9", deviceSpec{}},
		{"hip:99999999999999999999", deviceSpec{}},
		{"soft:1", deviceSpec{kind: "soft", list: "1"}},
		{"toaster", deviceSpec{}},
		{"", deviceSpec{}},
	}
	for _, tt := range tests {
		t.Run(tt.in, func(t *testing.T) {
			t.Parallel()
			got, err := parseDevice(tt.in)
			if got != tt.want || (err == nil) != (tt.want != deviceSpec{}) {
				t.Errorf("parseDevice(%q) = %+v, %v; want %+v", tt.in, got, err, tt.want)
			}
		})
	}
}
