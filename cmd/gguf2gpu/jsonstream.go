package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
)

// jsonStream writes JSON piece by piece, for what is too large to be kept. It looks as what writeJSON writes. Errors of
// the writer come out of flush.
type jsonStream struct {
	w     *bufio.Writer
	ends  []byte // the brackets that are open, the last one last
	empty bool   // nothing has been written since the last opening bracket
	named bool   // a key has been written and not its value
	quote bool   // a text has been begun and not ended
	inKey bool   // it is a key
}

func newJSONStream(to io.Writer) *jsonStream {
	return &jsonStream{w: bufio.NewWriterSize(term.NewJSONWriter(to), 64<<10)}
}

// begin writes what stands before a value or a key.
func (s *jsonStream) begin() {
	if s.named {
		s.named = false
		return
	}
	if len(s.ends) > 0 {
		if !s.empty {
			_ = s.w.WriteByte(',')
		}
		s.newLine()
	}
	s.empty = false
}

// newLine begins a line. As all errors of the buffered writer, that of this one stays for flush.
func (s *jsonStream) newLine() {
	_ = s.w.WriteByte('\n')
	for range s.ends {
		_, _ = s.w.WriteString("  ")
	}
}

// open begins an object or an array, by its bracket.
func (s *jsonStream) open(bracket byte) {
	s.begin()
	_ = s.w.WriteByte(bracket)
	s.ends = append(s.ends, bracket+2) // ']' after '[', '}' after '{'
	s.empty = true
}

// close ends the last of them that is open.
func (s *jsonStream) close() {
	last := len(s.ends) - 1
	end := s.ends[last]
	s.ends = s.ends[:last]
	if !s.empty {
		s.newLine()
	}
	_ = s.w.WriteByte(end)
	s.empty = false
	if last == 0 {
		_ = s.w.WriteByte('\n')
	}
}

// key writes the key of a member.
func (s *jsonStream) key(name string) {
	s.inKey = true
	s.text(name)
	s.inKey = false
	_, _ = s.w.WriteString(": ")
	s.named = true
}

// text writes a text, of any length.
func (s *jsonStream) text(text string) {
	s.begin()
	_ = s.w.WriteByte('"')
	s.quote = true
	for piece := range pieces(text) {
		b := marshal(piece)
		_, _ = s.w.Write(b[1 : len(b)-1])
	}
	s.quote = false
	_ = s.w.WriteByte('"')
}

// literal writes a value that is JSON already.
func (s *jsonStream) literal(b []byte) {
	s.begin()
	_, _ = s.w.Write(b)
}

// value writes a value that is small enough to be converted at once.
func (s *jsonStream) value(v any) {
	var b bytes.Buffer
	prefix := bytes.Repeat([]byte("  "), len(s.ends))
	_ = json.Indent(&b, marshal(v), string(prefix), "  ") // it is JSON
	s.literal(b.Bytes())
}

// member writes a small member of an object.
func (s *jsonStream) member(name string, v any) {
	s.key(name)
	s.value(v)
}

// fail ends the outermost object, wherever the stream is in it, with the members error and code.
func (s *jsonStream) fail(f failure) {
	if s.quote {
		s.quote = false
		_ = s.w.WriteByte('"')
	}
	if s.inKey {
		s.inKey, s.named = false, true
		_, _ = s.w.WriteString(": ")
	}
	if s.named {
		s.literal([]byte("null"))
	}
	if len(s.ends) == 0 {
		s.open('{')
	}
	for len(s.ends) > 1 {
		s.close()
	}
	s.member("error", f.Error)
	s.member("code", f.Code)
	s.close()
}

func (s *jsonStream) flush() error { return s.w.Flush() }

// marshal converts a value that has nothing in it that could fail.
func marshal(v any) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}
