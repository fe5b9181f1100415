package main

import (
	"bytes"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func TestPlainProgress(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		p := newProgress("plain", &out, "loading m.gguf")
		time.Sleep(1500 * time.Millisecond) // nothing is known yet: no line
		p.Update(1e9, 4e9)
		time.Sleep(time.Second)
		p.Update(4e9, 4e9)
		time.Sleep(400 * time.Millisecond)
		p.Finish()
		p.Abort() // the first end counts
		want := []string{
			"loading m.gguf: 1.00 GB of 4.00 GB (25%), 500 MB/s, 6s left",
			"loading m.gguf: done, 4.00 GB of 4.00 GB in 2.9s, 1.38 GB/s",
			"",
		}
		if diff := cmp.Diff(want, strings.Split(out.String(), "\n")); diff != "" {
			t.Errorf("lines differ (-want +got):\n%s", diff)
		}
	})
}

func TestProgressAborted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		p := newProgress("auto", &out, "loading") // a buffer is no terminal, so plain lines
		p.Update(1e6, 4e6)
		time.Sleep(500 * time.Millisecond)
		p.Abort()
		if got, want := out.String(), "loading: stopped, 1.00 MB of 4.00 MB in 500ms, 2.00 MB/s\n"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

func TestProgressNone(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	p := newProgress("none", &out, "loading")
	p.Update(1, 2)
	p.Finish()
	if out.Len() != 0 {
		t.Errorf("printed %q, want nothing", &out)
	}
}

func TestProgressBar(t *testing.T) {
	t.Parallel()
	for _, end := range []struct {
		name string
		end  func(*progress)
		want string
	}{
		{"finished", (*progress).Finish, "4.00 GB / 4.00 GB"},
		{"aborted", (*progress).Abort, "1.00 GB / 4.00 GB"},
	} {
		t.Run(end.name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			p := newProgress("bar", &out, "loading")
			p.Update(1e9, 4e9)
			end.end(p)
			if !strings.Contains(out.String(), end.want) {
				t.Errorf("drew %q, want %q in it", &out, end.want)
			}
		})
	}
}

// TestProgressBarWidths: whatever the terminal's width, a line fits it, words do not run into each other, and the share
// or the bytes can be read. Before the total is known nothing is drawn.
func TestProgressBarWidths(t *testing.T) {
	t.Parallel()
	for _, label := range []string{"loading", "loading " + strings.Repeat("long-name-", 9) + ".gguf"} {
		for _, width := range []int{120, 80, 64, 63, 48, 40, 36, 35, 20} {
			var out bytes.Buffer
			b := &bar{w: &out, label: label, width: width, started: time.Now().Add(-time.Second)}
			b.update(0, 0, 0)
			if out.Len() != 0 {
				t.Errorf("%d: drew %q before anything is known", width, &out)
			}
			b.update(1_234_560_000, 4e9, time.Second)
			b.end(1_234_560_000, 4e9, time.Second, true)
			lines := strings.FieldsFunc(out.String(), func(r rune) bool { return r == '\n' || r == '\r' })
			last := strings.TrimPrefix(strings.TrimPrefix(lines[len(lines)-1], "\x1b[1A"), "\x1b[J")
			if n := utf8.RuneCountInString(last); n > width {
				t.Errorf("%d: a line of %d characters: %q", width, n, last)
			}
			want := `^loading( .*)?…? (31 %)`
			if width >= 64 {
				want = `^loading( .*)?…? (1\.23 GB / 4\.00 GB) \[`
			}
			if width >= 36 {
				want += `.*\] [0-9.]+ [GM]B/s [0-9]`
			}
			if !regexp.MustCompile(want).MatchString(last) {
				t.Errorf("%d: drew %q, want %s", width, last, want)
			}
		}
	}
}

// TestProgressUpdate has many goroutines report at once, in any order: the largest number stays.
func TestProgressUpdate(t *testing.T) {
	t.Parallel()
	p := newProgress("none", nil, "")
	defer p.Finish()
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 1000 {
				p.Update(int64(i*8+g), 8000)
			}
		})
	}
	wg.Wait()
	if got, want := p.done.Load(), int64(7999); got != want {
		t.Errorf("done = %d, want %d", got, want)
	}
}

// TestProgressAllocates runs without others, as AllocsPerRun counts what the whole process allocates.
func TestProgressAllocates(t *testing.T) {
	p := newProgress("none", nil, "")
	defer p.Finish()
	if allocs := testing.AllocsPerRun(100, func() { p.Update(8000, 8000) }); allocs != 0 {
		t.Errorf("Update allocates %v times, want 0", allocs)
	}
}

func TestProgressJSON(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		p := newProgress("json", &out, "loading \x1bm.gguf")
		p.Update(0, 4e9)
		time.Sleep(1500 * time.Millisecond)
		p.Update(1e9, 4e9)
		p.Abort()
		const label = `"label":"\"loading \\x1bm.gguf\""`
		want := `{"event":"progress",` + label + `,"done_bytes":0,"total_bytes":4000000000,"seconds":1}` + "\n" +
			`{"event":"stopped",` + label + `,"done_bytes":1000000000,"total_bytes":4000000000,"seconds":1.5}` + "\n"
		if diff := cmp.Diff(want, out.String()); diff != "" {
			t.Errorf("lines differ (-want +got):\n%s", diff)
		}
	})
}
