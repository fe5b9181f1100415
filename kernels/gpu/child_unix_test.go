//go:build unix

package gpu

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// deadly are the signals that a compiler's process may die of.
var deadly = map[string]syscall.Signal{
	"SIGABRT": syscall.SIGABRT, "SIGKILL": syscall.SIGKILL, "SIGSEGV": syscall.SIGSEGV,
}

// signalled ends this process by a signal, or returns an exit code.
func signalled(name string) int {
	sig, ok := deadly[name]
	if !ok {
		return 8
	}
	if err := syscall.Kill(os.Getpid(), sig); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 7
	}
	time.Sleep(time.Hour)
	return 6
}

// TestChildCrashes checks that the error of a crash says so and what to do, whether Go prints the stacks of goroutines
// first or not.
func TestChildCrashes(t *testing.T) {
	t.Parallel()
	for name, sig := range deadly {
		_, err := child(t, name)(t.Context(), Request{})
		if !errors.Is(err, ErrCompilerCrashed) || !strings.Contains(fmt.Sprint(err), "convert on the CPU instead") ||
			strings.Contains(fmt.Sprint(err), "--") {
			t.Errorf("%v: error %v", sig, err)
		}
	}
}
