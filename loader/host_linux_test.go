package loader

import (
	"os"
	"path/filepath"
	"testing"
)

// TestHostAvailable: a container's limit counts where it is less than what the host has.
func TestHostAvailable(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		meminfo, limit string
		want           uint64
		ok             bool
	}{
		{"MemTotal: 9000 kB\nMemAvailable: 4000 kB\n", "max", 4000 * 1024, true},
		{"MemAvailable: 4000 kB\n", "1000000", 500000, true},
		{"MemAvailable: 4000 kB\n", "1000000000", 4000 * 1024, true},
		{"MemAvailable: 4000000 kB\n", "1000000000", 1000000000 - 64<<20, true},
		{"", "1000000", 500000, true},
		{"", "max", 0, false},
	} {
		root := t.TempDir()
		for name, text := range map[string]string{
			"proc/meminfo": tt.meminfo, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": tt.limit,
		} {
			path := filepath.Join(root, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if n, ok := availableBelow(root); n != tt.want || ok != tt.ok {
			t.Errorf("%q with limit %s: %d, %t, want %d, %t", tt.meminfo, tt.limit, n, ok, tt.want, tt.ok)
		}
	}
	if n, ok := hostAvailable(); !ok || n == 0 {
		t.Errorf("this host has %d bytes, %t", n, ok)
	}
}
