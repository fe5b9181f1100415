package main

import (
	"fmt"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
)

const (
	// noLimit is a limit that does not limit.
	noLimit = math.MaxUint64
	// stagingNeed is the least staging memory that a load chooses by itself.
	stagingNeed = 64 << 20
	// memoryNeed is the memory limit below which staging, the runtime and the pages being read get into each other's way.
	memoryNeed = 1 << 30
)

// cgroupLimit is the tightest memory limit of the control groups that the process is in.
type cgroupLimit struct {
	File  string `json:"file"` // that holds the limit
	Limit uint64 `json:"limit_bytes"`
	Used  uint64 `json:"used_bytes"`
}

// cgroupMemory looks for memory limits in the groups of this process and those above them, of both versions of control
// groups. It returns nil when there is no limit.
func (p hostProbe) cgroupMemory() *cgroupLimit {
	var tightest *cgroupLimit
	for line := range strings.Lines(p.read("/proc/self/cgroup")) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3) // hierarchy:controllers:path
		if len(f) < 3 {
			continue
		}
		root, limitName, usedName := "/sys/fs/cgroup", "memory.max", "memory.current"
		if slices.Contains(strings.Split(f[1], ","), "memory") {
			root, limitName, usedName = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
		} else if f[0] != "0" {
			continue
		}
		// A container may see the path of the outside, of which nothing is there but the root.
		for group := path.Clean("/" + f[2]); ; group = path.Dir(group) {
			file := path.Join(root, group, limitName)
			// Version 1 says 2^63 minus a page for no limit, version 2 "max".
			limit, err := strconv.ParseUint(p.read(file), 10, 64)
			if err == nil && limit < 1<<62 && (tightest == nil || limit < tightest.Limit) {
				used, _ := strconv.ParseUint(p.read(path.Join(root, group, usedName)), 10, 64)
				tightest = &cgroupLimit{file, limit, used}
			}
			if group == "/" {
				break
			}
		}
	}
	return tightest
}

// limitText is a limit for people.
func limitText(bytes uint64) string {
	if bytes == noLimit {
		return "unlimited"
	}
	return humanize.IBytes(bytes)
}

// warnLimits says which limits may be in the way of staging memory.
func (r hostReport) warnLimits() []string {
	var warnings []string
	if r.MemlockBytes != nil && *r.MemlockBytes < stagingNeed {
		warnings = append(warnings, fmt.Sprintf("only %s of memory may be locked: a driver that counts pinned memory refuses staging "+
			"buffers beyond that, and loads are slower (unpinned_copies in 'load --json' tells); raise it with ulimit -l, memlock in "+
			"/etc/security/limits.conf, LimitMEMLOCK of systemd or --ulimit memlock=-1 of a container", limitText(*r.MemlockBytes)))
	}
	if c := r.Cgroup; c != nil && c.Limit < memoryNeed {
		warnings = append(warnings, fmt.Sprintf("this process may use %s of memory (%s), files that it reads included: raise it "+
			"(--memory of a container, MemoryMax of systemd), or load with a small --staging", limitText(c.Limit), c.File))
	}
	return warnings
}
