package doctor

import (
	"fmt"
	"math"

	"github.com/dustin/go-humanize"

	"github.com/gguf2gpu/gguf2gpu/internal/cgroup"
)

const (
	// noLimit stands for no limit.
	noLimit = math.MaxUint64
	// stagingNeed is the least staging memory that a load chooses by itself.
	stagingNeed = 64 << 20
	// stagingVariable sets --staging.
	stagingVariable = "GGUF2GPU_STAGING"
	// muchStaging is staging memory that is more than small or moderate.
	muchStaging = 1 << 30
	// memoryNeed is a memory limit below which staging memory, the runtime and the file's pages no longer fit side by
	// side.
	memoryNeed = 1 << 30
)

// CgroupLimit is the tightest memory limit of the control groups that the process is in. Sizes are in bytes.
type CgroupLimit struct {
	File  string `json:"file"` // that holds the limit
	Limit uint64 `json:"limit_bytes"`
	Used  uint64 `json:"used_bytes"`
}

// cgroupMemory looks for memory limits in the groups of this process and those above them, of both versions of
// control groups. It returns nil when there is no limit.
func (p probe) cgroupMemory() *CgroupLimit {
	var tightest *CgroupLimit
	for _, l := range cgroup.Memory(p.root) {
		if tightest == nil || l.Limit < tightest.Limit {
			tightest = &CgroupLimit{l.File, l.Limit, l.Used}
		}
	}
	return tightest
}

// limitText returns a limit as text for people.
func limitText(bytes uint64) string {
	if bytes == noLimit {
		return "unlimited"
	}
	return humanize.IBytes(bytes)
}

// warnLimits returns which limits may be too low for staging memory.
func (r Host) warnLimits() []string {
	var warnings []string
	if r.MemlockBytes != nil && *r.MemlockBytes < stagingNeed {
		warnings = append(warnings, fmt.Sprintf("only %s of memory may be locked: a driver that counts pinned memory refuses staging "+
			"buffers beyond that, and loads are slower (unpinned_copies in 'load --json' tells); raise it with ulimit -l, memlock in "+
			"/etc/security/limits.conf, LimitMEMLOCK of systemd or --ulimit memlock=-1 of a container", limitText(*r.MemlockBytes)))
	}
	// AMD's own warning, ROCm/rocm-systems pull request 11670, and ROCm/legacy-rocm-build 2433: since ROCm 5.6
	// registering takes much longer.
	if n, err := humanize.ParseBytes(r.Environment[stagingVariable]); err == nil && n > muchStaging && r.Driver {
		warnings = append(warnings, fmt.Sprintf("%s=%s page-locks gigabytes by hipHostRegister: AMD warns that this takes long, slows "+
			"the machine down and can make its kernel unstable; no more than 128 MiB for a GPU are needed", stagingVariable,
			r.Environment[stagingVariable]))
	}
	if c := r.Cgroup; c != nil && c.Limit < memoryNeed {
		warnings = append(warnings, fmt.Sprintf("this process may use %s of memory (%s), files that it reads included: raise it "+
			"(--memory of a container, MemoryMax of systemd), or load with a small --staging", limitText(c.Limit), c.File))
	}
	return warnings
}
