package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestOutputFile(t *testing.T) {
	write := func(t *testing.T, path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name      string
		existing  string // "": no file
		overwrite bool
		commit    bool
		want      string // what the file holds in the end; "": no file
		refused   bool
	}{
		{name: "committed", commit: true, want: "new"},
		{name: "discarded", want: ""},
		{name: "replaced", existing: "old", overwrite: true, commit: true, want: "new"},
		{name: "not replaced", existing: "old", want: "old", refused: true},
		{name: "discarded over a file", existing: "old", overwrite: true, want: "old"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "out")
			if tt.existing != "" {
				write(t, path, tt.existing)
			}
			f, err := createOutput(path, tt.overwrite)
			if (err != nil) != tt.refused {
				t.Fatalf("createOutput: %v, want an error: %t", err, tt.refused)
			}
			if err == nil {
				if _, err := f.WriteString("new"); err != nil {
					t.Fatal(err)
				}
				if tt.commit {
					if err := f.Commit(); err != nil {
						t.Fatal(err)
					}
				}
				f.Discard()
			}
			got, err := os.ReadFile(path)
			if string(got) != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("the file holds %q (%v), want %q", got, err, tt.want)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestOutputNotRegular(t *testing.T) {
	if f, err := createOutput(t.TempDir(), true); err == nil {
		f.Discard()
		t.Error("a directory was accepted as an output file")
	}
}
