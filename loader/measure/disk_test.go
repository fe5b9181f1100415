package measure

import (
	"bytes"
	"os"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// TestDisk: where direct reads do not work, ordinary ones bring the same bytes.
func TestDisk(t *testing.T) {
	t.Parallel()
	const path = "../../testdata/tiny-llama.gguf"
	f, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	broken, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	broken.Close() // every read fails now
	for _, direct := range []*os.File{nil, broken} {
		d, err := openDisk(f.Parts()[0], false)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		d.direct = direct
		got := make([]byte, len(want))
		for range 2 {
			clear(got)
			if n, err := d.ReadAt(got, 0); n != len(want) || err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d of %d bytes, %v", n, len(want), err)
			}
		}
	}
	if rate, err := Read(t.Context(), f, 2, true); err != nil || rate <= 0 {
		t.Errorf("%g bytes per second, %v", rate, err)
	}
}
