package bench

import (
	"encoding/xml"
	"fmt"
	"strings"
	"unicode/utf8"
)

// boldFactor is how much wider bold text is, at most.
const boldFactor = 1.2

// textWidth estimates how wide s is in a font of this size. Nobody knows which font the reader has, so it is what the
// widest usual one needs, DejaVu Sans, or a little more.
func textWidth(s string, size float64) float64 {
	width := 0.0
	for _, r := range s {
		width += runeWidth(r)
	}
	return width * size
}

// runeWidth returns the width of a character, as a share of the size of the font.
func runeWidth(r rune) float64 {
	switch {
	case r == '–' || r == '*' || r == '†' || r == '‡':
		return 0.6
	case r >= utf8.RuneSelf:
		return 1.4 // letters of East Asia take 1, pictures more
	case strings.ContainsRune("fijlrtIJ.,:;'|!()[] -/\\`", r):
		return 0.46
	case strings.ContainsRune("mwMW%@+=<>~#^&", r):
		return 1
	case r >= 'A' && r <= 'Z':
		return 0.8
	}
	return 0.64
}

// cut returns s, or as much of its beginning as is at most width wide, with an ellipsis behind it.
func cut(s string, width, size float64) string {
	if textWidth(s, size) <= width {
		return s
	}
	width -= textWidth("…", size)
	for i, r := range s {
		if width -= runeWidth(r) * size; width < 0 {
			return s[:i] + "…"
		}
	}
	return s
}

// wrap divides s between words into lines that are at most width wide.
func wrap(s string, width, size float64) []string {
	var lines []string
	line := ""
	for word := range strings.FieldsSeq(s) {
		longer := join(" ", line, word)
		if line != "" && textWidth(longer, size) > width {
			lines, longer = append(lines, line), word
		}
		line = longer
	}
	return append(lines, line)
}

// drawing collects the elements of an SVG document.
type drawing struct{ strings.Builder }

func (d *drawing) printf(format string, args ...any) { fmt.Fprintf(d, format, args...) }

// number writes a coordinate with as few digits as are needed.
func number(v float64) string {
	return strings.TrimSuffix(strings.TrimRight(fmt.Sprintf("%.2f", v), "0"), ".")
}

// text writes s at the baseline y; anchor says which end of it is at x. more is further attributes.
func (d *drawing) text(x, y, size float64, anchor, color, s, more string) {
	if s == "" {
		return
	}
	d.printf(`<text x="%s" y="%s" font-size="%s" text-anchor="%s" fill="%s"%s>`, number(x), number(y), number(size),
		anchor, color, more)
	_ = xml.EscapeText(d, []byte(s)) // a Builder takes all
	d.printf("</text>\n")
}

func (d *drawing) rect(class string, x, y, width, height float64, color, more string) {
	d.printf(`<rect class="%s" x="%s" y="%s" width="%s" height="%s" fill="%s"%s/>`+"\n", class, number(x), number(y),
		number(width), number(height), color, more)
}

// line draws a line; dashes may be empty.
func (d *drawing) line(class string, x1, y1, x2, y2 float64, color string, width float64, dashes string) {
	if dashes != "" {
		dashes = ` stroke-dasharray="` + dashes + `"`
	}
	d.printf(`<line class="%s" x1="%s" y1="%s" x2="%s" y2="%s" stroke="%s" stroke-width="%s"%s/>`+"\n", class,
		number(x1), number(y1), number(x2), number(y2), color, number(width), dashes)
}
