package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/internal/watch"
)

// activity is what a command is waiting for, and why it cannot be broken off.
type activity struct{ what, why string }

// activityKey is the key of a context's *atomic.Pointer[activity].
type activityKey struct{}

// withActivity returns a context in which doing can say what the command does.
func withActivity(ctx context.Context) (context.Context, *atomic.Pointer[activity]) {
	current := new(atomic.Pointer[activity])
	return context.WithValue(ctx, activityKey{}, current), current
}

// doing says what the command is doing from now on, for a user who interrupts it: what it would wait for then, and why.
func doing(ctx context.Context, what, why string) {
	if current, ok := ctx.Value(activityKey{}).(*atomic.Pointer[activity]); ok {
		current.Store(&activity{what, why})
	}
}

// What a command may have to wait for although it was interrupted.
const (
	waitCopies  = "the copies that are under way"
	whyCopies   = "their memory cannot be freed while a device may use it"
	waitRead    = "the tensor that is being read back"
	whyRead     = "its memory cannot be freed while a device writes to it"
	waitDevices = "the GPU's runtime to start"
	whyDevices  = "the call is the driver's"
	waitFree    = "the device to free its memory"
	whyFree     = "the call is the driver's"
	waitClients = "the processes that are attached to go"
	whyClients  = "they would lose the model under their hands; --grace says how long it waits at most"
)

const (
	explainAfter = 250 * time.Millisecond // what ends sooner needs no words
	stillAfter   = 2 * time.Second        // since the interrupt
	againEvery   = 10 * time.Second
	lookEvery    = 500 * time.Millisecond
)

// explainWaiting says on w what an interrupted command is waiting for, until done is closed. The result is true when
// the process should end without waiting any longer: that is after two seconds, unless it waits for other processes to
// go. calls names calls of the runtime that have not returned.
func explainWaiting(
	w io.Writer, current *atomic.Pointer[activity], calls func() string, done <-chan struct{},
) (end bool) {
	began := time.Now()
	wait := func(d time.Duration) bool {
		select {
		case <-done:
			return false
		case <-time.After(d):
			return true
		}
	}
	what := func() activity {
		if a := current.Load(); a != nil {
			return *a
		}
		return activity{"what is under way", "it cannot be broken off"}
	}
	if !wait(explainAfter) {
		return false
	}
	fmt.Fprintf(w, "gguf2gpu: stopping; it waits for %s%s. A second signal (Ctrl-C) ends it at once.\n", what().what, calls())
	clients := began // since when, or until when, it has waited for other processes
	said := began.Add(stillAfter - againEvery)
	for d := stillAfter - explainAfter; wait(d); d = lookEvery {
		a := what()
		if a.what == waitClients {
			clients = time.Now()
			if time.Since(said) >= againEvery {
				said = time.Now()
				fmt.Fprintf(w, "gguf2gpu: after %v it still waits for %s: %s\n", time.Since(began).Round(time.Second), a.what, a.why)
			}
			continue
		}
		if time.Since(clients) < stillAfter {
			continue
		}
		fmt.Fprintf(w, "gguf2gpu: interrupted; it does not wait any longer for %s%s: %s\n", a.what, calls(), a.why)
		return true
	}
	return false
}

// lostCalls names the calls of the runtime that have not returned for a while.
func lostCalls() string {
	var names []string
	for _, c := range watch.Waiting() {
		if time.Since(c.Since) >= explainAfter && !slices.Contains(names, c.Doing) {
			names = append(names, c.Doing)
		}
	}
	if len(names) == 0 {
		return ""
	}
	return fmt.Sprintf(" (%s)", strings.Join(names, ", "))
}
