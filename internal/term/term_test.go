package term

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestSafe(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"":                     "",
		"model.gguf":           "model.gguf",
		"Modèle 7B «ü».gguf":   "Modèle 7B «ü».gguf",
		"a\x1b[31m":            `"a\x1b[31m"`,
		"a\nb":                 `"a\nb"`,
		"a\tb":                 `"a\tb"`,
		"\x7f":                 `"\x7f"`,
		"\u009b31m":            `"\u009b31m"`,
		"\u202egnp.exe":        `"\u202egnp.exe"`,
		"\u2066x\u2069\u200f":  `"\u2066x\u2069\u200f"`,
		"line\u2028end\u2029":  `"line\u2028end\u2029"`,
		"\xff\xfe":             `"\xff\xfe"`,
		"say \"x\" and \\":     "say \"x\" and \\",
		"\"\x00\" in a string": `"\"\x00\" in a string"`,
	} {
		if got := Safe(in); got != want {
			t.Errorf("Safe(%q) = %s, want %s", in, got, want)
		}
	}
}

func TestQuote(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		in    string
		limit int
		want  string
	}{
		{"abc", 3, `"abc"`},
		{"abcd", 3, `"abc"… (4 bytes)`},
		{"aüb", 2, `"a"… (4 bytes)`},
		{"aüb", 3, `"aü"… (4 bytes)`},
		{"\xff\xff\xff\xff\xff\xff", 5, `"\xff\xff\xff\xff\xff"… (6 bytes)`},
		{"\x80\x80\x80", 2, `"\x80\x80"… (3 bytes)`},
		{"\x80\x80\x80", 0, `""… (3 bytes)`},
		{"\x1b[0m", 9, `"\x1b[0m"`},
	} {
		if got := Quote(tt.in, tt.limit); got != tt.want {
			t.Errorf("Quote(%q, %d) = %s, want %s", tt.in, tt.limit, got, tt.want)
		}
	}
	if got, want := Shorten("aüb", 2), "a…"; got != want {
		t.Errorf("Shorten gives %q, want %q", got, want)
	}
}

// nasty has every kind of character that must not reach a terminal.
const nasty = "a\x00\x07\x08\x1b[31m\r\x7f\u0085\u009b\u061c\u200b\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\ufeff" +
	"\xff\xc3\U000e0041 ok: ü 漢 🙂\n\tend"

func TestWriter(t *testing.T) {
	t.Parallel()
	const want = `a\x00\x07\x08\x1b[31m\x0d\x7f\u0085\u009b\u061c\u200b\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\ufeff` +
		`\xff\xc3\U000e0041 ok: ü 漢 🙂` + "\n\tend"
	for size := 1; size <= len(nasty); size++ { // however it is cut into writes
		var out bytes.Buffer
		w := NewWriter(&out)
		for rest := nasty; rest != ""; {
			n := min(size, len(rest))
			if got, err := w.Write([]byte(rest[:n])); got != n || err != nil {
				t.Fatalf("Write gives %d, %v, want %d", got, err, n)
			}
			rest = rest[n:]
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		if out.String() != want {
			t.Fatalf("in writes of %d bytes\n%s\nwant\n%s", size, &out, want)
		}
	}
}

// TestWriterEnds flushes the beginning of a character.
func TestWriterEnds(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	w := NewWriter(&out)
	fmt.Fprint(w, "x\xe2\x80")
	if out.String() != "x" {
		t.Errorf("before Flush: %q", &out)
	}
	if err := w.Flush(); err != nil || out.String() != `x\xe2\x80` {
		t.Errorf("Flush: %v, %q", err, &out)
	}
}

// TestJSONWriter wants the same values from what the Writer has escaped.
func TestJSONWriter(t *testing.T) {
	t.Parallel()
	value := strings.ToValidUTF8(nasty, "?")
	var plain, out bytes.Buffer
	enc := json.NewEncoder(&plain)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(value); err != nil {
		t.Fatal(err)
	}
	if _, err := NewJSONWriter(&out).Write(plain.Bytes()); err != nil {
		t.Fatal(err)
	}
	if !isPlain(strings.TrimSuffix(out.String(), "\n")) {
		t.Errorf("raw characters are left in %q", &out)
	}
	var got string
	if err := json.Unmarshal(out.Bytes(), &got); err != nil || got != value {
		t.Errorf("%v: got %q, want %q", err, got, value)
	}
}

type broken struct{}

var errBroken = errors.New("broken")

func (broken) Write([]byte) (int, error) { return 0, errBroken }

func TestWriterFails(t *testing.T) {
	t.Parallel()
	if n, err := NewWriter(broken{}).Write([]byte("x")); n != 0 || !errors.Is(err, errBroken) {
		t.Errorf("%d, %v; want 0 and the error", n, err)
	}
}
