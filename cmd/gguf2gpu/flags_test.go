package main

import (
	"testing"
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
