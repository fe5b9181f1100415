package hold

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gguf2gpu/gguf2gpu/internal/cgroup"
)

// hostLeft is how many bytes this process can still take without anything being swapped out or ended: of the host's
// memory, and of the limits of its control group and of those above it. root is that of the file system, "/" but in
// tests.
func hostLeft(root string) (left uint64, ok bool) {
	left, ok = cgroup.Host(root)
	if most, limited := cgroup.Available(root); limited && (!ok || most < left) {
		return most, true
	}
	return left, ok
}

// lockedMemory reads what the kernel counts as locked memory of this process, and how much of that it may have.
func lockedMemory(root string) locked {
	status, err := os.ReadFile(filepath.Join(root, "proc/self/status"))
	if err != nil {
		return locked{}
	}
	l := locked{known: true, limit: noLimit}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		value = strings.TrimSpace(value)
		switch name {
		case "VmLck", "VmPin": // the kernel has two counts, and compares each with the limit
			n, _ := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(value, "kB")), 10, 64)
			l.used = max(l.used, n*1024)
		case "CapEff":
			if all, _ := strconv.ParseUint(value, 16, 64); all>>unix.CAP_IPC_LOCK&1 == 1 {
				return locked{known: true, limit: noLimit}
			}
		}
	}
	limits, _ := os.ReadFile(filepath.Join(root, "proc/self/limits")) // without it no limit is known
	for line := range strings.Lines(string(limits)) {
		rest, found := strings.CutPrefix(line, "Max locked memory")
		if fields := strings.Fields(rest); found && len(fields) > 0 && fields[0] != "unlimited" {
			l.limit, _ = strconv.ParseUint(fields[0], 10, 64)
		}
	}
	return l
}
