package main

import (
	"encoding/binary"
	"path/filepath"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// TestNamesOfHeldModels: whatever names a file has, and the file itself, none of them reaches a terminal raw: not from
// a holder, nor from those who list what it holds, attach to it or ask for what it does not have.
func TestNamesOfHeldModels(t *testing.T) {
	t.Parallel()
	r := newRig(t, "soft")
	one := make([]byte, 8*4)
	for i := range 8 {
		binary.LittleEndian.PutUint32(one[4*i:], 0x3f800000)
	}
	path := filepath.Join(r.dir, "m"+control+".gguf")
	writeOdd(t, path, map[string]any{"general.name": control}, []oddTensor{
		{"blk.0." + control, gguf.F32, []uint64{8}, len(one)}, {control + ".weight", gguf.F16, []uint64{8}, 16},
	})
	h := r.hold(t, path, "--name", "m", "--log-level", "debug", "--progress", "plain", "--verify").isReady(t)
	for _, p := range []*process{
		r.start(t, "attach"), r.start(t, "attach", "--json"), r.start(t, "attach", "--verify"),
		r.start(t, "hold", "--list"), r.start(t, "hold", "--list", "--json"), r.start(t, "attach", control),
		r.start(t, "hold", "--drop", control), r.start(t, "hold", "--sleep", control), r.start(t, "hold", "--add", path+control),
		r.start(t, "hold", "--add", path), r.start(t, "attach", "--readback", "/nowhere"+control+"/x"),
		r.start(t, "attach", "--verify", "--file", path+control), r.start(t, "attach", "--readback", path),
	} {
		<-p.ended
		isHarmless(t, p.stdout.String())
		isHarmless(t, p.stderr.String())
		if p.stdout.String()+p.stderr.String() == "" {
			t.Errorf("%q says nothing", p.Args)
		}
	}
	isHarmless(t, h.stdout.String())
	isHarmless(t, h.stderr.String())
	for _, args := range [][]string{
		{"load", path, "--hash", "-"},
		{"load", path, "--plan"},
		{"load", path, "--verify", "--log-level", "debug"},
		{"load", path, "--json"},
		{"load", path, "--device", "soft:2"},
		{"bench", path, "--runs", "1", "--scaling=false", "--dtype", "raw"},
	} {
		isHarmless(t, runCommand(t, append(args, "--device", "soft", "--progress", "none")...))
	}
}
