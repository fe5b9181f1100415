// Package term makes text that came from outside harmless to terminals.
//
// Names of files, tensors and metadata keys, values, and what servers and other processes say can hold anything: escape
// sequences that drive a terminal, line breaks that forge lines, marks that turn the direction of text. [Safe]
// and [Quote] are for single texts, such as a name in a table. A [Writer] is the last line of defence for a whole
// stream.
package term

import (
	"strconv"
	"strings"
	"unicode/utf8"
)

// Safe returns s as it is if all of it is plain text on one line, else in quotes, with escapes for all that is not.
// What is plain text is decided by [strconv.IsPrint]: no control characters, line separators or marks of direction.
func Safe(s string) string {
	if isPlain(s) {
		return s
	}
	return strconv.Quote(s)
}

func isPlain(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !strconv.IsPrint(r) })
}

// Quote returns s in quotes, with escapes for all that is not plain text. Of a text of more than limit bytes it takes
// the first ones, and adds the length: "abc"… (900 bytes).
func Quote(s string, limit int) string {
	if len(s) <= limit {
		return strconv.Quote(s)
	}
	return strconv.Quote(Cut(s, limit)) + "… (" + strconv.Itoa(len(s)) + " bytes)"
}

// Cut returns the first bytes of s, at most limit, without the beginning of a character at their end.
func Cut(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	for n := limit; n > limit-utf8.UTFMax && n >= 0; n-- {
		if utf8.RuneStart(s[n]) {
			return s[:n]
		}
	}
	return s[:limit] // it is not UTF-8
}

// Shorten returns s, cut after limit bytes with an ellipsis in place of the rest.
func Shorten(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	return Cut(s, limit) + "…"
}
