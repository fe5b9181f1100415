package main

import (
	"bytes"
	"testing"
	"testing/synctest"
	"time"
)

func TestExplainWaiting(t *testing.T) {
	t.Parallel()
	const first = "gguf2gpu: stopping; it waits for x (call). A second signal (Ctrl-C) ends it at once.\n"
	for _, tt := range []struct {
		name string
		then string // what the command does after a second
		ends time.Duration
		want string
		end  bool
	}{
		{"at once", "y", 100 * time.Millisecond, "", false},
		{"soon", "y", time.Second, first, false},
		{"late", "y", 13 * time.Second, first +
			"gguf2gpu: interrupted; it does not wait any longer for y (call): because\n", true},
		{"clients", waitClients, 13 * time.Second, first + "gguf2gpu: after 2s it still waits for " + waitClients + ": because\n" +
			"gguf2gpu: after 12s it still waits for " + waitClients + ": because\n", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				ctx, current := withActivity(t.Context())
				doing(ctx, "x", "no reason")
				done := make(chan struct{})
				var out bytes.Buffer
				go func() {
					time.Sleep(time.Second)
					doing(ctx, tt.then, "because")
				}()
				time.AfterFunc(tt.ends, func() { close(done) })
				start := time.Now()
				end := explainWaiting(&out, current, func() string { return " (call)" }, done)
				if took := time.Since(start); end != tt.end || end && took != stillAfter {
					t.Errorf("end %v after %v, want %v", end, took, tt.end)
				}
				time.Sleep(time.Minute) // for what goes on above
				if out.String() != tt.want {
					t.Errorf("got\n%s\nwant\n%s", &out, tt.want)
				}
			})
		})
	}
	doing(t.Context(), "x", "y") // a context without an activity is no mistake
}
