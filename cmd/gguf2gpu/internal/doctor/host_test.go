package doctor

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"testing"
)

// fakeHost makes a file tree and a probe that looks into it. The paths in refused exist but may not be opened.
func fakeHost(t *testing.T, files map[string]string, refused ...string) probe {
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
	return probe{
		root: root,
		open: func(path string) error {
			for _, r := range refused {
				if path == filepath.Join(root, r) {
					return fs.ErrPermission
				}
			}
			_, err := os.Stat(path)
			if err != nil {
				return errors.Unwrap(err)
			}
			return nil
		},
		lookup:  func(string) (string, bool) { return "", false },
		groups:  func() ([]int, error) { return []int{1000}, nil },
		memlock: func() (uint64, bool) { return noLimit, true },
	}
}

const (
	gpuNode = "sys/class/kfd/kfd/topology/nodes/1/properties"
	cpuNode = "sys/class/kfd/kfd/topology/nodes/0/properties"
)

func TestCheckHost(t *testing.T) {
	t.Parallel()
	good := map[string]string{
		"dev/kfd": "", "dev/dri/renderD128": "", "sys/module/amdgpu/refcnt": "1",
		cpuNode: "cpu_cores_count 16\nsimd_count 0\n", gpuNode: "cpu_cores_count 0\nsimd_count 384\n",
	}
	with := func(extra map[string]string) map[string]string {
		all := map[string]string{}
		for _, m := range []map[string]string{good, extra} {
			maps.Copy(all, m)
		}
		return all
	}
	without := func(name string) map[string]string {
		all := with(nil)
		delete(all, name)
		return all
	}
	tests := []struct {
		name    string
		files   map[string]string
		refused []string
		env     map[string]string
		want    []string // one piece of each line of advice, in order
	}{
		{name: "all well", files: good},
		{name: "nothing there", want: []string{"/dev/kfd does not exist and the amdgpu kernel driver is not loaded"}},
		{name: "in a container", files: map[string]string{".dockerenv": ""}, want: []string{"--device=/dev/kfd"}},
		{name: "driver without compute", files: without("dev/kfd"), want: []string{"CONFIG_HSA_AMD"}},
		{name: "driver lists no GPU", files: without(gpuNode), want: []string{"dmesg"}},
		{name: "no render node", files: without("dev/dri/renderD128"), want: []string{"--device=/dev/dri"}},
		{
			name:    "not in the groups",
			files:   with(map[string]string{"etc/group": "root:x:0:\nvideo:x:44:\nrender:x:105:other\nusers:x:1000:\n"}),
			refused: []string{"dev/kfd", "dev/dri/renderD128"},
			want: []string{
				"/dev/kfd may not be opened (permission denied): add the user to group render and video",
				"/dev/dri/renderD128 may not be opened",
			},
		},
		{
			name:  "in the group already",
			files: with(map[string]string{"etc/group": "render:x:1000:me\n"}), refused: []string{"dev/kfd"},
			want: []string{"compare the owner and group"},
		},
		{
			name: "hidden by the environment", files: good, env: map[string]string{"HIP_VISIBLE_DEVICES": "-1"},
			want: []string{"HIP_VISIBLE_DEVICES=-1"},
		},
		{
			name: "all hidden by an empty variable", files: good, env: map[string]string{"ROCR_VISIBLE_DEVICES": "", "ROCM_PATH": ""},
			want: []string{"ROCR_VISIBLE_DEVICES is set and empty, which hides all GPUs: unset it"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := fakeHost(t, tt.files, tt.refused...)
			p.lookup = func(name string) (string, bool) { v, ok := tt.env[name]; return v, ok }
			wantPieces(t, checkHost(p).advise(), tt.want)
		})
	}
}

func TestCheckHostDetails(t *testing.T) {
	t.Parallel()
	p := fakeHost(t, map[string]string{
		"dev/kfd": "", "dev/dri/card0": "", "dev/dri/renderD128": "", "dev/dri/renderD129": "",
		cpuNode: "simd_count 0\n", gpuNode: "simd_count 8\n",
		"etc/group": "video:x:1000:\nrender:x:105:\n",
	})
	r := checkHost(p)
	if !r.KFD.Exists || !r.KFD.Usable || r.KFD.Error != "" {
		t.Errorf("kfd = %+v, want it usable", r.KFD)
	}
	if len(r.RenderNodes) != 2 || r.RenderNodes[1].Path != "/dev/dri/renderD129" {
		t.Errorf("render nodes = %+v, want 128 and 129 with paths as on the machine", r.RenderNodes)
	}
	if r.GPUNodes != 1 {
		t.Errorf("GPUs of the compute driver = %d, want 1", r.GPUNodes)
	}
	if in, listed := r.Groups["render"]; in || !listed || !r.Groups["video"] {
		t.Errorf("groups = %v, want a member of video only", r.Groups)
	}
}
