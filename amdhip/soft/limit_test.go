package soft

import (
	"os"
	"path/filepath"
	"testing"
)

// TestDefaultMemory: devices have the host's memory, unless a container may use less.
func TestDefaultMemory(t *testing.T) {
	t.Parallel()
	const total = 64 << 30
	for _, tt := range []struct {
		limit   string
		devices int
		want    uint64
	}{
		{"max", 1, total},
		{"max", 4, total},
		{"137438953472", 4, total},         // 128 GiB
		{"8589934592", 1, 8<<30 - 192<<20}, // 8 GiB
		{"8589934592", 4, 2<<30 - 48<<20},  // together
		{"314572800", 1, 150 << 20},        // 300 MiB
		{"4096", 1, 1 << 20},
	} {
		root := t.TempDir()
		for name, text := range map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": tt.limit} {
			path := filepath.Join(root, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got := defaultMemory(total, root, tt.devices); got != tt.want {
			t.Errorf("limit %s, %d devices: %d, want %d", tt.limit, tt.devices, got, tt.want)
		}
	}
}
