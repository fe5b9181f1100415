package main

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
)

// benchSteps shows on stderr which of the loads of bench is under way, in one of the modes of --progress.
type benchSteps struct {
	mode string
	w    io.Writer // the stream itself for a line on a terminal, else a console
	line bool      // there is a line on the terminal that clear has to remove
}

func newBenchSteps(mode string, stderr io.Writer) *benchSteps {
	if mode == "auto" {
		mode = "plain"
		if isTerminal(stderr) {
			mode = "bar"
		}
	}
	if mode == "bar" {
		stderr = rawStream(stderr)
	}
	return &benchSteps{mode: mode, w: stderr}
}

// stepEvent is a line of --progress json.
type stepEvent struct {
	Event string `json:"event"` // "step"
	Label string `json:"label"`
	Step  int    `json:"step"` // from 1 on
	Steps int    `json:"steps"`
}

// step says that a load begins, or something else that takes its time. Its number counts from 1.
func (s *benchSteps) step(number, count int, what string) {
	what = term.Safe(what)
	switch s.mode {
	case "bar":
		s.line = true
		fmt.Fprintf(s.w, "\r\x1b[K%d of %d: %s", number, count, what)
	case "plain":
		fmt.Fprintf(s.w, "%d of %d: %s\n", number, count, what)
	case "json":
		b, _ := json.Marshal(stepEvent{"step", what, number, count}) // it has nothing that could fail
		fmt.Fprintf(s.w, "%s\n", b)
	}
}

// clear removes the line from the terminal, so that something else can be printed.
func (s *benchSteps) clear() {
	if s.line {
		fmt.Fprint(s.w, "\r\x1b[K")
		s.line = false
	}
}
