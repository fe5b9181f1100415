package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/bench"
)

// benchColumn is a column of the table of bench.
type benchColumn struct {
	head  string
	width int // in characters; below 0 for what begins at the left
	// drop says which columns are left out first where a terminal is too narrow for all: those with the highest number.
	// 0: never.
	drop int
	text func(r bench.Run) string
}

// benchColumns are the columns from left to right.
var benchColumns = []benchColumn{
	{"mode", -9, 0, func(r bench.Run) string { return string(r.Mode) }},
	{"dtype", -5, 0, func(r bench.Run) string { return r.DType }},
	{"dequant", -7, 1, func(r bench.Run) string { return r.Dequant }},
	{"setting", -15, 0, func(r bench.Run) string { return r.Setting }},
	{"seconds", 9, 0, func(r bench.Run) string { return fmt.Sprintf("%.4f", r.Median) }},
	{"min", 9, 3, func(r bench.Run) string { return fmt.Sprintf("%.4f", slices.Min(r.Seconds)) }},
	{"max", 9, 4, func(r bench.Run) string { return fmt.Sprintf("%.4f", slices.Max(r.Seconds)) }},
	{"GB/s", 7, 0, func(r bench.Run) string { return fmt.Sprintf("%.2f", r.GBps) }},
	{"of link", 8, 0, func(r bench.Run) string { return fmt.Sprintf("%.1f %%", 100*r.OfLink) }},
	{"device GB/s", 11, 2, func(r bench.Run) string { return fmt.Sprintf("%.2f", r.Device) }},
	{"read GB/s", 9, 5, func(r bench.Run) string { return fmt.Sprintf("%.2f", r.ReadGBps) }},
	{"of disk", 8, 6, func(r bench.Run) string {
		if r.OfDisk == 0 {
			return ""
		}
		return fmt.Sprintf("%.1f %%", 100*r.OfDisk)
	}},
}

const benchGap = 2 // between two columns

// columnsFor returns the columns that fit a terminal, and the heads of those that do not; width 0 is no terminal.
func columnsFor(width int) (columns []benchColumn, dropped []string) {
	columns = slices.Clone(benchColumns)
	for width > 0 {
		total, last := -benchGap, -1
		for i, c := range columns {
			total += max(c.width, -c.width) + benchGap
			if c.drop > 0 && (last < 0 || c.drop > columns[last].drop) {
				last = i
			}
		}
		if total <= width || last < 0 {
			break
		}
		dropped = append(dropped, columns[last].head)
		columns = slices.Delete(columns, last, last+1)
	}
	return columns, dropped
}

// benchTable prints what bench measures as it comes.
type benchTable struct {
	out     io.Writer
	steps   *benchSteps
	columns []benchColumn // nil until the first row
}

// row prints one kind of load.
func (t *benchTable) row(c bench.Ceilings, run bench.Run) {
	t.steps.clear()
	if t.columns == nil {
		var dropped []string
		t.columns, dropped = columnsFor(terminalWidth(t.out))
		fmt.Fprintf(t.out, "ceilings: link %.2f GB/s, file read %.2f\n", c.H2D, c.Read)
		if len(dropped) > 0 {
			fmt.Fprintf(t.out, "for want of width without: %s\n", strings.Join(dropped, ", "))
		}
		fmt.Fprintln(t.out)
		t.line(func(c benchColumn) string { return c.head })
	}
	t.line(func(c benchColumn) string { return c.text(run) })
}

func (t *benchTable) line(text func(benchColumn) string) {
	cells := make([]string, len(t.columns))
	for i, c := range t.columns {
		cells[i] = fmt.Sprintf("%*s", c.width, text(c))
	}
	fmt.Fprintln(t.out, strings.TrimRight(strings.Join(cells, strings.Repeat(" ", benchGap)), " "))
}
