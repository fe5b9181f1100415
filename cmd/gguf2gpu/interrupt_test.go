package main

import (
	"bytes"
	"testing"
	"testing/synctest"
	"time"
)

func TestExplainWaiting(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		ends time.Duration
		want string
	}{
		{"at once", 100 * time.Millisecond, ""},
		{"soon", time.Second, "gguf2gpu: stopping; it waits for x. A second signal (Ctrl-C) ends it at once.\n"},
		{"late", 13 * time.Second, "gguf2gpu: stopping; it waits for x. A second signal (Ctrl-C) ends it at once.\n" +
			"gguf2gpu: after 2s it still waits for y: z\ngguf2gpu: after 12s it still waits for y: z\n"},
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
					doing(ctx, "y", "z")
				}()
				time.AfterFunc(tt.ends, func() { close(done) })
				explainWaiting(&out, current, done)
				time.Sleep(time.Minute) // for the goroutine above
				if out.String() != tt.want {
					t.Errorf("got\n%s\nwant\n%s", &out, tt.want)
				}
			})
		})
	}
	doing(t.Context(), "x", "y") // a context without an activity is no mistake
}
