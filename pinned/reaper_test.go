package pinned_test

import (
	"testing"
	"time"
)

// TestHungDevice: while a device hangs, the pool hardly looks at it; when it comes back, the pool is soon awake.
func TestHungDevice(t *testing.T) { inBubble(t, testHungDevice) }

func testHungDevice(t *testing.T) {
	rec := newRecorder()
	p, sw := stalled(t, rec)
	time.Sleep(time.Minute)
	if got := sw.Calls()["hipEventQuery"]; got > 10000 {
		t.Errorf("%d calls of hipEventQuery in a minute, want at most 10000", got)
	}
	sw.ClearFaults()
	start := time.Now()
	<-rec.told
	if took := time.Since(start); took > 10*time.Millisecond {
		t.Errorf("the end of the copy was seen after %v, want at most 10ms", took)
	}
	must(t, p.Close())
}
