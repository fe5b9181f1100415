package doctor

import (
	"maps"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// wantPieces compares texts with one piece of each.
func wantPieces(t *testing.T, got, want []string) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("got %q, want %d lines", got, len(want))
	}
	for i := range got {
		if !strings.Contains(got[i], want[i]) {
			t.Errorf("got %q, want %q in it", got[i], want[i])
		}
	}
}

func TestWarnOfKnownFaults(t *testing.T) {
	t.Parallel()
	const driver = "sys/module/amdgpu/refcnt"
	node := func(version string) string { return "simd_count 8\ngfx_target_version " + version + "\n" }
	tests := []struct {
		name    string
		kernel  string
		targets []string // as the driver writes them
		files   map[string]string
		env     map[string]string
		want    []string // one piece of each warning, in order
	}{
		{name: "nothing known", kernel: "6.14.0-37-generic", targets: []string{"110000"}},
		{name: "kernel 7.0", kernel: "7.0.0-28-generic", targets: []string{"110000"}, want: []string{"Linux 7.0: "}},
		{name: "kernel 7.0 itself", kernel: "7.0", targets: []string{"110000"}, want: []string{"Linux 7.0: "}},
		{name: "kernel 7.01 is another", kernel: "7.01.2", targets: []string{"110000"}},
		{name: "kernel 7.1", kernel: "7.1.0-rc1", targets: []string{"110000"}},
		{name: "gfx1200", kernel: "6.14.0", targets: []string{"120000"}, want: []string{"from mapped files are reported"}},
		{
			name: "gfx1151 with 6.17", kernel: "6.17.0-20-generic", targets: []string{"110501"},
			want: []string{"from mapped files", "memory access fault"},
		},
		{name: "gfx90a with 6.17", kernel: "6.17.0-20-generic", targets: []string{"90010"}},
		{name: "two gfx1100", kernel: "6.14.0", targets: []string{"110000", "110000"}, want: []string{"--verify"}},
		{
			name: "no copy engines", kernel: "6.14.0", env: map[string]string{"HSA_ENABLE_SDMA": "0"},
			want: []string{"HSA_ENABLE_SDMA=0"},
		},
		{
			name: "much staging memory", kernel: "6.14.0", env: map[string]string{"GGUF2GPU_STAGING": "4GiB"},
			want: []string{"GGUF2GPU_STAGING=4GiB page-locks gigabytes"},
		},
		{name: "some staging memory", kernel: "6.14.0", env: map[string]string{"GGUF2GPU_STAGING": "256MiB"}},
		{name: "staging memory that is none", kernel: "6.14.0", env: map[string]string{"GGUF2GPU_STAGING": "much"}},
		{name: "copy engines forced", kernel: "6.14.0", env: map[string]string{"HSA_ENABLE_SDMA": "1"}},
		{
			name: "old ROCm", files: map[string]string{"opt/rocm-4.5.2/.info/version": "4.5.2-164\n"},
			want: []string{"needs 5.0 or later"},
		},
		{name: "new ROCm", files: map[string]string{"opt/rocm-10.0.0/.info/version": "10.0.0\n"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			files := map[string]string{driver: "1", "proc/sys/kernel/osrelease": tt.kernel + "\n"}
			for i, version := range tt.targets {
				files["sys/class/kfd/kfd/topology/nodes/"+string(rune('1'+i))+"/properties"] = node(version)
			}
			maps.Copy(files, tt.files)
			p := fakeHost(t, files)
			p.lookup = func(name string) (string, bool) { v, ok := tt.env[name]; return v, ok }
			wantPieces(t, checkHost(p).warn(), tt.want)
		})
	}
}

func TestWarnOfLimits(t *testing.T) {
	t.Parallel()
	const group = "sys/fs/cgroup/system.slice/job.service/"
	tests := []struct {
		name    string
		memlock uint64
		files   map[string]string
		want    *CgroupLimit
		warn    []string
	}{
		{name: "no limits", memlock: noLimit},
		{name: "locked memory", memlock: 64 << 10, warn: []string{"only 64 KiB of memory may be locked"}},
		{name: "just enough locked memory", memlock: 64 << 20},
		{
			name: "group of version 2", memlock: noLimit,
			files: map[string]string{
				"proc/self/cgroup":   "0::/system.slice/job.service\n",
				group + "memory.max": "536870912\n", group + "memory.current": "4096\n",
				"sys/fs/cgroup/system.slice/memory.max": "max\n",
			},
			want: &CgroupLimit{"/sys/fs/cgroup/system.slice/job.service/memory.max", 512 << 20, 4096},
			warn: []string{"may use 512 MiB of memory (/sys/fs/cgroup/system.slice/job.service/memory.max)"},
		},
		{
			name: "a group above is tighter", memlock: noLimit,
			files: map[string]string{
				"proc/self/cgroup":   "0::/system.slice/job.service\n",
				group + "memory.max": "max\n", "sys/fs/cgroup/system.slice/memory.max": "8589934592\n",
			},
			want: &CgroupLimit{"/sys/fs/cgroup/system.slice/memory.max", 8 << 30, 0},
		},
		{
			name: "container of version 1 that sees the path of the outside", memlock: noLimit,
			files: map[string]string{
				"proc/self/cgroup":                           "12:cpu,cpuacct:/docker/abc\n4:hugetlb,memory:/docker/abc\n0::/\n",
				"sys/fs/cgroup/memory/memory.limit_in_bytes": "268435456\n",
				"sys/fs/cgroup/memory/memory.usage_in_bytes": "8192\n",
			},
			want: &CgroupLimit{"/sys/fs/cgroup/memory/memory.limit_in_bytes", 256 << 20, 8192},
			warn: []string{"may use 256 MiB"},
		},
		{
			name: "version 1 without a limit", memlock: noLimit,
			files: map[string]string{
				"proc/self/cgroup":                           "4:memory:/\n",
				"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
			},
		},
		{
			name: "a path that leads out", memlock: noLimit,
			files: map[string]string{"proc/self/cgroup": "0::/../../..\nrubbish\n", "memory.max": "1\n"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := fakeHost(t, tt.files)
			p.memlock = func() (uint64, bool) { return tt.memlock, true }
			r := checkHost(p)
			if diff := cmp.Diff(tt.want, r.Cgroup); diff != "" {
				t.Errorf("limit (-want +got):\n%s", diff)
			}
			wantPieces(t, r.warn(), tt.warn)
		})
	}
}

func TestHostVersions(t *testing.T) {
	t.Parallel()
	p := fakeHost(t, map[string]string{
		"sys/module/amdgpu/version":    "6.12.12\n",
		"opt/rocm-6.4.1/.info/version": "6.4.1-83\n", "opt/rocm-7.0.2/.info/version": "7.0.2\n",
		gpuNode: "simd_count 8\ngfx_target_version 90402\n",
		"sys/class/kfd/kfd/topology/nodes/2/properties": "simd_count 8\n",
	})
	r := checkHost(p)
	want := []ROCm{{"/opt/rocm-6.4.1", "6.4.1-83"}, {"/opt/rocm-7.0.2", "7.0.2"}}
	if diff := cmp.Diff(want, r.ROCm); diff != "" {
		t.Errorf("ROCm (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"gfx942", "unknown"}, r.Targets); diff != "" {
		t.Errorf("targets (-want +got):\n%s", diff)
	}
	if r.DriverDKMS != "6.12.12" {
		t.Errorf("driver %q, want 6.12.12", r.DriverDKMS)
	}
}
