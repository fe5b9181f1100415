package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// TestProveOnGPU proves loads with the kernel that the simulated hipRTC compiles. A bit that the simulator flips in a
// copy is found; a load of the same without a proof ends well. Nothing is left on the device.
func TestProveOnGPU(t *testing.T) {
	t.Parallel()
	report := filepath.Join(t.TempDir(), "report")
	s := newSimulated(t).with("HIPSIM_REPORT="+report, "HIPSIM_DEVICES=2")
	for _, x := range []struct {
		copy int // that is damaged; kernels that convert are checked with the first copy to each device
		args string
	}{
		{1, ""},
		{1, "--dtype raw"},
		{2, "--dequant gpu"},
		{1, "--sync"},
		{2, "--device hip:0,1 --split none"},
		{3, "--device hip:0,1 --dequant gpu --dtype f32"},
	} {
		t.Run(x.args, func(t *testing.T) {
			args := append([]string{"--prove"}, strings.Fields(x.args)...)
			r, stderr := s.load(samplePath, args...)
			if !r.Proved || r.ProvedCount != r.Tensors || r.ProvedBytes == 0 || stderr != "" {
				t.Errorf("proved: %v, %d of %d tensors, %d bytes; %s", r.Proved, r.ProvedCount, r.Tensors, r.ProvedBytes, stderr)
			}
			if err := leftovers(report, nil); err != nil {
				t.Error(err)
			}
			args = append([]string{"load", samplePath, "--device", "hip", "--progress", "none"}, args...)
			flip := s.with(fmt.Sprintf("HIPSIM_FLIP=%d:9:6", x.copy))
			if _, stderr := flip.run(exitMismatch, args...); !strings.Contains(stderr, "is damaged on device ") ||
				!strings.Contains(stderr, "bit 6 of byte ") || !strings.Contains(stderr, `tensor "`) {
				t.Error(stderr)
			}
			if err := leftovers(report, nil); err != nil {
				t.Error(err)
			}
			flip.run(exitOK, append(args, "--prove=off")...)
		})
	}
}

// TestProveWithoutHipRTC: a load that is to be proved says why it cannot be, and another goes on without a proof.
func TestProveWithoutHipRTC(t *testing.T) {
	t.Parallel()
	s := newSimulated(t).with("GGUF2GPU_HIPRTC_LIBRARY=/nowhere/libhiprtc.so")
	_, stderr := s.run(exitNoDevice, "load", samplePath, "--device", "hip", "--prove", "--progress", "none")
	if !strings.Contains(stderr, "the load cannot be proved") || !strings.Contains(stderr, "/nowhere/libhiprtc.so") {
		t.Error(stderr)
	}
	r, stderr := s.load(samplePath)
	if r.Proved || r.Unproved == "" || stderr != "" {
		t.Errorf("proved: %v, %q; %s", r.Proved, r.Unproved, stderr)
	}
	stdout, _ := s.run(exitOK, "load", samplePath, "--device", "hip", "--progress", "none")
	if strings.Contains(stdout, "proved") {
		t.Error(stdout)
	}
}
