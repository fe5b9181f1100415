package main

import (
	"fmt"
	"html"
	"io"
	"slices"
)

// Measures of the chart, in pixels.
const (
	chartWidth  = 860
	chartLabel  = 250
	chartRow    = 24
	chartMargin = 16
)

// drawBench draws the runs as bars of GB/s beside the link's ceiling, as an SVG document that needs nothing else.
func drawBench(w io.Writer, r *benchReport) error {
	runs := slices.Concat(r.Runs, r.Scaling)
	top := r.Ceilings.H2D
	for _, run := range runs {
		top = max(top, run.GBps, run.Device)
	}
	if top == 0 {
		top = 1
	}
	full := float64(chartWidth - chartLabel - 2*chartMargin - 140) // room for the figures on the right
	height := chartMargin*2 + chartRow*(len(runs)+3)
	d := &drawing{w: w}
	d.printf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="13">`+"\n",
		chartWidth, height)
	d.printf(`<rect width="100%%" height="100%%" fill="white"/>` + "\n")
	d.printf(`<text x="%d" y="%d" font-weight="bold">%s on %s</text>`+"\n", chartMargin, chartMargin+12,
		html.EscapeString(r.Model), html.EscapeString(r.Device.Name))
	y := chartMargin + 2*chartRow
	ceiling := float64(chartLabel) + full*r.Ceilings.H2D/top
	for _, run := range runs {
		label := run.Mode + " " + run.DType
		if run.Setting != "" {
			label += " " + run.Setting
		}
		color := map[string]string{modeSync: "#9aa5b1", modeAsync: "#2f6fb5", modeAsyncGPU: "#2f6fb5", modeCold: "#4fa37a"}[run.Mode]
		d.printf(`<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", chartLabel-8, y+15, html.EscapeString(label))
		length, figures := full*run.GBps/top, fmt.Sprintf("%.2f GB/s", run.GBps)
		end := length
		if run.Dequant == "gpu" { // what travelled lies on what became of it
			end = full * run.Device / top
			d.printf(`<rect x="%d" y="%d" width="%.1f" height="%d" fill="#bcd3ea"/>`+"\n", chartLabel, y+3, end, chartRow-6)
			figures = fmt.Sprintf("%.2f → %.2f GB/s", run.GBps, run.Device)
		}
		d.printf(`<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", chartLabel, y+3, length, chartRow-6, color)
		d.printf(`<text x="%.1f" y="%d">%s</text>`+"\n", chartLabel+max(length, end)+6, y+15, figures)
		y += chartRow
	}
	d.printf(`<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#c0392b" stroke-dasharray="4 3"/>`+"\n", ceiling,
		chartMargin+2*chartRow-6, ceiling, y)
	d.printf(`<text x="%.1f" y="%d" fill="#c0392b" text-anchor="middle">link: %.2f GB/s</text>`+"\n",
		ceiling, y+15, r.Ceilings.H2D)
	d.printf("</svg>\n")
	return d.err
}

// drawing writes until the first error and keeps it.
type drawing struct {
	w   io.Writer
	err error
}

func (d *drawing) printf(format string, args ...any) {
	if d.err == nil {
		_, d.err = fmt.Fprintf(d.w, format, args...)
	}
}
