package main

import (
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/loader"
)

func TestParseBytes(t *testing.T) {
	t.Parallel()
	tests := []struct {
		in   string
		want uint64 // 0: refused
	}{
		{"4096", 4096},
		{"256KiB", 256 << 10},
		{"64MiB", 64 << 20},
		{"16GiB", 16 << 30},
		{"1.5GiB", 3 << 29},
		{"16GB", 16_000_000_000},
		{"64 mib", 64 << 20},
		{"0", 0},
		{"", 0},
		{"-1", 0},
		{"MiB", 0},
		{"64parsecs", 0},
		{"99999999EiB", 0},
	}
	for _, tt := range tests {
		t.Run(tt.in, func(t *testing.T) {
			t.Parallel()
			got, err := parseBytes(tt.in)
			if got != tt.want || (err == nil) != (tt.want != 0) {
				t.Errorf("parseBytes(%q) = %d, %v; want %d", tt.in, got, err, tt.want)
			}
		})
	}
}

func TestParseRate(t *testing.T) {
	t.Parallel()
	tests := []struct {
		in   string
		want float64 // 0: refused
	}{
		{"25GB/s", 25e9},
		{"800MB/s", 800e6},
		{"1GiB/s", 1 << 30},
		{"25GB", 25e9},
		{"0GB/s", 0},
		{"25GB/h", 0},
		{"5", 0},
		{"/s", 0},
		{"fast", 0},
	}
	for _, tt := range tests {
		t.Run(tt.in, func(t *testing.T) {
			t.Parallel()
			got, err := parseRate(tt.in)
			if got != tt.want || (err == nil) != (tt.want != 0) {
				t.Errorf("parseRate(%q) = %g, %v; want %g", tt.in, got, err, tt.want)
			}
		})
	}
}

// TestProveFlag: --prove alone means on, and takes one of its words with or without an equals sign.
func TestProveFlag(t *testing.T) {
	t.Parallel()
	for _, x := range []struct{ args, want string }{
		{"load m --prove", "load m --prove"},
		{"load --prove m", "load --prove m"},
		{"load --prove on m", "load --prove=on m"},
		{"load m --prove OFF --json", "load m --prove=OFF --json"},
		{"load --prove=auto on", "load --prove=auto on"},
		{"load --prove --prove off -- --prove on", "load --prove --prove=off -- --prove on"},
		{"load --prove maybe", "load --prove maybe"},
		{"", ""},
	} {
		if got := strings.Join(joinProve(strings.Fields(x.args)), " "); got != x.want {
			t.Errorf("%q becomes %q, want %q", x.args, got, x.want)
		}
	}
	for text, want := range map[string]loader.Prove{
		"": loader.ProveAuto, "--prove": loader.ProveOn, "--prove=off": loader.ProveOff, "--prove=On": loader.ProveOn,
	} {
		fs := pflag.NewFlagSet("", pflag.ContinueOnError)
		p := proveFlag(fs)
		if err := fs.Parse(strings.Fields(text)); err != nil || *p != want {
			t.Errorf("%q: %v, %v, want %v", text, *p, err, want)
		}
	}
}
