package cgroup

import (
	"os"
	"path/filepath"
	"testing"
)

// tree writes files below a new root.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestAvailable(t *testing.T) {
	t.Parallel()
	const group, v1 = "sys/fs/cgroup/pod/job/", "sys/fs/cgroup/memory/"
	for _, tt := range []struct {
		name    string
		files   map[string]string
		want    uint64
		limited bool
	}{
		{"nothing", nil, 0, false},
		{"no limit", map[string]string{"proc/self/cgroup": "0::/pod/job\n", group + "memory.max": "max\n"}, 0, false},
		{"no limit in version 1", map[string]string{
			"proc/self/cgroup": "4:memory:/\n", v1 + "memory.limit_in_bytes": "9223372036854771712\n",
		}, 0, false},
		{"version 2", map[string]string{
			"proc/self/cgroup": "0::/pod/job\n", group + "memory.max": "1000000\n", group + "memory.current": "400000\n",
		}, 600_000, true},
		{"pages of files are given up", map[string]string{
			"proc/self/cgroup": "0::/pod/job\n", group + "memory.max": "1000000\n", group + "memory.current": "999000\n",
			group + "memory.stat": "anon 1000\nfile 998000\nshmem 8000\ninactive_file 900000\nactive_file 90000\n",
		}, 991_000, true},
		{"a group above has less left", map[string]string{
			"proc/self/cgroup": "0::/pod/job\n", group + "memory.max": "1000000\n", group + "memory.current": "0\n",
			"sys/fs/cgroup/pod/memory.max": "2000000\n", "sys/fs/cgroup/pod/memory.current": "1900000\n",
		}, 100_000, true},
		{"more used than allowed", map[string]string{
			"proc/self/cgroup": "0::/pod/job\n", group + "memory.max": "1000\n", group + "memory.current": "2000\n",
		}, 0, true},
		{"version 1, seen from inside of a container", map[string]string{
			"proc/self/cgroup":           "12:cpu,cpuacct:/docker/abc\n4:hugetlb,memory:/docker/abc\n0::/\n",
			v1 + "memory.limit_in_bytes": "1000000\n", v1 + "memory.usage_in_bytes": "500000\n",
			v1 + "memory.stat": "inactive_file 1\ntotal_inactive_file 100000\ntotal_active_file 200000\n",
		}, 800_000, true},
		{"a path that leads out", map[string]string{"proc/self/cgroup": "0::/../../..\nrubbish\n", "memory.max": "1\n"}, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got, limited := Available(tree(t, tt.files)); got != tt.want || limited != tt.limited {
				t.Errorf("%d, %t, want %d, %t", got, limited, tt.want, tt.limited)
			}
		})
	}
}
