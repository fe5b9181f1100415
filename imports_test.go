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
// directory, others by the start of their path. It is the table of ARCHITECTURE.md; arrows point one way only.
var allowed = map[string][]string{
	".": {},

	"amdhip":                  {"amdhip/internal/hip", "amdhip/internal/hostmem", "github.com/ebitengine/purego", "golang.org/x/sys/"},
	"amdhip/internal/hip":     {},
	"amdhip/internal/hostmem": {"golang.org/x/sys/"},
	"amdhip/soft":             {"internal/cgroup", "amdhip", "amdhip/internal/hip", "amdhip/internal/hostmem", "golang.org/x/sys/"},

	"gguf":            {"internal/term", "github.com/edsrzf/mmap-go", "golang.org/x/sys/"},
	"internal/term":   {},
	"internal/peers":  {},
	"internal/cgroup": {},
	"internal/watch":  {},
	"kernels":         {"gguf", "github.com/klauspost/cpuid/v2", "golang.org/x/sys/"},
	"kernels/gpu":     {"amdhip", "gguf", "kernels", "internal/watch", "golang.org/x/sync/"},
	"pinned":          {"amdhip", "golang.org/x/sys/"},

	"loader/plan":          {"gguf", "github.com/dustin/go-humanize"},
	"loader/trace":         {},
	"loader/internal/read": {"gguf", "loader/plan", "loader/trace", "golang.org/x/sys/"},
	"loader": {
		"internal/cgroup", "internal/watch", "amdhip", "gguf", "kernels", "kernels/gpu", "pinned", "loader/plan", "loader/trace", "loader/internal/read",
		"github.com/dustin/go-humanize", "lukechampine.com/blake3",
	},
	"loader/readback": {"gguf", "kernels", "loader", "loader/plan", "loader/internal/read"},
	"loader/hold": {
		"amdhip", "gguf", "internal/cgroup", "internal/watch", "kernels", "loader", "loader/plan", "golang.org/x/sys/",
		"github.com/dustin/go-humanize",
	},
	"loader/measure":                  {"amdhip", "gguf", "loader/internal/read"},
	"loader/rank":                     {},
	"loader/remote":                   {"gguf", "internal/term", "golang.org/x/sync/"},
	"loader/remote/hf":                {"gguf", "loader/remote"},
	"loader/remote/ollama":            {"gguf", "loader/remote", "loader/remote/internal/manifest"},
	"loader/remote/internal/manifest": {},
	"loader/remote/oci": {
		"gguf", "loader/remote", "loader/remote/internal/manifest", "oras.land/oras-go/v2/", "golang.org/x/net/publicsuffix",
	},
	"loader/remote/s3":     {"gguf", "loader/remote", "github.com/aws/aws-sdk-go-v2/"},
	"loader/remote/stream": {"gguf"},
	"loader/remote/models": {
		"gguf", "loader/remote", "loader/remote/hf", "loader/remote/oci", "loader/remote/ollama", "loader/remote/s3", "loader/remote/stream",
	},
	"internal/fake": {"gguf"},

	"cmd/gguf2gpu/internal/bench": {
		"amdhip", "cmd/gguf2gpu/internal/synth", "gguf", "internal/term", "kernels", "kernels/gpu", "github.com/dustin/go-humanize",
	},
	"cmd/gguf2gpu/internal/doctor": {"internal/cgroup", "amdhip", "golang.org/x/sys/", "github.com/dustin/go-humanize"},
	"cmd/gguf2gpu/internal/synth":  {"gguf", "kernels", "golang.org/x/sync/"},
	"cmd/gguf2gpu": {
		"internal/term", "internal/watch",
		"amdhip", "amdhip/soft", "gguf", "kernels", "kernels/gpu", "pinned", "loader", "loader/plan", "loader/trace",
		"loader/readback", "loader/hold", "loader/measure", "loader/rank", "loader/remote", "loader/remote/models",
		"cmd/gguf2gpu/internal/bench", "cmd/gguf2gpu/internal/doctor",
		"cmd/gguf2gpu/internal/synth",
		"golang.org/x/sys/", "golang.org/x/net/netutil", "golang.org/x/sync/", "golang.org/x/term",
		"github.com/spf13/", "github.com/vbauerster/mpb/v8", "github.com/dustin/go-humanize", "github.com/coreos/go-systemd/v22/",
		"github.com/klauspost/cpuid/v2",
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

// forEachSource parses every Go file of the module that is not a test. Directories that the go command skips are
// modules of their own or test data.
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
