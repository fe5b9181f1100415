package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// visibleVariables are the environment variables that hide GPUs from HIP, in the order in which the layers apply
// them.
var visibleVariables = []string{"ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"}

// locateVariables are the environment variables that say where the HIP library is.
var locateVariables = []string{"GGUF2GPU_HIP_LIBRARY", "GGUF2GPU_HIPRTC_LIBRARY", "ROCM_PATH", "HIP_PATH", "LD_LIBRARY_PATH"}

// deviceGroups are the groups that own GPU device files on the usual distributions.
var deviceGroups = []string{"render", "video"}

// probe is how checkHost looks at a machine. Tests make one that sees a file tree of their own.
type probe struct {
	root   string                                     // "/" but in tests
	open   func(path string) error                    // opens for reading and writing, and closes again
	lookup func(name string) (value string, set bool) // in the environment
	groups func() ([]int, error)                      // the process's group ids
	// memlock is the limit on memory that the process may lock, in bytes, or noLimit. ok is false where the system
	// has no such limit. Some drivers count pinned memory against it.
	memlock func() (bytes uint64, ok bool)
}

// thisHost is the probe of the machine that the process runs on.
func thisHost() probe {
	return probe{
		root: "/",
		open: func(path string) error {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err == nil {
				err = f.Close()
			}
			return err
		},
		lookup:  os.LookupEnv,
		groups:  os.Getgroups,
		memlock: memlockLimit,
	}
}

// Host is what a machine offers to the HIP library: the kernel driver, its device files and the right to use them.
// Sizes are in bytes.
type Host struct {
	KFD          DeviceFile        `json:"kfd"` // the compute driver's device file; HIP needs it for every GPU
	RenderNodes  []DeviceFile      `json:"render_nodes"`
	Driver       bool              `json:"amdgpu_loaded"` // the amdgpu kernel module
	GPUNodes     int               `json:"kfd_gpus"`      // GPUs that the compute driver lists
	Targets      []string          `json:"kfd_targets"`   // their architectures, such as gfx1100
	Kernel       string            `json:"kernel"`        // release of Linux
	DriverDKMS   string            `json:"amdgpu_dkms"`   // version of amdgpu if it is AMD's own and not the kernel's; else ""
	ROCm         []ROCm            `json:"rocm"`          // what is installed in the usual place
	Links        []Link            `json:"pcie_links"`    // of AMD's GPUs
	Groups       map[string]bool   `json:"groups"`        // for each group of GPU device files that exists: is the process in it?
	Environment  map[string]string `json:"environment"`   // the variables that are set of those that HIP or the search for it reads
	Memlock      string            `json:"memlock"`       // the limit on locked memory; "" where the system has none
	MemlockBytes *uint64           `json:"memlock_bytes"` // the same as a number; null where the system has none
	Cgroup       *CgroupLimit      `json:"cgroup_memory"` // null without a limit
	Container    bool              `json:"container"`     // it looks like a container
	Ptrace       bool              `json:"ptrace"`        // may take descriptors from other processes of its user
}

// DeviceFile is a device file and whether the process may use it.
type DeviceFile struct {
	Path   string `json:"path"`
	Exists bool   `json:"exists"`
	Usable bool   `json:"usable"`          // may be opened for reading and writing
	Error  string `json:"error,omitempty"` // why not
}

// checkHost looks at the machine through p.
func checkHost(p probe) Host {
	r := Host{
		KFD:         p.deviceFile("/dev/kfd"),
		Driver:      p.exists("/sys/module/amdgpu"),
		Targets:     p.kfdTargets(),
		Kernel:      p.read("/proc/sys/kernel/osrelease"),
		DriverDKMS:  p.read("/sys/module/amdgpu/version"),
		ROCm:        p.rocmVersions(),
		Links:       p.pciLinks(),
		Groups:      p.memberships(),
		Environment: map[string]string{},
		Cgroup:      p.cgroupMemory(),
		Container:   p.exists("/.dockerenv") || p.exists("/run/.containerenv") || p.getenv("KUBERNETES_SERVICE_HOST") != "",
		Ptrace:      p.mayTrace(),
		RenderNodes: []DeviceFile{},
	}
	r.GPUNodes = len(r.Targets)
	if bytes, ok := p.memlock(); ok {
		r.Memlock, r.MemlockBytes = limitText(bytes), &bytes
	}
	for _, path := range p.glob("/dev/dri/renderD*") {
		r.RenderNodes = append(r.RenderNodes, p.deviceFile(path))
	}
	for _, name := range slices.Concat(locateVariables, visibleVariables, tuningVariables()) {
		v, set := p.lookup(name)
		if v != "" || set && slices.Contains(visibleVariables, name) { // an empty one of these hides all GPUs
			r.Environment[name] = v
		}
	}
	return r
}

func (p probe) getenv(name string) string {
	v, _ := p.lookup(name)
	return v
}

func (p probe) path(path string) string { return filepath.Join(p.root, path) }

func (p probe) exists(path string) bool {
	_, err := os.Stat(p.path(path))
	return err == nil
}

// glob returns the paths that match, without the root in front.
func (p probe) glob(pattern string) []string {
	found, _ := filepath.Glob(p.path(pattern)) // fails on bad patterns only
	for i := range found {
		found[i] = "/" + strings.TrimPrefix(filepath.ToSlash(strings.TrimPrefix(found[i], p.root)), "/")
	}
	return found
}

func (p probe) deviceFile(path string) DeviceFile {
	d := DeviceFile{Path: path, Exists: p.exists(path)}
	if err := p.open(p.path(path)); err != nil {
		if e, ok := errors.AsType[*fs.PathError](err); ok {
			err = e.Err // the path is in the report already
		}
		d.Error = err.Error()
	} else {
		d.Usable = true
	}
	return d
}

// read returns the text of a small file without the spaces around it; "" if it cannot be read.
func (p probe) read(path string) string { return readLine(p.path(path)) }

func readLine(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// kfdTargets returns the architecture of each node of the compute driver's topology that has SIMD units; the others
// are CPUs. The driver writes 110501 for gfx1151 and 90010 for gfx90a: two decimal digits for each but the first
// number.
func (p probe) kfdTargets() []string {
	targets := []string{}
	for _, path := range p.glob("/sys/class/kfd/kfd/topology/nodes/*/properties") {
		properties := map[string]string{}
		for line := range strings.Lines(p.read(path)) {
			if f := strings.Fields(line); len(f) == 2 {
				properties[f[0]] = f[1]
			}
		}
		if n := properties["simd_count"]; n == "" || n == "0" {
			continue
		}
		target := "unknown" // old drivers do not tell
		if v, err := strconv.Atoi(properties["gfx_target_version"]); err == nil {
			target = fmt.Sprintf("gfx%d%x%x", v/10000, v/100%100, v%100)
		}
		targets = append(targets, target)
	}
	return targets
}

// rocmVersions returns what is installed in /opt. /opt/rocm usually is a link to one of the others.
func (p probe) rocmVersions() []ROCm {
	versions := []ROCm{}
	var seen []string
	for _, path := range p.glob("/opt/rocm*/.info/version") {
		dir := strings.TrimSuffix(path, "/.info/version")
		real, err := filepath.EvalSymlinks(p.path(dir))
		if err != nil || slices.Contains(seen, real) {
			continue
		}
		seen = append(seen, real)
		versions = append(versions, ROCm{dir, p.read(path)})
	}
	return versions
}

// memberships returns, for each device group of /etc/group, whether the process is in it.
func (p probe) memberships() map[string]bool {
	in := map[string]bool{}
	text, err := os.ReadFile(p.path("/etc/group"))
	if err != nil {
		return in
	}
	ours, err := p.groups()
	if err != nil {
		return in
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Split(line, ":") // name:password:gid:members
		if len(f) >= 3 && slices.Contains(deviceGroups, f[0]) {
			in[f[0]] = slices.ContainsFunc(ours, func(gid int) bool { return fmt.Sprint(gid) == f[2] })
		}
	}
	return in
}

// advise returns what the machine lacks for HIP to use a GPU, most basic first.
func (r Host) advise() []string {
	var advice []string
	add := func(format string, args ...any) { advice = append(advice, fmt.Sprintf(format, args...)) }
	switch {
	case !r.KFD.Exists && r.Container:
		add("/dev/kfd is not in this container: if the host has an AMD GPU, start it with --device=/dev/kfd --device=/dev/dri")
	case !r.KFD.Exists && !r.Driver:
		add("/dev/kfd does not exist and the amdgpu kernel driver is not loaded: install an AMD GPU, or its driver (modprobe amdgpu)")
	case !r.KFD.Exists:
		add("amdgpu is loaded but /dev/kfd does not exist: the kernel lacks CONFIG_HSA_AMD, or the GPU is not supported by it")
	case !r.KFD.Usable:
		add("/dev/kfd may not be opened (%s): %s", r.KFD.Error, r.groupAdvice())
	case r.GPUNodes == 0:
		add("/dev/kfd is there but the compute driver lists no GPU: look for amdgpu errors in dmesg")
	}
	if r.KFD.Exists {
		unusable := slices.DeleteFunc(slices.Clone(r.RenderNodes), func(d DeviceFile) bool { return d.Usable })
		switch {
		case len(r.RenderNodes) == 0:
			add("there is no /dev/dri/renderD*: a container needs --device=/dev/dri")
		case len(unusable) > 0:
			add("%s may not be opened (%s): %s", unusable[0].Path, unusable[0].Error, r.groupAdvice())
		}
	}
	for _, name := range visibleVariables {
		switch v, ok := r.Environment[name]; {
		case ok && v == "":
			add("%s is set and empty, which hides all GPUs: unset it", name)
		case ok:
			add("%s=%s limits which GPUs are seen: unset it to see all", name, v)
		}
	}
	return advice
}

// groupAdvice names the groups that the process should be in and is not.
func (r Host) groupAdvice() string {
	var missing []string
	for _, g := range deviceGroups {
		if in, exists := r.Groups[g]; exists && !in {
			missing = append(missing, g)
		}
	}
	switch {
	case len(missing) > 0:
		return fmt.Sprintf("add the user to group %s (usermod -aG %s USER) and log in again",
			strings.Join(missing, " and "), strings.Join(missing, ","))
	case r.Container:
		return "start the container with --group-add of the groups that own the device files"
	default:
		return "compare the owner and group of the file with those of this process"
	}
}
