package loader

import (
	"bytes"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// resources is what a load takes and has to give back.
type resources struct {
	Allocations, HostAllocations, Registrations, Streams, Events, IPCMappings int // in the software device

	Goroutines  int
	Descriptors int   // 0 where /proc is missing
	FileMaps    int   // mappings of files; 0 where /proc is missing
	MapBytes    int64 // of anonymous memory outside Go's heap; 0 where /proc is missing or something else maps memory, too
}

// mapSlack is the room for what the C library and the Go runtime map besides; a staging slab is 2 MiB and more.
const mapSlack = 1 << 20

// measure counts what is in use now. sw may be nil.
func measure(sw *amdhip.Software) resources {
	r := resources{Goroutines: runtime.NumGoroutine(), Descriptors: descriptors()}
	r.FileMaps, r.MapBytes = mappings()
	if sw != nil {
		s := sw.Stats()
		r.Allocations, r.HostAllocations, r.Registrations = s.Allocations, s.HostAllocations, s.Registrations
		r.Streams, r.Events, r.IPCMappings = s.Streams, s.Events, s.IPCMappings
	}
	return r
}

// within reports whether r is no more than want.
func (r resources) within(want resources) bool {
	return r.Allocations <= want.Allocations && r.HostAllocations <= want.HostAllocations &&
		r.Registrations <= want.Registrations && r.IPCMappings <= want.IPCMappings && r.Streams <= want.Streams && r.Events <= want.Events &&
		r.Goroutines <= want.Goroutines && r.Descriptors <= want.Descriptors && r.FileMaps <= want.FileMaps &&
		r.MapBytes <= want.MapBytes+mapSlack
}

// wantBack ends the test when more is in use than before. Goroutines that have been told to end get a moment for it.
func wantBack(t *testing.T, sw *amdhip.Software, before resources) {
	t.Helper()
	var now resources
	for wait := 100 * time.Microsecond; wait < time.Second; wait += wait / 2 {
		if now = measure(sw); now.within(before) {
			return
		}
		time.Sleep(wait)
	}
	if now.Goroutines > before.Goroutines {
		buf := make([]byte, 1<<16)
		t.Logf("%s", buf[:runtime.Stack(buf, true)])
	}
	t.Fatalf("in use afterwards: %+v\nbefore: %+v", now, before)
}

// descriptors is the number of open files of this process.
func descriptors() int {
	d, err := os.Open("/proc/self/fd")
	if err != nil {
		return 0
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return 0
	}
	return len(names) - 1 // d's own
}

// underRace: the race detector maps memory of its own, so that the mappings cannot be told apart.
var underRace = func() bool {
	info, _ := debug.ReadBuildInfo()
	return info != nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}()

// mappings returns the number of mapped files and the writable anonymous memory that is not Go's heap.
func mappings() (files int, bytesOutside int64) {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return 0, 0
	}
	const guardPage, stack, arena = 4096, 8 << 20, 64 << 20 // of threads in C; an arena of its malloc begins aligned
	guarded := int64(-1)                                    // where a guard page ends, and so the stack of a thread of C's begins
	for line := range bytes.Lines(maps) {
		f := strings.Fields(string(line)) // range, permissions, offset, device, inode, path
		if len(f) > 5 && strings.HasPrefix(f[5], "/") {
			files++
		}
		from, to, _ := strings.Cut(f[0], "-")
		lo, _ := strconv.ParseInt(from, 16, 64)
		hi, _ := strconv.ParseInt(to, 16, 64)
		switch {
		case f[4] != "0":
		case strings.HasPrefix(f[1], "---") && hi-lo == guardPage:
			guarded = hi
		case strings.HasPrefix(f[1], "rw") && lo == guarded:
			bytesOutside += max(0, hi-lo-stack)
		case strings.HasPrefix(f[1], "rw") && (lo%arena != 0 || hi-lo > mapSlack):
			bytesOutside += hi - lo
		}
	}
	if underRace {
		return files, 0
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return files, bytesOutside - int64(m.Sys)
}
