//go:build unix

package gpu

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

var deadly = map[string]syscall.Signal{"SIGABRT": syscall.SIGABRT, "SIGKILL": syscall.SIGKILL, "SIGSEGV": syscall.SIGSEGV}

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

// TestChildCrashes wants to hear that the compiler crashed, and what to do, whether Go lets the signal end the process or prints
// what its goroutines do before.
func TestChildCrashes(t *testing.T) {
	for name, sig := range deadly {
		_, err := child(t, name)(t.Context(), Request{})
		if err == nil || !strings.Contains(err.Error(), "the compiler crashed (") || !strings.Contains(err.Error(), "--dequant cpu") {
			t.Errorf("%v: error %v", sig, err)
		}
	}
}
