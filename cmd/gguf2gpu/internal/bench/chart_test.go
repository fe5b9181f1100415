package bench

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// testRun returns three loads of 10 GB with a median of speed GB/s over a link of 50 GB/s or a little more.
func testRun(mode Mode, dtype, setting string, speed float64) Run {
	median := 10 / speed
	run := Run{
		Mode: mode, DType: dtype, Setting: setting, Dequant: "cpu", Seconds: []float64{0.95 * median, median, 1.2 * median},
		Median: median, GBps: speed, Device: speed, ReadGBps: speed, LinkLeast: 50, LinkMost: 52,
	}
	if mode == AsyncGPU {
		run.Dequant, run.Device = "gpu", 3.2*speed
	}
	return run
}

// testReports returns reports that are as different as those that people get.
func testReports() map[string]*LoadsReport {
	all := []Run{
		testRun(Sync, "raw", "", 8.1), testRun(Async, "raw", "", 49.3),
		testRun(Sync, "f16", "", 2.2), testRun(Async, "f16", "", 51.7), testRun(AsyncGPU, "f16", "", 46.4),
		testRun(Sync, "f32", "", 2.6), testRun(Async, "f32", "", 56), testRun(AsyncGPU, "f32", "", 45.9),
		testRun(Cold, "raw", "", 6.4),
	}
	var scaling []Run
	for i, v := range variants(Setup{}) {
		scaling = append(scaling, testRun(Async, "f16", v.name, 10+2.7*float64(i)))
	}
	ceilings := Ceilings{H2D: 51, Memcpy: 80, Read: 70, ReadCold: 6.1}
	// As on the software device. The load in the middle ends where the axis does.
	slow := []Run{testRun(Sync, "f16", "", 0.9), testRun(Async, "f16", "", 1.42), testRun(AsyncGPU, "f16", "", 0.3)}
	reports := map[string]*LoadsReport{
		"all":       {Ceilings: ceilings, Runs: all, Scaling: scaling},
		"one dtype": {Ceilings: ceilings, Runs: all[:2]},
		"far link":  {Ceilings: ceilings, Runs: slow},
		"once":      {Ceilings: ceilings, Runs: once(all)},
		"empty":     {},
		"zero":      {Runs: []Run{{Mode: Async, DType: "raw", Seconds: []float64{0}}}},
	}
	for name, factor := range map[string]float64{"tiny": 1e-7, "small": 0.01, "large": 13, "huge": 1e9} {
		r := &LoadsReport{Ceilings: ceilings, Runs: slices.Clone(all)}
		r.Ceilings.H2D *= factor
		r.Ceilings.ReadCold *= factor
		for i := range r.Runs {
			for _, v := range []*float64{
				&r.Runs[i].GBps, &r.Runs[i].Device, &r.Runs[i].ReadGBps, &r.Runs[i].LinkLeast, &r.Runs[i].LinkMost,
			} {
				*v *= factor
			}
		}
		reports[name] = r
	}
	return reports
}

// once returns runs of which each was made once.
func once(runs []Run) []Run {
	runs = slices.Clone(runs)
	for i := range runs {
		runs[i].Seconds = []float64{runs[i].Median}
	}
	return runs
}

// testCaptions are short, usual and far too long.
func testCaptions() map[string]Caption {
	long := strings.Repeat("Wm<ö模\x1b[1m\u202e", 90)
	return map[string]Caption{
		"none": {},
		"usual": {
			Model: "Llama-3.3-70B-Instruct-Q4_K_M.gguf", FileBytes: 42_520_395_584, Device: "AMD Instinct MI300X",
			CPU: "AMD EPYC 9554 64-Core Processor", Cores: 128, Date: "2026-05-04", Version: "v0.3.1 go1.26.8",
		},
		"long": {
			Model: long, FileBytes: math.MaxUint64, Device: long, CPU: long, Cores: 1 << 20, Date: "2026-05-04",
			Version: long,
		},
	}
}

// box is the place of an element of a chart.
type box struct {
	name, class    string
	x1, y1, x2, y2 float64
}

// overlaps reports whether a and b share an area.
func (a box) overlaps(b box) bool { return a.x1 < b.x2 && b.x1 < a.x2 && a.y1 < b.y2 && b.y1 < a.y2 }

// parseChart returns the boxes of texts and of all other elements, and the viewBox.
func parseChart(t *testing.T, svg string) (texts, shapes []box, view box) {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(svg))
	var text *box
	var size float64
	var anchor string
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return texts, shapes, view
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, svg)
		}
		switch e := token.(type) {
		case xml.StartElement:
			attr := func(name string) string {
				i := slices.IndexFunc(e.Attr, func(a xml.Attr) bool { return a.Name.Local == name })
				if i < 0 {
					t.Fatalf("<%s> has no %s in\n%s", e.Name.Local, name, svg)
				}
				return e.Attr[i].Value
			}
			num := func(name string) float64 {
				v, err := strconv.ParseFloat(attr(name), 64)
				if err != nil || math.IsNaN(v) || math.IsInf(v, 0) {
					t.Fatalf("%s of <%s> is %q", name, e.Name.Local, attr(name))
				}
				return v
			}
			switch e.Name.Local {
			case "svg":
				if _, err := fmt.Sscanf(attr("viewBox"), "%f %f %f %f", &view.x1, &view.y1, &view.x2, &view.y2); err != nil {
					t.Fatalf("viewBox %q: %v", attr("viewBox"), err)
				}
			case "rect":
				x, y := num("x"), num("y")
				shapes = append(shapes, box{"rect", attr("class"), x, y, x + num("width"), y + num("height")})
			case "line":
				shapes = append(shapes, box{
					"line", attr("class"), min(num("x1"), num("x2")), min(num("y1"), num("y2")),
					max(num("x1"), num("x2")), max(num("y1"), num("y2")),
				})
			case "path":
				var x, y float64
				if _, err := fmt.Sscanf(attr("d"), "M%f %f", &x, &y); err != nil {
					t.Fatalf("path %q: %v", attr("d"), err)
				}
				shapes = append(shapes, box{"path", attr("class"), x - 9, y - 6, x, y + 6})
			case "text":
				size, anchor = num("font-size"), attr("text-anchor")
				text = &box{class: "text", x1: num("x"), y1: num("y") - 0.8*size, y2: num("y") + 0.22*size}
			}
		case xml.CharData:
			if text == nil {
				continue
			}
			text.name = string(e)
			width := textWidth(text.name, size)
			switch anchor {
			case "end":
				text.x1 -= width
			case "middle":
				text.x1 -= width / 2
			}
			text.x2 = text.x1 + width
			texts, text = append(texts, *text), nil
		}
	}
}

// TestChartLayout draws all reports with all captions. Nothing may be outside of the paper, and no text over another
// text or over a bar, a band or a mark.
func TestChartLayout(t *testing.T) {
	t.Parallel()
	for name, r := range testReports() {
		for captionName, about := range testCaptions() {
			t.Run(name+" "+captionName, func(t *testing.T) {
				t.Parallel()
				svg := drawn(t, about, r)
				texts, shapes, view := parseChart(t, svg)
				for i, a := range texts {
					if captionName != "long" && strings.HasSuffix(a.name, "…") {
						t.Errorf("%q was cut", a.name)
					}
					for _, b := range texts[i+1:] {
						if a.overlaps(b) {
							t.Errorf("%q overlaps %q: %+v, %+v", a.name, b.name, a, b)
						}
					}
					for _, b := range shapes {
						if b.class != "paper" && b.class != "grid" && a.overlaps(b) {
							t.Errorf("%q overlaps a %s: %+v, %+v", a.name, b.class, a, b)
						}
					}
				}
				for _, b := range slices.Concat(texts, shapes) {
					if b.x1 < view.x1 || b.y1 < view.y1 || b.x2 > view.x2 || b.y2 > view.y2 {
						t.Errorf("%s %q is outside of the paper: %+v, %+v", b.class, b.name, b, view)
					}
				}
				if svg != drawn(t, about, r) {
					t.Error("drawn again it is another document")
				}
			})
		}
	}
}

// drawn returns the chart of r.
func drawn(t *testing.T, about Caption, r *LoadsReport) string {
	t.Helper()
	var b strings.Builder
	if err := Chart(&b, about, r); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestChartContent looks for all that a reader needs: what was measured on what, units, ticks, figures, marks and
// notes, and a bar, a median and a whisker for each run.
func TestChartContent(t *testing.T) {
	t.Parallel()
	r := testReports()["all"]
	texts, shapes, _ := parseChart(t, drawn(t, testCaptions()["usual"], r))
	for _, want := range []string{
		"Loading Llama-3.3-70B-Instruct-Q4_K_M.gguf (43 GB)",
		"device: AMD Instinct MI300X; host: AMD EPYC 9554 64-Core Processor, 128 logical cores",
		"2026-05-04; n = 3 runs of each kind; gguf2gpu v0.3.1 go1.26.8",
		"transfer speed in GB/s", "0", "50", "150",
		"link, before and after the group", "least to most", "median", "disk",
		"async f16", "async-gpu f32", "async f16 chunk=256 KiB", "cold raw",
		"50.0–52.0", "46.4", "147",
		"97 % link", // of 51
		"101 % link" + withinMark, "110 % link" + aboveMark, "105 % disk" + diskMark,
	} {
		if !slices.ContainsFunc(texts, func(b box) bool { return b.name == want }) {
			t.Errorf("%q is not in the chart", want)
		}
	}
	for _, m := range markNotes {
		if !slices.ContainsFunc(texts, func(b box) bool { return strings.HasPrefix(b.name, m.mark+" Above 100 %") }) {
			t.Errorf("no note for the mark %s", m.mark)
		}
	}
	count := func(class string) (n int) {
		for _, b := range shapes {
			if b.class == class {
				n++
			}
		}
		return n
	}
	runs := len(r.Runs) + len(r.Scaling)
	if bars, medians, whiskers := count("bar"), count("median"), count("whisker"); bars != runs+2 || medians != runs ||
		whiskers != 3*runs {
		t.Errorf("%d bars, %d medians, %d lines of whiskers; want %d (two runs have two bars), %d, %d", bars, medians,
			whiskers, runs+2, runs, 3*runs)
	}
	if n := count("band"); n != 3*7 { // raw, f16, f32, cold, threads, streams, chunk
		t.Errorf("%d parts of bands, want three for each of 7 groups", n)
	}
	if n := count("beyond"); n != 0 {
		t.Errorf("%d arrows, though the axis has room for the link", n)
	}
}

// TestChartPlaces compares lengths with figures: a bar ends at its median, and whiskers at the least and the most.
func TestChartPlaces(t *testing.T) {
	t.Parallel()
	r := testReports()["one dtype"]
	_, shapes, _ := parseChart(t, drawn(t, Caption{}, r))
	c := newChart(r)
	for i, run := range r.Runs {
		nth := func(class string, n int) box {
			for _, b := range shapes {
				if b.class != class {
					continue
				}
				if n--; n < 0 {
					return b
				}
			}
			t.Fatalf("no %s", class)
			return box{}
		}
		bar, whisker := nth("bar", i), nth("whisker", 3*i)
		scale := (c.right - c.left) / c.top
		for _, x := range []struct {
			what      string
			got, want float64
		}{
			{"bar", bar.x2 - bar.x1, run.GBps * scale},
			{"least", whisker.x1 - bar.x1, run.GBps / 1.2 * scale},
			{"most", whisker.x2 - bar.x1, run.GBps / 0.95 * scale},
		} {
			if math.Abs(x.got-x.want) > 0.02 {
				t.Errorf("%s %s: %s at %g, want %g", run.Mode, run.DType, x.what, x.got, x.want)
			}
		}
	}
}

// TestChartFarLink shows by an arrow and figures a link that is so fast that bars beside it would be lines.
func TestChartFarLink(t *testing.T) {
	t.Parallel()
	r := testReports()["far link"]
	texts, shapes, _ := parseChart(t, drawn(t, Caption{}, r))
	var arrows, bands int
	for _, b := range shapes {
		switch b.class {
		case "beyond":
			arrows++
			for _, other := range shapes {
				if other.class != "paper" && other.class != "beyond" && b.overlaps(other) {
					t.Errorf("the arrow overlaps a %s: %+v, %+v", other.class, b, other)
				}
			}
		case "band":
			bands++
		}
	}
	if arrows != 1 || bands != 0 {
		t.Errorf("%d arrows and %d parts of bands, want one arrow", arrows, bands)
	}
	if !slices.ContainsFunc(texts, func(b box) bool { return b.name == "50.0–52.0" }) {
		t.Error("the speed of the link is not in the chart")
	}
}

// TestChartOnce: of loads that were made once nothing is called a median, and no spread is drawn.
func TestChartOnce(t *testing.T) {
	t.Parallel()
	texts, shapes, _ := parseChart(t, drawn(t, Caption{}, testReports()["once"]))
	for _, b := range texts {
		if b.name == "median" || b.name == "least to most" {
			t.Errorf("%q is in the chart", b.name)
		}
	}
	if !slices.ContainsFunc(texts, func(b box) bool { return b.name == "n = 1 run of each kind" }) {
		t.Error("the chart does not say that each load was made once")
	}
	if slices.ContainsFunc(shapes, func(b box) bool { return b.class == "whisker" }) {
		t.Error("the chart has whiskers")
	}
}

// TestAxis wants round steps, and room for all.
func TestAxis(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ fastest, top, step float64 }{
		{0, 1, 0.2},
		{math.Inf(1), 1, 0.2},
		{math.NaN(), 1, 0.2},
		{1, 1, 0.2},
		{1.2, 1.2, 0.2},
		{1.3, 1.5, 0.5},
		{3, 3, 0.5},
		{3.1, 4, 1},
		{6, 6, 1},
		{6.1, 8, 2},
		{9.9, 10, 2},
		{55, 60, 10},
		{0.07, 0.08, 0.02},
	} {
		top, step := axis(tt.fastest)
		if math.Abs(top-tt.top) > 1e-9 || math.Abs(step-tt.step) > 1e-9 {
			t.Errorf("axis(%g) is up to %g by %g, want %g by %g", tt.fastest, top, step, tt.top, tt.step)
		}
	}
}

// TestTextWidth compares estimates with widths of DejaVu Sans, in thousandths of the size.
func TestTextWidth(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]float64{
		"Llama-3.3-70B-Instruct-Q4_K_M.gguf":          18371,
		"async f16 chunk=256 KiB":                     12884,
		"AMD EPYC 9554 64-Core Processor":             17503,
		"NVIDIA H100 80GB HBM3":                       12761,
		"50.0–52.0":                                   4953,
		"101 % link*":                                 5763,
		"110 % link†":                                 5763,
		"The quick brown fox jumps over the lazy dog": 22544,
		"ABCDEFGHIJKLMNOPQRSTUVWXYZ":                  17489,
		"abcdefghijklmnopqrstuvwxyz":                  14646,
		"0123456789":                                  6362,
		"(),.:;-+*/=%_":                               6414,
	} {
		if got := 1000 * textWidth(s, 1); got < want || got > 1.6*want {
			t.Errorf("%q: %.0f, want %.0f or a little more", s, got, want)
		}
	}
}

// TestCutAndWrap keeps texts within a width.
func TestCutAndWrap(t *testing.T) {
	t.Parallel()
	const s = "The quick brown fox jumps over the lazy dog"
	for width := 20.0; width < 400; width += 7 {
		if got := cut(s, width, 12); textWidth(got, 12) > width || got != s && !strings.HasSuffix(got, "…") {
			t.Errorf("cut to %g: %q is %g wide", width, got, textWidth(got, 12))
		}
		lines := wrap(s, width, 12)
		if got := strings.Join(lines, " "); got != s {
			t.Errorf("wrapped to %g: %q", width, lines)
		}
		for _, line := range lines {
			if textWidth(line, 12) > width && strings.Contains(line, " ") {
				t.Errorf("wrapped to %g: %q is %g wide", width, line, textWidth(line, 12))
			}
		}
	}
	if got := cut("a–b", 1000, 12); got != "a–b" {
		t.Errorf("%q was cut", got)
	}
}

// TestChartWriteError returns the error of the writer.
func TestChartWriteError(t *testing.T) {
	t.Parallel()
	full := errors.New("disk is full")
	if err := Chart(failingWriter{full}, Caption{}, &LoadsReport{}); !errors.Is(err, full) {
		t.Errorf("got %v, want %v", err, full)
	}
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }
