package gpu

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// resources is what a kernel takes of a compute unit, as AMD's compilers write it into the code object's notes.
type resources struct {
	vgprs, sgprs, spills, scratch uint64 // scratch: bytes of memory per thread, for what does not fit registers
}

// maxVGPRs is how many vector registers a kernel may use. A SIMD unit can then run several wavefronts at a time (four
// on GCN and CDNA, which have 256 registers for each lane, more on RDNA), so that some compute while others wait for
// memory.
const maxVGPRs = 64

// report prints what the kernels take, and fails for those that spill or take too much.
func report(t *testing.T, arch string, kernels map[string]resources) {
	t.Helper()
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "%s\tvector registers\tscalar\tspills\tscratch\n", arch)
	for _, k := range allKeys() {
		r, ok := kernels[k.Name()]
		if !ok {
			t.Errorf("%s: the code has no %s", arch, k.Name())
		}
		if r.spills != 0 || r.scratch != 0 || r.vgprs == 0 || r.vgprs > maxVGPRs {
			t.Errorf("%s, %v: %+v, want no spills, no scratch memory, and 1 to %d vector registers", arch, k, r, maxVGPRs)
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\n", k.Name(), r.vgprs, r.sgprs, r.spills, r.scratch)
	}
	w.Flush()
	t.Log("\n" + out.String())
}

// allKeys returns all kernels.
func allKeys() []Key { return append(Keys(), Key{Fingerprint: true}) }

// allByFile returns all kernels, by the file that has them.
func allByFile() map[string][]Key {
	files := keysByFile()
	files["fingerprint"] = []Key{{Fingerprint: true}}
	return files
}

// require skips the test, or fails it where AMDHIP_REQUIRE names what is missing.
func require(t *testing.T, what, why string) {
	t.Helper()
	if strings.Contains(os.Getenv("AMDHIP_REQUIRE"), what) {
		t.Fatalf("%s, and AMDHIP_REQUIRE names %s", why, what)
	}
	t.Skipf("%s (AMDHIP_REQUIRE=%s makes this a failure)", why, what)
}

// architectures are those that AMD's hipRTC compiles for in tests, and the version of HIP from which on Debian's knows
// them. To ask an older one for them would end the process.
var architectures = []struct {
	name  string
	since int
}{
	{"gfx906", 5_02_00000},
	{"gfx90a", 5_02_00000},
	{"gfx1030", 5_02_00000}, // GCN, CDNA, RDNA (32 threads a wavefront)
	{"gfx942", 5_07_00000},
	{"gfx1100", 5_07_00000},
	{"gfx950", 6_04_00000},
	{"gfx1201", 6_04_00000},
}

// TestAMDCompiles compiles all kernels with AMD's own hipRTC, which needs no GPU, for each architecture that it knows.
func TestAMDCompiles(t *testing.T) {
	for _, key := range []string{"GGUF2GPU_HIP_LIBRARY", "GGUF2GPU_HIPRTC_LIBRARY", "ROCM_PATH", "HIP_PATH"} {
		t.Setenv(key, "")
	}
	rt, err := amdhip.Open(amdhip.Options{})
	if errors.Is(err, amdhip.ErrNoLibrary) {
		require(t, "amd", "AMD's runtime is not installed (Debian: libamdhip64-5)")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer rt.Close()
	if _, err := rt.Compiler(); errors.Is(err, amdhip.ErrUnsupported) {
		require(t, "amd", "AMD's runtime is there without hipRTC")
	}
	version, _, err := rt.Version()
	if err != nil {
		t.Fatal(err)
	}
	for _, arch := range architectures {
		t.Run(arch.name, func(t *testing.T) {
			if version < arch.since {
				t.Skipf("the compiler of HIP %s does not know %s", amdhip.VersionString(version), arch.name)
			}
			all := map[string]resources{}
			for file, keys := range allByFile() {
				code, err := rt.Compile(file, program(keys), options(arch.name)...)
				if err != nil {
					t.Fatal(err)
				}
				kernels, err := notes(code)
				if err != nil {
					t.Fatalf("%s: %v", file, err)
				}
				maps.Copy(all, kernels)
			}
			report(t, arch.name, all)
		})
	}
}

// TestClangCompiles does the same with the newest clang there is, for architectures that are newer than Debian's
// hipRTC.
func TestClangCompiles(t *testing.T) {
	t.Parallel()
	clang := newestClang(t)
	for _, arch := range []string{"gfx1100", "gfx942", "gfx1201"} {
		t.Run(arch, func(t *testing.T) {
			if out, err := clangCompile(t, clang, arch, "empty", ""); err != nil {
				t.Skipf("%s does not know %s:\n%s", clang, arch, out)
			}
			all := map[string]resources{}
			for file, keys := range allByFile() {
				out, err := clangCompile(t, clang, arch, file, program(keys))
				if err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				maps.Copy(all, metadata(string(out)))
			}
			report(t, arch, all)
		})
	}
}

// newestClang returns the newest clang that has AMD's GPUs as a target.
func newestClang(t *testing.T) string {
	t.Helper()
	names := []string{"clang"}
	for v := 16; v < 40; v++ { // older ones do not know the architectures
		names = append(names, fmt.Sprintf("clang-%d", v))
	}
	for _, name := range slices.Backward(names) {
		out, err := exec.Command(name, "--print-targets").Output()
		if err == nil && bytes.Contains(out, []byte("amdgcn")) {
			return name
		}
	}
	require(t, "clang", "there is no clang of version 16 or later that compiles for AMD's GPUs")
	return ""
}

// clangCompile returns the assembly of a program, or the compiler's messages and an error.
func clangCompile(t *testing.T, clang, arch, name, text string) ([]byte, error) {
	t.Helper()
	source, asm := filepath.Join(t.TempDir(), name+".hip"), filepath.Join(t.TempDir(), name+".s")
	if err := os.WriteFile(source, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(clang, "-x", "hip", "--cuda-device-only", "--offload-arch="+arch, "-nogpuinc", "-nogpulib",
		"-std=c++17", "-O3", "-include", filepath.Join("testdata", "hiprtc.h"), "-S", "-o", asm, source)
	if out, err := cmd.CombinedOutput(); err != nil {
		return out, err
	}
	return os.ReadFile(asm)
}

// metadata reads the resources of all kernels from the YAML at the end of a compiler's assembly.
func metadata(asm string) map[string]resources {
	all := map[string]resources{}
	var name string
	var r resources
	for line := range strings.Lines(asm[max(0, strings.Index(asm, ".amdgpu_metadata")):]) {
		key, value, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "- "), ":")
		var n uint64
		_, _ = fmt.Sscan(value, &n) // zero is what is missing
		switch key {
		case ".name":
			if v := strings.TrimSpace(value); strings.HasPrefix(v, "dequantize_") || v == "fingerprint" {
				name = v
			}
		case ".private_segment_fixed_size":
			r.scratch = n
		case ".sgpr_count":
			r.sgprs = n
		case ".sgpr_spill_count":
			r.spills += n
		case ".vgpr_count":
			r.vgprs = n
		case ".vgpr_spill_count": // the last of a kernel: keys are sorted, but for .wavefront_size
			r.spills += n
			all[name] = r
			r = resources{}
		}
	}
	return all
}

// notes reads the resources of all kernels from a code object. They are in its notes as MessagePack; its layout is in
// LLVM's "User Guide for AMDGPU Backend".
func notes(code []byte) (map[string]resources, error) {
	f, err := elf.NewFile(bytes.NewReader(code))
	if err != nil {
		return nil, err
	}
	for _, s := range f.Sections {
		b, err := s.Data()
		if s.Type != elf.SHT_NOTE || err != nil || len(b) < 12 {
			continue
		}
		name, size := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
		at := 12 + (name+3)&^3
		m := messagePack{b: b[at : at+size]}
		root, _ := m.value().(map[string]any)
		list, _ := root["amdhsa.kernels"].([]any)
		all := map[string]resources{}
		for _, k := range list {
			k, _ := k.(map[string]any)
			n := func(key string) uint64 { v, _ := k[key].(uint64); return v }
			kernel, _ := k[".name"].(string)
			all[kernel] = resources{
				n(".vgpr_count"), n(".sgpr_count"), n(".vgpr_spill_count") + n(".sgpr_spill_count"),
				n(".private_segment_fixed_size"),
			}
		}
		return all, nil
	}
	return nil, errors.New("no notes")
}

// messagePack decodes the part of MessagePack that compilers use. It panics on anything else.
type messagePack struct{ b []byte }

func (m *messagePack) take(n int) []byte {
	b := m.b[:n]
	m.b = m.b[n:]
	return b
}

// uint reads a big-endian number of 1, 2, 4 or 8 bytes.
func (m *messagePack) uint(bytes int) (n uint64) {
	for _, b := range m.take(bytes) {
		n = n<<8 | uint64(b)
	}
	return n
}

func (m *messagePack) value() any {
	switch c := m.uint(1); {
	case c < 0x80:
		return c
	case c < 0x90:
		return m.pairs(c & 15)
	case c < 0xa0:
		return m.list(c & 15)
	case c < 0xc0:
		return string(m.take(int(c & 31)))
	case c == 0xc2 || c == 0xc3:
		return c == 0xc3
	case c >= 0xcc && c <= 0xcf:
		return m.uint(1 << (c - 0xcc))
	case c >= 0xd9 && c <= 0xdb:
		return string(m.take(int(m.uint(1 << (c - 0xd9)))))
	case c == 0xdc || c == 0xdd:
		return m.list(m.uint(2 << (c - 0xdc)))
	case c == 0xde || c == 0xdf:
		return m.pairs(m.uint(2 << (c - 0xde)))
	default:
		panic(fmt.Sprintf("MessagePack type %#x", c))
	}
}

func (m *messagePack) list(n uint64) (all []any) {
	for range n {
		all = append(all, m.value())
	}
	return all
}

func (m *messagePack) pairs(n uint64) map[string]any {
	all := map[string]any{}
	for range n {
		key, _ := m.value().(string)
		all[key] = m.value()
	}
	return all
}
