package kernels

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestNotice wants NOTICE.md to have ggml's notice, and the files that it names to exist.
func TestNotice(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile(filepath.Join("..", "NOTICE.md"))
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for _, must := range []string{
		"Copyright (c) 2023-2026 The ggml authors", "The above copyright notice and this permission notice shall be",
		"`kernels/tables/*.bin`", "`testdata/golden/`", "`testdata/gguf/`", "`testdata/tiny-llama.gguf`",
	} {
		if !strings.Contains(text, must) {
			t.Errorf("%q is not there", must)
		}
	}
	files := 0
	for line := range strings.Lines(text) {
		cells := strings.Split(line, "|")
		if len(cells) < 3 {
			continue
		}
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[1], -1) {
			files++
			if all, err := filepath.Glob(filepath.Join("..", m[1])); err != nil || len(all) == 0 {
				t.Errorf("there is no %s (%v)", m[1], err)
			}
		}
	}
	if files < 10 {
		t.Errorf("%d files are named", files)
	}
}
