package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestInterrupted runs a command whose context is already canceled, as by a signal. It must exit with 130 and leave no
// file.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("interrupt signal received"))
	dir := t.TempDir()
	var stdout, stderr bytes.Buffer
	args := []string{"synth", "-o", filepath.Join(dir, "m.gguf"), "--preset", "tiny", "--progress", "none", "--json"}
	if got := Main(ctx, args, nil, &stdout, &stderr); got != exitInterrupted {
		t.Errorf("exit code %d, want %d", got, exitInterrupted)
	}
	if got, want := stderr.String(), "gguf2gpu: interrupted\n"; got != want {
		t.Errorf("stderr %q, want %q", got, want)
	}
	if got, want := stdout.String(), "{\n  \"error\": \"interrupted\",\n  \"code\": 130\n}\n"; got != want {
		t.Errorf("stdout %q, want %q", got, want)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
}
