package main

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/dustin/go-humanize"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/term"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

const (
	// maxText is where inspect cuts a text without --full, in bytes. Chat templates have thousands.
	maxText = 72
	// maxColumn is the widest column that others are aligned behind, in characters.
	maxColumn = 64
)

// print writes what there is to say for people.
func (o *inspection) print(to io.Writer, path string) error {
	w := bufio.NewWriterSize(to, 64<<10)
	o.printSummary(w, path)
	o.printMetadata(w)
	if !*o.noTensors {
		o.printTensors(w)
	}
	return w.Flush()
}

// printSummary writes what the model is as a whole.
func (o *inspection) printSummary(w io.Writer, path string) {
	m, s := o.model, total(o.model)
	row := func(what, text string) { fmt.Fprintf(w, "%-14s  %s\n", what, text) }
	row("model", term.Safe(path))
	row("architecture", term.Safe(term.Shorten(m.Architecture(), maxText)))
	if bits := s.bitsPerWeight(); bits > 0 {
		row("quantization", fmt.Sprintf("%s, %.2f bits per weight", o.quantization(s), bits))
	}
	row("parameters", humanize.SIWithDigits(float64(s.elements), 2, ""))
	if text := o.shape().String(); text != "" {
		row("shape", text)
	}
	row("files", sizeText(m.Size()))
	for i, p := range m.Parts() {
		fmt.Fprintf(w, "  %s  GGUF version %d, %s, alignment %d, data at %#x, %d tensors\n", term.Safe(p.Path), p.Version,
			humanize.IBytes(uint64(p.Size)), p.Alignment, p.DataOffset, s.partTensors[i])
	}
	unknown := ""
	if s.unsized > 0 {
		unknown = fmt.Sprintf(", without %d tensors of unknown size", s.unsized)
	}
	fmt.Fprintf(w, "\nbytes on a device, by dtype%s\n", unknown)
	for _, p := range plan.Policies() {
		fmt.Fprintf(w, "  %-4v  %s\n", p, sizeText(s.deviceBytes[p.String()]))
	}
	fmt.Fprintln(w, "\ntypes in the file")
	var t columns
	names := slices.Sorted(maps.Keys(s.types))
	line := func(name string) []string {
		t := s.types[name]
		cells := []string{name, fmt.Sprintf("%d tensors", t.Tensors), sizeText(t.Bytes)}
		if t.Unsized > 0 {
			cells[2] = "size not known"
			if t.Bytes > 0 {
				cells[2] = fmt.Sprintf("%s and %d tensors of unknown size", sizeText(t.Bytes), t.Unsized)
			}
		}
		if t.Origin != "" {
			cells = append(cells, "not a type of ggml; from: "+t.Origin)
		}
		return cells
	}
	for _, name := range names {
		t.measure(line(name)...)
	}
	for _, name := range names {
		t.print(w, line(name)...)
	}
}

// String is the line of inspect about a model's shape, without what is not known.
func (s shape) String() string {
	var parts []string
	add := func(n uint64, format string) {
		if n > 0 {
			parts = append(parts, fmt.Sprintf(format, n))
		}
	}
	add(s.Layers, "%d layers")
	add(s.Heads, "%d heads")
	if s.KVHeads != s.Heads {
		add(s.KVHeads, "%d of keys and values")
	}
	add(s.Embedding, "embedding %d")
	add(s.FeedForward, "feed-forward %d")
	add(s.Context, "context %d")
	add(s.Vocabulary, "vocabulary %d")
	add(s.Experts, "%d experts")
	add(s.ExpertsUsed, "%d of them used at a time")
	return strings.Join(parts, ", ")
}

func (o *inspection) printMetadata(w io.Writer) {
	md := o.model.Metadata()
	var t columns
	shown := 0
	for key := range md.Keys() {
		if o.showsKey(key) {
			t.measure(keyText(key))
			shown++
		}
	}
	if shown == md.Len() {
		fmt.Fprintf(w, "\nmetadata, %d keys\n", shown)
	} else {
		fmt.Fprintf(w, "\nmetadata, %d of %d keys match\n", shown, md.Len())
	}
	for key, v := range md.All() {
		if o.showsKey(key) {
			t.begin(w, keyText(key))
			o.printValue(w, v)
			fmt.Fprintln(w)
		}
	}
}

func (o *inspection) printTensors(w io.Writer) {
	all := o.model.Tensors()
	var t columns
	shown, bytes := 0, uint64(0)
	for i := range all {
		if o.listsTensor(&all[i]) {
			t.measure(tensorCells(&all[i])...)
			shown++
			bytes += uint64(max(all[i].Size, 0))
		}
	}
	if shown == len(all) {
		fmt.Fprintf(w, "\ntensors, %d\n", shown)
	} else {
		fmt.Fprintf(w, "\ntensors, %d of %d match, %s\n", shown, len(all), sizeText(bytes))
	}
	for i := range all {
		if o.listsTensor(&all[i]) {
			t.print(w, tensorCells(&all[i])...)
		}
	}
}

// tensorCells is a tensor's line.
func tensorCells(t *gguf.Tensor) []string {
	dims := make([]string, len(t.Shape))
	for i, n := range t.Shape {
		dims[i] = fmt.Sprint(n)
	}
	shape := strings.Join(dims, " x ")
	if len(dims) == 0 {
		shape = "scalar"
	}
	size := "size not known"
	if t.Sized() {
		size = humanize.IBytes(uint64(t.Size))
	}
	return []string{keyText(t.Name), t.Type.String(), shape, fmt.Sprintf("part %d at %#x", t.Part, t.Offset), size}
}

// keyText returns a key or a name for one line of output.
func keyText(s string) string { return term.Safe(term.Shorten(s, 1024)) }

func sizeText(n uint64) string { return fmt.Sprintf("%d bytes (%s)", n, humanize.IBytes(n)) }

// columns aligns rows that are not kept: all of them are measured first, and then made once more to be printed.
type columns struct{ widths []int }

// measure makes room for a row. Cells of more than maxColumn characters stick out.
func (c *columns) measure(cells ...string) {
	for i, cell := range cells {
		if i == len(c.widths) {
			c.widths = append(c.widths, 0)
		}
		if n := utf8.RuneCountInString(cell); n <= maxColumn {
			c.widths[i] = max(c.widths[i], n)
		}
	}
}

// begin writes cells, all of them with their full width.
func (c *columns) begin(w io.Writer, cells ...string) {
	fmt.Fprint(w, "  ")
	for i, cell := range cells {
		fmt.Fprintf(w, "%-*s  ", c.widths[i], cell)
	}
}

// print writes a row.
func (c *columns) print(w io.Writer, cells ...string) {
	last := len(cells) - 1
	c.begin(w, cells[:last]...)
	fmt.Fprintln(w, cells[last])
}

// printValue writes a metadata value on one line, cut unless --full is given.
func (o *inspection) printValue(w io.Writer, v gguf.Value) {
	text, isText := v.Text()
	_, isArray := v.ElemKind()
	switch {
	case isText && *o.full:
		printText(w, text)
	case isText:
		fmt.Fprint(w, term.Quote(text, maxText))
	case isArray && *o.full:
		printArray(w, v)
	default:
		fmt.Fprint(w, v) // of an array, the first elements and its length
	}
}

// printText writes a text in quotes, piece by piece.
func printText(w io.Writer, text string) {
	fmt.Fprint(w, `"`)
	for piece := range pieces(text) {
		q := term.Quote(piece, len(piece))
		fmt.Fprint(w, q[1:len(q)-1])
	}
	fmt.Fprint(w, `"`)
}

// printArray writes all elements of an array.
func printArray(w io.Writer, v gguf.Value) {
	separator := "["
	for e := range elements(v) {
		fmt.Fprint(w, separator)
		separator = ", "
		switch {
		case e.isText:
			printText(w, e.text)
		case e.isArray:
			printArray(w, e.array)
		default:
			fmt.Fprint(w, e.text)
		}
	}
	if v.Len() == 0 {
		fmt.Fprint(w, "[")
	}
	fmt.Fprint(w, "]")
}
