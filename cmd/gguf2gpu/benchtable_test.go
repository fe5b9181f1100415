package main

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/bench"
)

// TestBenchTable: rows fit the terminal as far as that is possible, what is left out is said, and elsewhere nothing is.
func TestBenchTable(t *testing.T) {
	t.Parallel()
	run := bench.Run{
		Mode: "async-gpu", DType: "bf16", Dequant: "gpu", Setting: "chunk=256 KiB", Seconds: []float64{1.25, 1.5, 1},
		Median: 1.25, GBps: 12.5, OfLink: 0.905, Device: 50, ReadGBps: 4.25, OfDisk: 1.014,
	}
	all, none := columnsFor(0)
	if len(all) != len(benchColumns) || none != nil {
		t.Errorf("no terminal: %d columns, without %q", len(all), none)
	}
	for _, width := range []int{0, 200, 128, 127, 100, 80, 72, 64, 40, 1} {
		var out bytes.Buffer
		table := &benchTable{out: &out, steps: newBenchSteps("none", io.Discard)}
		var dropped []string
		table.columns, dropped = columnsFor(width)
		table.line(func(c benchColumn) string { return c.head })
		table.row(bench.Ceilings{}, run)
		if len(table.columns)+len(dropped) != len(benchColumns) || (width == 0 || width >= 128) != (dropped == nil) {
			t.Errorf("%d: %d columns, without %q", width, len(table.columns), dropped)
		}
		lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
		for _, line := range lines {
			if n := utf8.RuneCountInString(line); width >= 63 && n > width || strings.HasSuffix(line, " ") {
				t.Errorf("%d: %d characters: %q", width, n, line)
			}
		}
		for _, want := range []string{"async-gpu", "bf16", "chunk=256 KiB", "1.2500", "12.50", "90.5 %"} {
			if !strings.Contains(lines[len(lines)-1], want) {
				t.Errorf("%d: %q lacks %s", width, lines[len(lines)-1], want)
			}
		}
		if full := strings.Contains(out.String(), "101.4 %"); full == slices.Contains(dropped, "of disk") {
			t.Errorf("%d: without %q: %s", width, dropped, &out)
		}
	}
}
