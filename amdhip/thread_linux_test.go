package amdhip

import (
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// TestDlopenReason opens files that do not exist, while other goroutines keep all threads busy. The dynamic loader
// keeps the reason for the thread that asked, so it is lost when the goroutine goes on on another one.
func TestDlopenReason(t *testing.T) {
	var stop atomic.Bool
	var busy, openers sync.WaitGroup
	for range 4 * runtime.GOMAXPROCS(0) {
		busy.Go(func() {
			for !stop.Load() {
				runtime.Gosched()
			}
		})
	}
	for range 32 {
		openers.Go(func() {
			for range 1500 {
				_, err := dlopen("/nowhere/" + strings.Repeat("x", 200) + ".so")
				if err == nil || !strings.Contains(err.Error(), "cannot open shared object file") {
					t.Errorf("the reason is %q", err)
					return
				}
			}
		})
	}
	openers.Wait()
	stop.Store(true)
	busy.Wait()
}
