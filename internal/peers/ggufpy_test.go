package peers

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// peer is a Python process that does with gguf-py what it is asked for.
type peer struct {
	in  io.WriteCloser
	out *bufio.Reader
}

// startPeer starts it. GGUF2GPU_PYTHON names the interpreter. Without gguf-py the test is skipped, or fails if
// GGUF2GPU_REQUIRE names gguf-py.
func startPeer(t *testing.T) *peer {
	t.Helper()
	python := cmp.Or(os.Getenv("GGUF2GPU_PYTHON"), "python3")
	if out, err := exec.Command(python, "-c", "import gguf.quants, numpy").CombinedOutput(); err != nil {
		if slices.Contains(strings.Split(os.Getenv("GGUF2GPU_REQUIRE"), ","), "gguf-py") {
			t.Fatalf("GGUF2GPU_REQUIRE names gguf-py, but: %v\n%s", err, out)
		}
		t.Skipf("%s has no gguf-py (pip install gguf; GGUF2GPU_REQUIRE=gguf-py makes this a failure): %v", python, err)
	}
	cmd := exec.Command(python, "gguf_py.py")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the peer: %v\n%s", err, &stderr)
		}
	})
	return &peer{in, bufio.NewReader(out)}
}

// ask sends a request.
func (p *peer) ask(t *testing.T, op byte, number uint32, data []byte) {
	t.Helper()
	head := binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint32([]byte{op}, number), uint64(len(data)))
	if _, err := p.in.Write(append(head, data...)); err != nil {
		t.Fatal(err)
	}
}

// said is what gguf-py says about a model.
type said struct {
	Error   string
	Version uint32
	Keys    [][]json.RawMessage // name, kinds, values: as hexadecimal bytes, arrays one after the other
	Tensors [][]json.RawMessage // name, type, shape, offset, size by the type, size of what was read
}

// model asks for a model.
func (p *peer) model(t *testing.T, data []byte) (s said) {
	t.Helper()
	p.ask(t, 'm', 0, data)
	line, err := p.out.ReadBytes('\n')
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(line, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// dequantize asks for values. nil: gguf-py cannot do that type.
func (p *peer) dequantize(t *testing.T, number uint32, data []byte) []byte {
	t.Helper()
	p.ask(t, 'd', number, data)
	var size uint64
	if err := binary.Read(p.out, binary.LittleEndian, &size); err != nil {
		t.Fatal(err)
	}
	if size == 1<<64-1 {
		return nil
	}
	out := make([]byte, size)
	if _, err := io.ReadFull(p.out, out); err != nil {
		t.Fatal(err)
	}
	return out
}
