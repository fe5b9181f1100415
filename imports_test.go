package gguf2gpu_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/gguf2gpu/gguf2gpu"

// allowed lists, for each package, what it may import beyond the standard library: packages of this module by their
// directory, others by the start of their path. Arrows point one way only: cmd → loader → pinned → amdhip and
// loader → kernels → gguf.
var allowed = map[string][]string{
	".":       {},
	"amdhip":  {"github.com/ebitengine/purego", "golang.org/x/sys/"},
	"gguf":    {"github.com/edsrzf/mmap-go", "golang.org/x/sys/"},
	"kernels": {"gguf", "github.com/klauspost/cpuid/v2", "golang.org/x/sys/"},
	"pinned":  {"amdhip", "golang.org/x/sys/"},

	"kernels/gpu": {"amdhip", "gguf", "kernels", "golang.org/x/sync/"},
	"loader": {
		"amdhip", "gguf", "kernels", "kernels/gpu", "pinned", "golang.org/x/sys/", "golang.org/x/sync/", "github.com/dustin/go-humanize",
	},
	"loader/remote": {"gguf"},
	"cmd/gguf2gpu": {
		"amdhip", "gguf", "kernels", "kernels/gpu", "pinned", "loader", "loader/remote", "golang.org/x/sys/", "golang.org/x/sync/", "golang.org/x/term",
		"github.com/spf13/", "github.com/vbauerster/mpb/v8", "github.com/dustin/go-humanize", "github.com/coreos/go-systemd/v22/",
	},
}

// TestImportDirections keeps the direction of imports and the small set of dependencies. It reads the sources whatever
// their build constraints, so that it says the same on every platform.
func TestImportDirections(t *testing.T) {
	seen := map[string]bool{}
	forEachSource(t, func(t *testing.T, file string, f *ast.File) {
		dir := filepath.ToSlash(filepath.Dir(file))
		seen[dir] = true
		allow, known := allowed[dir]
		if !known {
			t.Errorf("%s: package %s has no entry in the table of allowed imports", file, dir)
			return
		}
		for _, spec := range f.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if name == "testing" || strings.HasPrefix(name, "testing/") {
				t.Errorf("%s: imports %s outside of tests", file, name)
			}
			if !mayImport(allow, name) {
				t.Errorf("%s: imports %s, which package %s may not", file, name, dir)
			}
		}
	})
	for dir := range allowed {
		if !seen[dir] {
			t.Errorf("the table of allowed imports has package %s, which does not exist", dir)
		}
	}
}

func mayImport(allow []string, name string) bool {
	if first, _, _ := strings.Cut(name, "/"); !strings.Contains(first, ".") {
		return true // standard library
	}
	return slices.ContainsFunc(allow, func(a string) bool {
		if !strings.Contains(a, ".") {
			return name == path.Join(module, a)
		}
		return name == a || strings.HasPrefix(name, a) && strings.HasSuffix(a, "/") || strings.HasPrefix(name, a+"/")
	})
}

// TestLibraryIsSilent holds the library packages to returning what they have to say: only the command prints, exits or
// touches the standard streams.
func TestLibraryIsSilent(t *testing.T) {
	forbidden := map[string][]string{
		"fmt": {"Print", "Printf", "Println"},
		"os":  {"Stdin", "Stdout", "Stderr", "Exit"},
		"log": {"Print", "Printf", "Println", "Fatal", "Fatalf", "Fatalln", "Panic", "Panicf", "Panicln"},
	}
	forEachSource(t, func(t *testing.T, file string, f *ast.File) {
		if strings.HasPrefix(filepath.ToSlash(file), "cmd/") {
			return
		}
		ast.Inspect(f, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if pkg, ok := sel.X.(*ast.Ident); ok && slices.Contains(forbidden[pkg.Name], sel.Sel.Name) {
				t.Errorf("%s: uses %s.%s; only the command may", file, pkg.Name, sel.Sel.Name)
			}
			return true
		})
	})
}

// forEachSource parses every Go file of the module that is not a test. Directories that the go command skips are modules of
// their own or test data.
func forEachSource(t *testing.T, visit func(t *testing.T, file string, f *ast.File)) {
	t.Helper()
	files := 0
	err := fs.WalkDir(os.DirFS("."), ".", func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			name := d.Name()
			if file != "." && (strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") || name == "testdata" ||
				isModule(file)) {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		files++
		visit(t, file, f)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files == 0 {
		t.Fatal("found no source files")
	}
}

func isModule(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "go.mod"))
	return err == nil
}
