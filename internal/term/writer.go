package term

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"unicode/utf8"
)

// Writer writes text through to another writer, with escapes in place of characters that could drive a terminal: \x1b
// for an escape character, \u202e for a mark of direction, \xff for a byte that is no UTF-8. Line breaks and tabs pass.
// A Writer is for one goroutine at a time.
type Writer struct {
	to   io.Writer
	json bool
	part []byte // the beginning of a character whose rest has not been written yet
}

// NewWriter returns a Writer for text.
func NewWriter(to io.Writer) *Writer { return &Writer{to: to} }

// NewJSONWriter returns a Writer for JSON. Its escapes are those of JSON strings, so that the values stay what they
// were.
func NewJSONWriter(to io.Writer) *Writer { return &Writer{to: to, json: true} }

// Write writes b. The error is that of the writer behind, and the count is then 0.
func (w *Writer) Write(b []byte) (int, error) {
	n := len(b)
	if len(w.part) > 0 {
		b = append(w.part, b...)
		w.part = nil
	}
	if rest := unfinished(b); rest > 0 {
		w.part = bytes.Clone(b[len(b)-rest:])
		b = b[:len(b)-rest]
	}
	if err := w.write(b); err != nil {
		return 0, err
	}
	return n, nil
}

// Flush writes what Write has kept back: the beginning of a character whose end did not come.
func (w *Writer) Flush() error {
	b := w.part
	w.part = nil
	return w.write(b)
}

// write writes b, all of which is there.
func (w *Writer) write(b []byte) error {
	var out []byte // nil as long as nothing had to be escaped
	for i := 0; i < len(b); {
		r, size := rune(b[i]), 1
		if r >= utf8.RuneSelf {
			r, size = utf8.DecodeRune(b[i:])
		}
		if passes(r, size) {
			if out != nil {
				out = append(out, b[i:i+size]...)
			}
		} else {
			if out == nil {
				out = append(make([]byte, 0, len(b)+64), b[:i]...)
			}
			out = w.escape(out, b[i:i+size], r)
		}
		i += size
	}
	if out == nil {
		out = b
	}
	if len(out) == 0 {
		return nil
	}
	_, err := w.to.Write(out)
	return err
}

// passes reports whether the character r, which takes size bytes, may reach a terminal.
func passes(r rune, size int) bool {
	switch {
	case r >= ' ' && r <= '~', r == '\n', r == '\t':
		return true
	case r == utf8.RuneError && size == 1: // not UTF-8
		return false
	}
	return strconv.IsPrint(r)
}

// escape appends the escape for r, which was encoded as b.
func (w *Writer) escape(out, b []byte, r rune) []byte {
	switch {
	case w.json && r > 0xffff:
		r -= 0x10000
		return fmt.Appendf(out, `\u%04x\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
	case w.json:
		return fmt.Appendf(out, `\u%04x`, r)
	case r == utf8.RuneError || r < utf8.RuneSelf:
		for _, c := range b {
			out = fmt.Appendf(out, `\x%02x`, c)
		}
		return out
	}
	q := strconv.AppendQuoteRune(nil, r) // in single quotes
	return append(out, q[1:len(q)-1]...)
}

// unfinished returns how many bytes at the end of b are the beginning of a character.
func unfinished(b []byte) int {
	for n := 1; n < utf8.UTFMax && n <= len(b); n++ {
		if c := b[len(b)-n]; utf8.RuneStart(c) {
			if c >= utf8.RuneSelf && !utf8.FullRune(b[len(b)-n:]) {
				return n
			}
			return 0
		}
	}
	return 0
}
