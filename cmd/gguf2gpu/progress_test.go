package main

import (
	"bytes"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

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
