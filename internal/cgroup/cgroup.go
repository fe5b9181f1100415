// Package cgroup reads the memory limits of Linux's control groups, which containers and services have, and what the
// host has left. Elsewhere, and where there are none, it finds nothing.
package cgroup

import (
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Limit is the memory limit of a control group. Sizes are in bytes.
type Limit struct {
	File  string // that holds the limit
	Limit uint64
	Used  uint64
	// Cached is what of Used the kernel gives up when memory is wanted: pages of files, but not those of tmpfs.
	Cached uint64
}

// Available is how much more the group may use before the kernel ends one of its processes.
func (l Limit) Available() uint64 {
	used := l.Used - min(l.Used, l.Cached)
	return l.Limit - min(l.Limit, used)
}

// version is how a version of control groups names things.
type version struct {
	root, limit, used string
	cached            []string // in memory.stat
}

var (
	version1 = version{
		"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", []string{"total_inactive_file", "total_active_file"},
	}
	version2 = version{"/sys/fs/cgroup", "memory.max", "memory.current", []string{"inactive_file", "active_file"}}
)

// Memory returns the memory limits of the groups of this process and of those above them, of both versions of control
// groups. root is that of the file system, "/" but in tests.
func Memory(root string) []Limit {
	var limits []Limit
	for line := range strings.Lines(read(root, "/proc/self/cgroup")) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3) // hierarchy:controllers:path
		if len(f) < 3 {
			continue
		}
		v := version2
		if slices.Contains(strings.Split(f[1], ","), "memory") {
			v = version1
		} else if f[0] != "0" {
			continue
		}
		// In a container the path may be that of the host, of which only the root exists here.
		for group := path.Clean("/" + f[2]); ; group = path.Dir(group) {
			if l, ok := v.limitOf(root, path.Join(v.root, group)); ok {
				limits = append(limits, l)
			}
			if group == "/" {
				break
			}
		}
	}
	return limits
}

// Available returns how much more memory this process may use as far as control groups limit it, and whether they do.
func Available(root string) (bytes uint64, limited bool) {
	for _, l := range Memory(root) {
		if n := l.Available(); !limited || n < bytes {
			bytes, limited = n, true
		}
	}
	return bytes, limited
}

// Host returns how many bytes the whole host can give without swapping, as the kernel estimates it, whatever control
// groups allow.
func Host(root string) (bytes uint64, ok bool) {
	for line := range strings.Lines(read(root, "/proc/meminfo")) {
		if rest, found := strings.CutPrefix(line, "MemAvailable:"); found {
			n, err := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			return n * 1024, err == nil
		}
	}
	return 0, false
}

// limitOf reads the limit of the group in dir.
func (v version) limitOf(root, dir string) (Limit, bool) {
	l := Limit{File: path.Join(dir, v.limit)}
	var err error
	// Version 1 says 2^63 minus a page for no limit, version 2 "max".
	if l.Limit, err = strconv.ParseUint(read(root, l.File), 10, 64); err != nil || l.Limit >= 1<<62 {
		return Limit{}, false
	}
	l.Used, _ = strconv.ParseUint(read(root, path.Join(dir, v.used)), 10, 64) // 0 where it is not told
	for line := range strings.Lines(read(root, path.Join(dir, "memory.stat"))) {
		if name, value, _ := strings.Cut(strings.TrimSpace(line), " "); slices.Contains(v.cached, name) {
			n, _ := strconv.ParseUint(value, 10, 64)
			l.Cached += n
		}
	}
	return l, true
}

// read returns the text of a small file without the spaces around it; "" if it cannot be read.
func read(root, file string) string {
	text, err := os.ReadFile(filepath.Join(root, file))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}
