package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

// steps writes a report of every kind of value, as far as the first n steps go.
func steps(s *jsonStream, n int) {
	all := []func(){
		func() { s.open('{') },
		func() { s.member("a", 1) },
		func() { s.key("<text> & \x1b\u202e") },
		func() { s.text(strings.Repeat("ü\n\"\xff", maxPiece/3)) },
		func() { s.key("list") },
		func() { s.open('[') },
		func() { s.open('[') },
		func() { s.close() },
		func() { s.open('{') },
		func() { s.key("k") },
		func() { s.literal([]byte("2.5")) },
		func() { s.close() },
		func() { s.value(map[string][]int{"x": {1, 2}}) },
		func() { s.close() },
		func() { s.member("end", struct{}{}) },
		func() { s.close() },
	}
	for _, step := range all[:min(n, len(all))] {
		step()
	}
}

// TestJSONStream wants what writeJSON makes of the same values.
func TestJSONStream(t *testing.T) {
	t.Parallel()
	var got, want bytes.Buffer
	s := newJSONStream(&got)
	steps(s, 100)
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	err := writeJSON(&want, struct {
		A    int            `json:"a"`
		Text string         `json:"text"`
		List []any          `json:"list"`
		End  map[string]int `json:"end"`
	}{1, strings.Repeat("ü\n\"\xff", maxPiece/3), []any{[]int{}, map[string]any{"k": 2.5}, map[string][]int{"x": {
		1,
		2,
	}}}, map[string]int{}})
	if err != nil {
		t.Fatal(err)
	}
	expected := strings.Replace(want.String(), `"text"`, `"<text> & \u001b\u202e"`, 1)
	if got.String() != expected {
		t.Errorf("got\n%.300s\nwant\n%.300s", &got, expected)
	}
}

// TestJSONStreamFails breaks off after every step: what was written is one valid object with the error in it.
func TestJSONStreamFails(t *testing.T) {
	t.Parallel()
	for n := range 16 {
		for _, within := range []string{"", "text", "key"} {
			var out bytes.Buffer
			s := newJSONStream(&out)
			steps(s, n)
			if n > 0 && !s.named && s.ends[len(s.ends)-1] == '}' && within == "key" {
				s.begin()
				_, _ = s.w.WriteString(`"ab`)
				s.quote, s.inKey = true, true
			}
			if s.named && within == "text" {
				s.begin()
				_, _ = s.w.WriteString(`"ab`)
				s.quote = true
			}
			s.fail(failure{Error: "broken", Code: exitBadModel})
			if err := s.flush(); err != nil {
				t.Fatal(err)
			}
			var got failure
			if err := json.Unmarshal(out.Bytes(), &got); err != nil || got.Error != "broken" || got.Code != exitBadModel {
				t.Errorf("%d steps, in a %s: %v, %+v in\n%s", n, within, err, got, &out)
			}
		}
	}
}
