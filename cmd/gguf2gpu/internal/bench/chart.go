package bench

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/dustin/go-humanize"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
)

// Caption is what a chart says beside the figures, so that it can stand alone. Empty fields are left out.
type Caption struct {
	Model     string // its name
	FileBytes uint64
	Device    string // its name
	CPU       string // the model of the CPU
	Cores     int    // logical ones that the program may use
	Date      string
	Version   string // of the program
}

// Sizes in the chart, in units of its viewBox. The reader's program scales all of it, so that only their proportions
// count.
const (
	chartWidth  = 900
	chartMargin = 16
	rowHeight   = 20
	groupGap    = 10
	labelWidth  = 176 // of the names of rows
	swatch      = 22  // width of a sample in the legend
	axisHeight  = 44  // the numbers below the axis, and its title

	titleSize = 16
	textSize  = 12
	smallSize = 11
)

// Colors of the chart. They can be told apart by people who see no red or no green, and in print without color.
const (
	inkColor    = "#222222"
	quietColor  = "#555555"
	gridColor   = "#dddddd"
	syncColor   = "#9aa5b1"
	asyncColor  = "#2f6fb5"
	deviceColor = "#bcd3ea"
	coldColor   = "#4fa37a"
	linkColor   = "#c0392b"
	diskColor   = "#7d3c98"
)

// colors are those of the bars.
var colors = map[Mode]string{Sync: syncColor, Async: asyncColor, AsyncGPU: asyncColor, Cold: coldColor}

// column is a column of figures to the right of the bars. Its head has two lines.
type column struct {
	head  string
	unit  string
	width float64
	text  func(run *Run) string
}

// chart is a chart in the making.
type chart struct {
	drawing
	report  *LoadsReport
	groups  [][]Run
	columns []column
	left    float64 // of the plot
	right   float64
	top     float64 // the greatest speed on the axis, in GB/s
	step    float64 // between two ticks, in GB/s
	beyond  bool    // some link is too fast for the axis
	single  bool    // each load was made once: there are neither medians nor spreads
}

// Chart draws the runs of r as bars of GB/s beside the speed of the link, as an SVG document that needs no other file.
// The same caption and report always make the same document. Errors are those of w.
func Chart(w io.Writer, about Caption, r *LoadsReport) error {
	c := newChart(r)
	y := c.drawHead(about)
	y = c.drawLegend(y + 8)
	y = c.drawRows(y + 10)
	y = c.drawNotes(y + axisHeight)
	height := int(math.Ceil(y)) + chartMargin/2
	_, err := fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" `+
		`font-family="Helvetica, Arial, 'DejaVu Sans', sans-serif" font-size="%d" fill="%s">`+"\n"+
		`<rect class="paper" x="0" y="0" width="%d" height="%d" fill="white"/>`+"\n%s</svg>\n",
		chartWidth, height, textSize, inkColor, chartWidth, height, c.String())
	return err
}

// newChart decides what depends on the figures: the groups, the columns, the axis and the marks.
func newChart(r *LoadsReport) *chart {
	c := &chart{report: r, left: chartMargin + labelWidth + 8, single: true}
	fastest, link, expanded := 0.0, 0.0, false
	for _, run := range slices.Concat(r.Runs, r.Scaling) {
		if n := len(c.groups); n > 0 && groupOf(&c.groups[n-1][0]) == groupOf(&run) {
			c.groups[n-1] = append(c.groups[n-1], run)
		} else {
			c.groups = append(c.groups, []Run{run})
		}
		c.single = c.single && len(run.Seconds) <= 1
		_, most := spread(&run)
		fastest = max(fastest, run.GBps, most)
		if onDevice(&run) {
			expanded = true
			fastest = max(fastest, run.Device)
		}
		_, high := c.band(&run)
		link = max(link, high)
	}
	// A link that is many times faster than all loads would leave no room to compare them.
	if c.beyond = link > 3*fastest && fastest > 0; !c.beyond {
		fastest = max(fastest, link)
	}
	c.top, c.step = axis(fastest)

	c.columns = []column{{c.speedName(), "GB/s", 64, func(run *Run) string { return figure(run.GBps) }}}
	if expanded {
		c.columns = append(c.columns, column{"on device", "GB/s", 70, func(run *Run) string {
			if onDevice(run) {
				return figure(run.Device)
			}
			return ""
		}})
	}
	c.columns = append(c.columns, column{"link", "GB/s", 116, func(run *Run) string {
		low, high := c.band(run)
		if figure(low) == figure(high) {
			return figure(low)
		}
		return figure(low) + "–" + figure(high)
	}}, column{"share of", "ceiling", 104, c.share})
	c.right = chartWidth - chartMargin
	for _, col := range c.columns {
		c.right -= col.width
	}
	c.right -= 16
	return c
}

// speedName is what the speed of a kind of load is called.
func (c *chart) speedName() string {
	if c.single {
		return "speed"
	}
	return "median"
}

// groupOf returns what the runs of a group have in common. Between two groups the link is measured.
func groupOf(run *Run) string {
	return fmt.Sprint(run.Mode == Cold, run.DType, settingKind(run.Setting))
}

// onDevice reports whether the device has made more of the bytes than came over the link.
func onDevice(run *Run) bool { return run.Dequant == "gpu" }

// spread returns the least and the greatest speed of the single loads, in GB/s.
func spread(run *Run) (least, most float64) {
	if len(run.Seconds) == 0 || slices.Min(run.Seconds) <= 0 {
		return run.GBps, run.GBps
	}
	bytes := run.GBps * run.Median
	return bytes / slices.Max(run.Seconds), bytes / slices.Min(run.Seconds)
}

// band returns the least and the greatest speed of the link around run, in GB/s.
func (c *chart) band(run *Run) (low, high float64) {
	if run.LinkMost == 0 { // a report of a program that measured it once
		return c.report.Ceilings.H2D, c.report.Ceilings.H2D
	}
	return run.LinkLeast, run.LinkMost
}

// Marks of shares above 100 %, each with the note that explains it.
const (
	withinMark = "*"
	aboveMark  = "†"
	diskMark   = "‡"
)

var markNotes = []struct{ mark, note string }{
	{withinMark, "Above 100 %: the median lies within the band that the link itself reached around this group."},
	{aboveMark, "Above 100 %: faster than the link each time that it was measured around this group. Something else " +
		"slowed the link while it was measured alone, or copies side by side carry more than one after the other, as " +
		"on the software device."},
	{diskMark, "Above 100 %: faster than the disk each time that it was read alone, before and after these loads; a " +
		"cache of the disk or of its host helped, or the file is too small to measure the disk."},
}

// share returns how much of its ceiling run has reached, with a mark if it is above 100 %.
func (c *chart) share(run *Run) string {
	low, high := c.band(run)
	name, speed, ceiling, mark := "link", run.GBps, (low+high)/2, withinMark
	if run.GBps > high {
		mark = aboveMark
	}
	if run.Mode == Cold && c.report.Ceilings.ReadCold > 0 {
		name, speed, ceiling, mark = "disk", run.ReadGBps, c.report.Ceilings.ReadCold, diskMark
	}
	if ceiling <= 0 {
		return ""
	}
	share := math.Round(100 * speed / ceiling)
	if share <= 100 {
		mark = ""
	}
	return fmt.Sprintf("%.0f %% %s%s", share, name, mark)
}

// figure returns a speed with three digits that count.
func figure(v float64) string {
	switch {
	case v >= 1e6 || v != 0 && v < 1e-3:
		return fmt.Sprintf("%.2g", v)
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// axis returns where an axis that shows fastest ends, and the step between its ticks: 1, 2 or 5 times a power of ten,
// so that there are three to seven.
func axis(fastest float64) (top, step float64) {
	if fastest <= 0 || math.IsInf(fastest, 0) || math.IsNaN(fastest) {
		return 1, 0.2
	}
	step = math.Pow(10, math.Floor(math.Log10(fastest)))
	switch n := fastest / step; {
	case n <= 1.2:
		step /= 5
	case n <= 3:
		step /= 2
	case n > 6:
		step *= 2
	}
	return step * math.Ceil(fastest/step-1e-9), step
}

// x returns where a speed in GB/s is on the axis.
func (c *chart) x(speed float64) float64 {
	return c.left + (c.right-c.left)*min(max(speed, 0)/c.top, 1)
}

// drawHead writes what was measured, on what and when. It returns where the next part begins, as all such functions do.
func (c *chart) drawHead(about Caption) float64 {
	const width = chartWidth - 2*chartMargin
	y := float64(chartMargin + titleSize)
	title := "Loading " + cmp.Or(term.Safe(about.Model), "a model")
	size := ""
	if about.FileBytes > 0 {
		size = " (" + humanize.Bytes(about.FileBytes) + ")"
	}
	title = cut(title, width-boldFactor*textWidth(size, titleSize), titleSize*boldFactor) + size
	c.text(chartMargin, y, titleSize, "start", inkColor, title, ` font-weight="bold"`)
	var cpu string
	if about.Cores > 0 {
		cores := fmt.Sprintf(", %d logical cores", about.Cores)
		room := width/2 - textWidth("; host: "+cores, smallSize)
		cpu = cut(cmp.Or(term.Safe(about.CPU), "CPU"), room, smallSize) + cores
	}
	runs := slices.Concat(c.report.Runs, c.report.Scaling)
	count := ""
	if len(runs) > 0 {
		byCount := func(a, b Run) int { return cmp.Compare(len(a.Seconds), len(b.Seconds)) }
		least, most := len(slices.MinFunc(runs, byCount).Seconds), len(slices.MaxFunc(runs, byCount).Seconds)
		count = fmt.Sprintf("n = %s of each kind", counted(most))
		if least < most {
			count = fmt.Sprintf("n = %d to %d runs of each kind", least, most)
		}
	}
	for _, line := range []string{
		join("; ", cut(prefix("device: ", term.Safe(about.Device)), width/2, smallSize), prefix("host: ", cpu)),
		join("; ", about.Date, count, prefix("gguf2gpu ", term.Safe(about.Version))),
	} {
		if line == "" {
			continue
		}
		y += 17
		c.text(chartMargin, y, smallSize, "start", quietColor, cut(line, width, smallSize), "")
	}
	return y + 6
}

// prefix returns s behind a word, or nothing if s is empty.
func prefix(word, s string) string {
	if s == "" {
		return ""
	}
	return word + s
}

// join joins what is not empty.
func join(separator string, parts ...string) string {
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), separator)
}

// drawLegend says what colors and lines stand for, of those that the chart has.
func (c *chart) drawLegend(y float64) float64 {
	x := float64(chartMargin)
	y += rowHeight
	sample := func(name string, draw func(x, y float64)) {
		width := swatch + 6 + textWidth(name, smallSize)
		if x+width > chartWidth-chartMargin && x > chartMargin {
			x, y = chartMargin, y+rowHeight
		}
		draw(x, y-4)
		c.text(x+swatch+6, y, smallSize, "start", inkColor, name, "")
		x += width + 18
	}
	box := func(color string) func(x, y float64) {
		return func(x, y float64) { c.rect("sample", x, y-5, swatch, 10, color, "") }
	}
	for _, kind := range []struct {
		mode Mode
		name string
	}{
		{Sync, "sync: one blocking copy at a time"},
		{Async, "async: pipeline"},
		{Cold, "cold: pipeline, file not in the page cache"},
	} {
		if c.has(func(run *Run) bool { return colors[run.Mode] == colors[kind.mode] }) {
			sample(kind.name, box(colors[kind.mode]))
		}
	}
	if c.has(onDevice) {
		sample("on the device, after it has converted", box(deviceColor))
	}
	sample(c.speedName(), func(x, y float64) { c.line("sample", x+swatch/2, y-6, x+swatch/2, y+6, inkColor, 2.5, "") })
	if !c.single {
		sample("least to most", func(x, y float64) { c.whisker("sample", x+2, x+swatch-2, y) })
	}
	name := "link, before and after the group"
	if c.beyond {
		name = "link: faster than the axis shows"
	}
	sample(name, func(x, y float64) {
		if c.beyond {
			c.arrow("sample", x+swatch/2+4, y)
			return
		}
		c.drawBand("sample", x+4, x+swatch-4, y-7, 14)
	})
	if c.report.Ceilings.ReadCold > 0 && c.has(func(run *Run) bool { return run.Mode == Cold }) {
		sample("disk", func(x, y float64) { c.line("sample", x+swatch/2, y-7, x+swatch/2, y+7, diskColor, 2, "3 2") })
	}
	return y + 8
}

// has reports whether f is true of a run.
func (c *chart) has(f func(*Run) bool) bool {
	return slices.ContainsFunc(c.groups, func(g []Run) bool {
		return slices.ContainsFunc(g, func(run Run) bool { return f(&run) })
	})
}

// drawRows draws the heads of the columns, the rows and the axis below them.
func (c *chart) drawRows(y float64) float64 {
	y += rowHeight
	at := c.right + 16
	for _, col := range c.columns {
		at += col.width
		c.text(at, y-13, smallSize, "end", inkColor, col.head, "")
		c.text(at, y, smallSize, "end", quietColor, col.unit, "")
	}
	y += 8
	top := y
	bottom := y + groupGap*float64(len(c.groups)+1)
	for _, g := range c.groups {
		bottom += rowHeight * float64(len(g))
	}
	for i := range int(math.Round(c.top/c.step)) + 1 {
		v := float64(i) * c.step
		c.line("grid", c.x(v), top, c.x(v), bottom+4, gridColor, 1, "")
		c.text(c.x(v), bottom+17, smallSize, "middle", inkColor, fmt.Sprintf("%.4g", v), "")
	}
	for i, g := range c.groups {
		y += groupGap
		c.drawGroup(g, y)
		y += rowHeight * float64(len(g))
		if i+1 < len(c.groups) {
			c.line("rule", chartMargin, y+groupGap/2, chartWidth-chartMargin, y+groupGap/2, gridColor, 1, "")
		}
	}
	c.line("axis", c.left, bottom, c.right, bottom, inkColor, 1, "")
	c.line("axis", c.left, top, c.left, bottom, inkColor, 1, "")
	c.text((c.left+c.right)/2, bottom+34, textSize, "middle", inkColor, "transfer speed in GB/s", "")
	return bottom
}

// drawGroup draws the rows of a group, the first of them at y.
func (c *chart) drawGroup(g []Run, y float64) {
	for i := range g {
		run, y := &g[i], y+rowHeight*float64(i)
		label := join(" ", string(run.Mode), run.DType, run.Setting)
		c.text(c.left-8, y+14, textSize, "end", inkColor, cut(term.Safe(label), labelWidth, textSize), "")
		if onDevice(run) {
			c.rect("bar", c.left, y+3, c.x(run.Device)-c.left, rowHeight-6, deviceColor, "")
		}
		c.rect("bar", c.left, y+3, c.x(run.GBps)-c.left, rowHeight-6, colors[run.Mode], "")
		at := c.right + 16
		for _, col := range c.columns {
			at += col.width
			c.text(at, y+14, textSize, "end", inkColor, cut(col.text(run), col.width-6, textSize), "")
		}
	}
	height := rowHeight * float64(len(g))
	// The band lies over the bars, but under whiskers and medians.
	if low, high := c.band(&g[0]); c.beyond {
		c.arrow("beyond", c.right+11, y+height/2)
	} else if high > 0 {
		c.drawBand("band", c.x(low), c.x(high), y, height)
	}
	for i := range g {
		run, y := &g[i], y+rowHeight*float64(i)
		if len(run.Seconds) > 1 {
			least, most := spread(run)
			c.whisker("whisker", c.x(least), c.x(most), y+rowHeight/2)
		}
		c.line("median", c.x(run.GBps), y+2, c.x(run.GBps), y+rowHeight-2, inkColor, 2.5, "")
		if disk := c.report.Ceilings.ReadCold; run.Mode == Cold && disk > 0 && disk <= c.top {
			c.line("disk", c.x(disk), y-1, c.x(disk), y+rowHeight+1, diskColor, 2, "3 2")
		}
	}
}

// drawNotes explains the units, the band, and shares above 100 %.
func (c *chart) drawNotes(y float64) float64 {
	notes := []string{"GB/s = 10⁹ bytes per second over the link, from the first read to the last copy. Shares are of " +
		"the middle of what the link reached before and after the group of runs (shown as link); for cold loads, of " +
		"reading the disk."}
	for _, m := range markNotes {
		if c.has(func(run *Run) bool { return strings.HasSuffix(c.share(run), m.mark) }) {
			notes = append(notes, m.mark+" "+m.note)
		}
	}
	for _, note := range notes {
		for _, line := range wrap(note, chartWidth-2*chartMargin, smallSize) {
			y += 15
			c.text(chartMargin, y, smallSize, "start", quietColor, line, "")
		}
		y += 3
	}
	return y
}

// drawBand draws what the link reached, from x1 to x2.
func (c *chart) drawBand(class string, x1, x2, y, height float64) {
	c.rect(class, x1, y, max(x2-x1, 1), height, linkColor, ` fill-opacity="0.25"`)
	c.line(class, x1, y, x1, y+height, linkColor, 1, "")
	c.line(class, max(x2, x1+1), y, max(x2, x1+1), y+height, linkColor, 1, "")
}

// whisker draws a line with ends, from x1 to x2.
func (c *chart) whisker(class string, x1, x2, y float64) {
	c.line(class, x1, y, x2, y, inkColor, 1.2, "")
	c.line(class, x1, y-4, x1, y+4, inkColor, 1.2, "")
	c.line(class, x2, y-4, x2, y+4, inkColor, 1.2, "")
}

// arrow draws an arrow that points to the right, up to x.
func (c *chart) arrow(class string, x, y float64) {
	c.printf(`<path class="%s" d="M%s %s l-9 -6 v12 z" fill="%s"/>`+"\n", class, number(x), number(y), linkColor)
}
