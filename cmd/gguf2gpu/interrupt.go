package main

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"time"
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
	waitFree    = "the device to free its memory"
	whyFree     = "the call is the driver's"
	waitClients = "the processes that are attached to go"
	whyClients  = "they would lose the model under their hands; --grace says how long it waits at most"
)

const (
	explainAfter = 250 * time.Millisecond // what ends sooner needs no words
	stillAfter   = 2 * time.Second        // since the interrupt
	againEvery   = 10 * time.Second
)

// explainWaiting says on w what an interrupted command is waiting for, until done is closed.
func explainWaiting(w io.Writer, current *atomic.Pointer[activity], done <-chan struct{}) {
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
		return
	}
	fmt.Fprintf(w, "gguf2gpu: stopping; it waits for %s. A second signal (Ctrl-C) ends it at once.\n", what().what)
	for d := stillAfter - explainAfter; wait(d); d = againEvery {
		a := what()
		fmt.Fprintf(w, "gguf2gpu: after %v it still waits for %s: %s\n", time.Since(began).Round(time.Second), a.what, a.why)
	}
}
