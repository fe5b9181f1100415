package gpu

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// goldenDir has blocks of every type, and hashes of what ggml decodes them to, which package kernels compares with.
const goldenDir = "../../testdata/golden"

// cxx returns a C++ compiler, or skips; AMDHIP_REQUIRE=cc makes its absence a failure.
func cxx(t *testing.T) string {
	t.Helper()
	for _, name := range []string{"c++", "g++", "clang++"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	if strings.Contains(os.Getenv("AMDHIP_REQUIRE"), "cc") {
		t.Fatal("AMDHIP_REQUIRE names cc, but there is no C++ compiler")
	}
	t.Skip("there is no C++ compiler (set AMDHIP_REQUIRE=cc to make this a failure)")
	return ""
}

// keysByFile returns all kernels that convert, by the file that has them.
func keysByFile() map[string][]Key {
	files := map[string][]Key{}
	for _, k := range Keys() {
		name := formats[k.From].file
		files[name] = append(files[name], k)
	}
	return files
}

// host is a process that runs the kernels of one file on the CPU.
type host struct {
	t    *testing.T
	in   io.Writer
	out  io.Reader
	keys map[Key]uint64
}

// startHost compiles the kernels and starts the process.
func startHost(t *testing.T, keys []Key, options ...string) *host {
	t.Helper()
	h := &host{t: t, keys: map[Key]uint64{}}
	var text strings.Builder
	text.WriteString("#include \"host.h\"\n" + program(keys))
	text.WriteString("typedef void (*kernel)(void *, const u8 *, u64);\nstatic const kernel kernels[] = {\n")
	for i, k := range keys {
		h.keys[k] = uint64(i)
		fmt.Fprintf(&text, "[](void *out, const u8 *in, u64 n) { %s((%s *)out, in, n); },\n", k.Name(), lower(k.To))
	}
	text.WriteString("};\n#line 1 \"host.cc\"\n#include \"host.cc\"\n")
	dir := t.TempDir()
	source, path := filepath.Join(dir, "kernels.cc"), filepath.Join(dir, "kernels")
	if err := os.WriteFile(source, []byte(text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Itestdata", "-o", path}
	args = append(args, strings.Fields(os.Getenv("GPU_TEST_CXXFLAGS"))...)
	if out, err := exec.Command(cxx(t), append(append(args, options...), source)...).CombinedOutput(); err != nil {
		t.Fatalf("compiling the kernels: %v\n%s", err, out)
	}
	h.start(path)
	return h
}

// start starts the process. At its end the test stops it, and checks that it had no error.
func (h *host) start(path string) {
	cmd, stderr := exec.Command(path), &bytes.Buffer{}
	cmd.Stderr = stderr
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		h.t.Fatal(err)
	}
	h.in, h.out = in, out
	h.t.Cleanup(func() {
		if err := errors.Join(in.Close(), cmd.Wait()); err != nil {
			h.t.Errorf("the kernels' process: %v\n%s", err, stderr)
		}
	})
}

// run launches k on blocks with a grid and returns its output.
func (h *host) run(t *testing.T, k Key, grid uint64, blocks []byte) []byte {
	t.Helper()
	n := len(blocks) / k.From.BlockBytes()
	out := make([]byte, n*k.From.BlockElems()*k.To.BlockBytes())
	var head []byte
	for _, v := range []uint64{h.keys[k], grid, uint64(n), uint64(len(blocks)), uint64(len(out))} {
		head = binary.LittleEndian.AppendUint64(head, v)
	}
	_, err1 := h.in.Write(append(head, blocks...))
	_, err2 := io.ReadFull(h.out, out)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatalf("%v of %d blocks: %v", k, n, err)
	}
	return out
}

// compare runs k on blocks and compares with the generic code of package kernels.
func (h *host) compare(t *testing.T, k Key, grid uint64, blocks []byte) {
	t.Helper()
	generic, err := kernels.For(kernels.Generic)
	if err != nil {
		t.Fatal(err)
	}
	got := h.run(t, k, grid, blocks)
	want := make([]byte, len(got))
	if err := generic.Dequantize(want, k.To, blocks, k.From); err != nil {
		t.Fatal(err)
	}
	size, elems := k.To.BlockBytes(), k.From.BlockElems()
	for i := 0; i < len(want); i += size {
		g, w := number(got[i:i+size]), number(want[i:i+size])
		if g != w && !(isNaN(g, k.To) && isNaN(w, k.To)) {
			j := i / size
			t.Fatalf("%v, grid %d, output %d of block %d of %d: got %#x, want %#x",
				k, grid, j%elems, j/elems, len(want)/size/elems, g, w)
		}
	}
}

// number returns the little-endian bits in b.
func number(b []byte) uint32 {
	if len(b) == 2 {
		return uint32(binary.LittleEndian.Uint16(b))
	}
	return binary.LittleEndian.Uint32(b)
}

// isNaN reports whether bits are a NaN of type to.
func isNaN(bits uint32, to gguf.Type) bool {
	switch to {
	case gguf.F16:
		return bits&0x7fff > 0x7c00
	case gguf.BF16:
		return bits&0x7fff > 0x7f80
	}
	return bits&0x7fffffff > 0x7f800000
}

// goldenBlocks returns the blocks of the golden vectors, by type.
func goldenBlocks(t *testing.T) map[gguf.Type][][]byte {
	t.Helper()
	list, err := os.ReadFile(filepath.Join(goldenDir, "golden.json"))
	var cases []struct{ Type, Blocks string }
	if err := errors.Join(err, json.Unmarshal(list, &cases)); err != nil {
		t.Fatal(err)
	}
	vectors := map[gguf.Type][][]byte{}
	for _, c := range cases {
		blocks, err := os.ReadFile(filepath.Join(goldenDir, c.Blocks))
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(gguf.Types(), func(from gguf.Type) bool { return strings.EqualFold(from.String(), c.Type) })
		if i < 0 {
			t.Fatalf("there is no type %q", c.Type)
		}
		from := gguf.Types()[i]
		vectors[from] = append(vectors[from], blocks)
	}
	return vectors
}

// TestKernelsAreBitIdentical runs every kernel on the CPU, on all golden vectors and on random blocks. There are
// launches with too few threads for all blocks at once and with too many, and numbers of blocks around multiples of a
// tile.
func TestKernelsAreBitIdentical(t *testing.T) {
	t.Parallel()
	golden := goldenBlocks(t)
	for file, keys := range keysByFile() {
		t.Run(file, func(t *testing.T) {
			h := startHost(t, keys)
			for _, k := range keys {
				if len(golden[k.From]) == 0 {
					t.Errorf("there is no golden vector for %v", k.From)
				}
				for _, blocks := range golden[k.From] {
					h.compare(t, k, 3, blocks)
				}
				compareRandom(t, h, k)
			}
		})
	}
}

// compareRandom compares k on random blocks, in numbers around multiples of a tile.
func compareRandom(t *testing.T, h *host, k Key) {
	t.Helper()
	random := rand.NewChaCha8([32]byte{byte(k.From), byte(k.To)})
	tile := Threads * Align / k.To.BlockBytes() / k.From.BlockElems()
	for _, n := range []int{0, 1, 2, tile - 1, tile, tile + 1, 4*tile - 1, 4 * tile, 4*tile + 3} {
		blocks := make([]byte, n*k.From.BlockBytes())
		random.Read(blocks)
		for _, grid := range []uint64{1, 2, 5} {
			h.compare(t, k, grid, blocks)
		}
	}
}
