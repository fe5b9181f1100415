package hold

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

// hostLeft is how many bytes this process can still take without anything being swapped out or ended: of the host's
// memory, and of the limits of its control group and of those above it.
func hostLeft() (left int64, ok bool) {
	return hostLeftIn("/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup")
}

func hostLeftIn(meminfo, cgroup, mount string) (left int64, ok bool) {
	text, err := os.ReadFile(meminfo)
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(text)) {
		if _, err := fmt.Sscanf(line, "MemAvailable: %d kB", &left); err == nil {
			left, ok = left*1024, true
			break
		}
	}
	text, err = os.ReadFile(cgroup)
	if err != nil || !ok {
		return left, ok
	}
	for line := range strings.Lines(string(text)) { // number:controllers:path; of version 2 it is 0::path
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 {
			continue
		}
		dir, limit, usage := mount, "memory.max", "memory.current"
		if strings.Contains(","+fields[1]+",", ",memory,") {
			dir, limit, usage = filepath.Join(mount, "memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
		} else if fields[1] != "" {
			continue
		}
		for path := filepath.Clean("/" + fields[2]); ; path = filepath.Dir(path) {
			left = min(left, groupLeft(filepath.Join(dir, path), limit, usage, left))
			if path == "/" {
				break
			}
		}
	}
	return left, ok
}

// groupLeft is what a control group may still take, and otherwise where it has no limit. Cache of files that it can
// give up counts as free.
func groupLeft(dir, limit, usage string, otherwise int64) int64 {
	most, ok := numberIn(filepath.Join(dir, limit))
	used, ok2 := numberIn(filepath.Join(dir, usage))
	if !ok || !ok2 {
		return otherwise
	}
	stat, _ := os.ReadFile(filepath.Join(dir, "memory.stat")) // without it, nothing can be given up
	for line := range bytes.Lines(stat) {
		var n int64
		if _, err := fmt.Sscanf(string(line), "inactive_file %d", &n); err == nil {
			used -= n
		}
	}
	return max(0, most-max(0, used))
}

// numberIn reads a file with one number. "max", or no file, is no number.
func numberIn(path string) (int64, bool) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	return n, err == nil
}

// lockedLimit is how much memory this process may lock.
func lockedLimit() string {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l); err != nil {
		return "not known"
	}
	if l.Cur == unix.RLIM_INFINITY {
		return "infinite"
	}
	return humanize.IBytes(l.Cur)
}
