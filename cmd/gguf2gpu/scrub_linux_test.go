package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestFlipsByCommand damages a bit of each copy of a load in turn, through the C boundary. Each is found: the load ends
// with 6, and names tensor, byte and bit. The first copies check kernels, and belong to no tensor.
func TestFlipsByCommand(t *testing.T) {
	t.Parallel()
	all := newSimulated(t).with("HIPSIM_DEVICES=2")
	for name, args := range map[string][]string{
		"raw":     {"--dtype", "raw", "--dequant", "cpu"},
		"f16 gpu": {"--dequant", "gpu", "--tensors", `^blk\.[01]\.attn`},
		"layers":  {"--dequant", "cpu", "--device", "hip:0,1"},
		"sync":    {"--dtype", "bf16", "--sync", "--tensors", `^blk\.0\.attn`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			report := filepath.Join(t.TempDir(), "report.json")
			s := all.with("HIPSIM_REPORT=" + report)
			s.t = t
			load := append([]string{"load", samplePath, "--device", "hip", "--prove", "--progress", "none"}, args...)
			if out, _ := s.run(exitOK, load...); !strings.Contains(out, "proved: ") {
				t.Errorf("undamaged: %s", out)
			}
			checks, found := 0, 0
			for n := 1; ; n++ {
				code, _, stderr := s.with(fmt.Sprintf("HIPSIM_FLIP=%d:777:3", n)).try(load...)
				b, err := os.ReadFile(report)
				if err != nil {
					t.Fatal(err)
				}
				var did struct{ Flips int }
				if err := json.Unmarshal(b, &did); err != nil {
					t.Fatal(err)
				}
				if did.Flips == 0 {
					break
				}
				switch {
				case code == exitMismatch && regexp.MustCompile(`tensor ".*" is damaged on device .*: bit 3 of byte [0-9]+`).MatchString(stderr):
					found++
				case found == 0 && (code == exitOK || strings.Contains(stderr, "kernel")):
					checks++
				default:
					t.Errorf("copy %d: exit code %d, stderr %s", n, code, stderr)
				}
			}
			if found < 2 || checks > 4 {
				t.Errorf("%d flips were found, %d were in checks of kernels", found, checks)
			}
			nothingLeft(t, report, nil)
		})
	}
}

// TestScrubByCommand lets a bit of device memory flip while a model is held. The holder finds it, names it and puts it
// right, and who attaches has the right bytes.
func TestScrubByCommand(t *testing.T) {
	t.Parallel()
	onRigs(t, func(t *testing.T, r *rig) {
		t.Parallel()
		if r.device == "hip" {
			r.env = append(r.env, newSimulated(t).env...) // it has a compiler
		}
		for _, share := range []string{"ipc", "fd"} {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			addr := l.Addr().String()
			l.Close()
			const flips = "1500ms:100000:3" // no load takes so long a rest
			args := []string{samplePath, "--scrub", "20ms", "--share", share, "--dtype", "raw", "--metrics", addr}
			damaged := *r
			if damaged.env = append(slices.Clone(r.env), "HIPSIM_FLIP="+flips); r.device == "soft" {
				args = append(args, "--soft-flip", flips)
			}
			h := damaged.hold(t, args...).isReady(t)
			until(t, "it is put right", func() bool {
				s := r.list(t)[0].Scrub
				return s != nil && s.Rewritten == 1
			})
			m := r.list(t)[0]
			if s := m.Scrub; s.Damaged != 1 || s.Now != 0 || s.Rewoken != 0 || s.Passes == 0 || !strings.Contains(s.Last, "bit 3 of byte") ||
				!m.Proved {
				t.Errorf("%+v, scrub %+v", m, s)
			}
			if a := r.attach(t, "--verify"); !a.Verified {
				t.Errorf("%+v", a)
			}
			answer, err := http.Get("http://" + addr + "/metrics")
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(answer.Body)
			answer.Body.Close()
			if want := fmt.Sprintf("gguf2gpu_scrub_rewritten_total{model=%q} 1\n", m.Name); err != nil || !strings.Contains(string(text), want) {
				t.Errorf("%v, no %q in\n%s", err, want, text)
			}
			h.ends(t, r)
		}
	})
}
