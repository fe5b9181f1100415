package main

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// console is a standard stream for text. What could drive a terminal is escaped, wherever it comes from: file names,
// tensor names, metadata, servers, other processes. It may be used by several goroutines at once, and keeps the first
// error, so that a report that could not be written is noticed even where nobody has looked.
type console struct {
	mu   sync.Mutex
	text *term.Writer
	raw  io.Writer // the stream itself, for a progress bar
	bar  io.Writer // while there is a bar: what writes lines above it
	err  error
}

// newConsole returns a console for a stream, or w itself if it is one already.
func newConsole(w io.Writer) *console {
	if c, ok := w.(*console); ok {
		return c
	}
	c := &console{raw: w}
	c.text = term.NewWriter(writerFunc(c.write))
	return c
}

// writerFunc is a function that writes.
type writerFunc func(b []byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// write writes text that is harmless: above the bar if there is one, which would draw over it otherwise.
func (c *console) write(b []byte) (int, error) {
	if c.bar != nil {
		if n, err := c.bar.Write(b); err == nil {
			return n, nil
		}
	}
	return c.raw.Write(b)
}

// showBar says that there is a bar, or with nil that there is none any more.
func (c *console) showBar(bar io.Writer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bar = bar
}

// Write writes b. After an error it writes nothing any more.
func (c *console) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, c.err
	}
	n, err := c.text.Write(b)
	c.err = err
	return n, err
}

// finish writes what is left, and returns the first error of all that was written.
func (c *console) finish() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = c.text.Flush()
	}
	return c.err
}

// rawStream returns the stream behind a console, for what knows the terminal that it draws on.
func rawStream(w io.Writer) io.Writer {
	if c, ok := w.(*console); ok {
		return c.raw
	}
	return w
}

// errorText returns the text of an error. Paths with control characters are quoted, so that none of them looks like a
// line of its own.
func errorText(err error) string {
	text := withFlags(err)
	walkErrors(err, func(err error) {
		var paths []string
		switch e := err.(type) { //nolint:errorlint // walkErrors unwraps
		case *fs.PathError:
			paths = []string{e.Path}
		case *os.LinkError:
			paths = []string{e.Old, e.New}
		}
		for _, path := range paths {
			if safe := term.Safe(path); safe != path {
				text = strings.ReplaceAll(text, path, safe)
			}
		}
	})
	return text
}

// optionFlags are the flags behind the names of options in errors of the library.
var optionFlags = strings.NewReplacer("Streams is", "--streams is", "Threads is", "--threads is",
	"Connections is", "--connections is", "Chunk is", "--chunk is", "Staging is", "--staging is",
	"fit Staging,", "fit --staging,", "Stall is", "--stall is", "a ratio of", "--split-ratio: a ratio of")

// withFlags returns the text of an error, with flags and commands where the library names options.
func withFlags(err error) string {
	text := err.Error()
	switch {
	case errors.Is(err, loader.ErrBadOption):
		return optionFlags.Replace(strings.TrimPrefix(strings.TrimPrefix(text, "loader: "), loader.ErrBadOption.Error()+": "))
	case errors.Is(err, remote.ErrAddress):
		return strings.Replace(text, "use https, or allow it", "use https, or --allow-http", 1)
	}
	return strings.Replace(text, "nobody holds models there:",
		"nobody holds models there ('gguf2gpu hold MODEL' does, and --socket says where):", 1)
}

// walkErrors calls visit for an error and all that it wraps.
func walkErrors(err error, visit func(error)) {
	if err == nil {
		return
	}
	visit(err)
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range all.Unwrap() {
			walkErrors(e, visit)
		}
		return
	}
	walkErrors(errors.Unwrap(err), visit)
}
