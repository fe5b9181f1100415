package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/pflag"
	xterm "golang.org/x/term"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
)

const (
	barInterval   = 100 * time.Millisecond // often enough to look smooth
	plainInterval = time.Second            // seldom enough for a log file
)

// progressFlag registers --progress.
func progressFlag(fs *pflag.FlagSet) *string {
	return choiceFlag(fs, "progress", "auto",
		"how progress is shown on stderr; auto is a bar on a terminal, else plain lines; json is an object on each line",
		progressModes...)
}

var progressModes = []string{"auto", "bar", "plain", "json", "none"}

// progress shows how far a job of a known number of bytes has come. Update may be called often and from several
// goroutines: it only stores numbers, and a goroutine of the progress's own prints them now and then. That goroutine
// ends in Finish or Abort, one of which must be called.
type progress struct {
	done, total atomic.Int64
	show        display
	started     time.Time
	stop        chan struct{} // closed by end
	stopped     chan struct{} // closed when the printing goroutine has returned
	once        sync.Once
}

// display is one way of showing progress. Its methods are called by one goroutine at a time.
type display interface {
	interval() time.Duration
	update(done, total int64, elapsed time.Duration)
	end(done, total int64, elapsed time.Duration, aborted bool)
}

// newProgress starts to show progress on stderr in one of the modes of --progress. The label says what goes on
// ("loading model.gguf").
func newProgress(mode string, stderr io.Writer, label string) *progress {
	label = term.Safe(label) // it may name a file, and a bar is not written through a console
	p := &progress{started: time.Now(), stop: make(chan struct{}), stopped: make(chan struct{})}
	if mode == "auto" {
		mode = "plain"
		if isTerminal(stderr) {
			mode = "bar"
		}
	}
	switch mode {
	case "bar":
		p.show = &bar{w: stderr, label: label, width: terminalWidth(stderr), started: p.started}
	case "plain":
		p.show = &plainLines{w: stderr, label: label}
	case "json":
		p.show = &jsonLines{w: stderr, label: label}
	default:
		close(p.stopped)
		return p
	}
	go p.print()
	return p
}

// isTerminal reports whether w is a terminal that can move its cursor, and says how wide it is: a bar would not be
// drawn on one of no width, such as those of some containers.
func isTerminal(w io.Writer) bool { return os.Getenv("TERM") != "dumb" && terminalWidth(w) > 0 }

// terminalWidth returns how many characters a line of the terminal behind w has; 0 if it is no terminal, or none of a
// width.
func terminalWidth(w io.Writer) int {
	f, ok := rawStream(w).(*os.File)
	if !ok {
		return 0
	}
	width, _, err := xterm.GetSize(int(f.Fd())) // fails for what is no terminal
	if err != nil {
		return 0
	}
	return width
}

// Update says that done of total bytes are through. Calls may overtake each other: the largest done counts.
func (p *progress) Update(done, total int64) {
	p.total.Store(total)
	for {
		old := p.done.Load()
		if done <= old || p.done.CompareAndSwap(old, done) {
			return
		}
	}
}

// Finish shows the end of a job that was done. Only the first of Finish and Abort has an effect.
func (p *progress) Finish() { p.end(false) }

// Abort ends the display of a job that was not done.
func (p *progress) Abort() { p.end(true) }

func (p *progress) end(aborted bool) {
	p.once.Do(func() {
		close(p.stop)
		<-p.stopped
		if p.show != nil {
			p.show.end(p.done.Load(), p.total.Load(), time.Since(p.started), aborted)
		}
	})
}

// print shows the numbers at intervals, until end.
func (p *progress) print() {
	defer close(p.stopped)
	ticks := time.NewTicker(p.show.interval())
	defer ticks.Stop()
	for {
		select {
		case <-p.stop:
			return
		case <-ticks.C:
			p.show.update(p.done.Load(), p.total.Load(), time.Since(p.started))
		}
	}
}

// plainLines writes a line now and then.
type plainLines struct {
	w     io.Writer
	label string
}

func (*plainLines) interval() time.Duration { return plainInterval }

func (l *plainLines) update(done, total int64, elapsed time.Duration) {
	if total <= 0 {
		return // the job has not said yet how much there is to do
	}
	left := "?"
	if done > 0 {
		left = time.Duration(float64(elapsed) * float64(total-done) / float64(done)).Round(time.Second).String()
	}
	fmt.Fprintf(l.w, "%s: %s of %s (%d%%), %s/s, %s left\n", l.label, gigabytes(done), gigabytes(total),
		done*100/total, gigabytes(perSecond(done, elapsed)), left)
}

func (l *plainLines) end(done, total int64, elapsed time.Duration, aborted bool) {
	if aborted && total == 0 {
		return // it never began: there is nothing to say but the error
	}
	how := "done"
	if aborted {
		how = "stopped"
	}
	fmt.Fprintf(l.w, "%s: %s, %s of %s in %s, %s/s\n", l.label, how, gigabytes(done), gigabytes(total),
		elapsed.Round(time.Millisecond), gigabytes(perSecond(done, elapsed)))
}

// jsonLines writes an object on a line of its own now and then, for other programs.
type jsonLines struct {
	w     io.Writer
	label string
}

// progressEvent is such a line. Fields are part of the command's contract.
type progressEvent struct {
	Event   string  `json:"event"` // "progress", at last "done" or "stopped"
	Label   string  `json:"label"`
	Done    int64   `json:"done_bytes"`
	Total   int64   `json:"total_bytes"` // 0 as long as it is not known
	Seconds float64 `json:"seconds"`     // since the start
}

func (*jsonLines) interval() time.Duration { return plainInterval }

func (l *jsonLines) update(done, total int64, elapsed time.Duration) {
	l.print(progressEvent{"progress", l.label, done, total, elapsed.Seconds()})
}

func (l *jsonLines) end(done, total int64, elapsed time.Duration, aborted bool) {
	event := "done"
	if aborted {
		event = "stopped"
	}
	l.print(progressEvent{event, l.label, done, total, elapsed.Seconds()})
}

func (l *jsonLines) print(e progressEvent) {
	b, _ := json.Marshal(e) // it has nothing that could fail
	fmt.Fprintf(term.NewJSONWriter(l.w), "%s\n", b)
}

func perSecond(n int64, elapsed time.Duration) int64 {
	if elapsed <= 0 {
		return 0
	}
	return int64(float64(n) / elapsed.Seconds())
}

// gigabytes prints a number of bytes in decimal units, with enough digits to see it move.
func gigabytes(n int64) string { return humanize.BytesN(uint64(max(n, 0)), 3) }
