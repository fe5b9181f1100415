package gpu

import (
	"bytes"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
)

// logTo returns a logger that writes everything to b.
func logTo(b *bytes.Buffer) *slog.Logger {
	return slog.New(slog.NewTextHandler(b, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// files returns the paths in the directory.
func files(t *testing.T, dir string) []string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// entryOf returns the path of k's entry.
func entryOf(t *testing.T, c *Compiler, dev *amdhip.Device, k Key) (path, name string) {
	t.Helper()
	b, err := c.begin(dev)
	if err != nil {
		t.Fatal(err)
	}
	name = b.entry(b.request(k))
	return b.path(name), name
}

// loaded loads keys on a new device, and returns the statistics and how many compilations were started.
func loaded(t *testing.T, c Compiler, keys ...Key) (Stats, int) {
	t.Helper()
	dev, sw := openSoft(t)
	s, err := c.Load(t.Context(), dev, keys)
	if err != nil {
		t.Fatal(err)
	}
	closed(t, s)
	return s.Stats(), sw.Calls()["hiprtcCompileProgram"]
}

// TestCacheSparesCompilations loads the same kernels twice, and one more the second time.
func TestCacheSparesCompilations(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "below", "kernels")
	c := Compiler{Dir: dir}
	if s, n := loaded(t, c, someKeys[:2]...); s.Compiled != 2 || s.Cached != 0 || n != 2 {
		t.Errorf("first %+v, %d compilations", s, n)
	}
	if s, n := loaded(t, c, someKeys...); s.Compiled != 1 || s.Cached != 2 || n != 1 {
		t.Errorf("then %+v, %d compilations", s, n)
	}
	all := files(t, dir)
	if len(all) != len(someKeys) {
		t.Errorf("the cache has %v", all)
	}
	for _, path := range append(all, dir) {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if runtime.GOOS != "windows" && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v: others may use it", path, info.Mode())
		}
	}
}

func TestNoCache(t *testing.T) {
	t.Chdir(t.TempDir())
	for range 2 {
		if s, _ := loaded(t, Compiler{Dir: NoCache}, someKeys...); s.Cached != 0 {
			t.Errorf("%d kernels came from a cache", s.Cached)
		}
	}
	if all := files(t, "."); len(all) != 0 {
		t.Errorf("files appeared: %v", all)
	}
}

// TestCacheDirectory looks at where the cache is by default.
func TestCacheDirectory(t *testing.T) {
	dev, _ := openSoft(t)
	if b, err := new(Compiler).begin(dev); err != nil || b.Dir != NoCache {
		t.Errorf("on the software device: %q, %v", b.Dir, err)
	}
	user, err := os.UserCacheDir()
	if err != nil {
		t.Skipf("the user has no cache directory: %v", err)
	}
	b := build{Compiler: Compiler{Logger: slog.New(slog.DiscardHandler)}}
	if b.openCache(); b.Dir != filepath.Join(user, "gguf2gpu", "kernels") {
		t.Errorf("the default is %q", b.Dir)
	}
	for _, v := range []string{"HOME", "XDG_CACHE_HOME", "LocalAppData"} {
		t.Setenv(v, "")
	}
	b.Dir = ""
	if b.openCache(); b.Dir != NoCache {
		t.Errorf("without a home: %q", b.Dir)
	}
}

// TestCacheNamesTellEverythingApart changes, one at a time, everything that the code object depends on. Each change
// must give another name.
func TestCacheNamesTellEverythingApart(t *testing.T) {
	t.Parallel()
	dev, _ := openSoft(t)
	b, err := new(Compiler).begin(dev)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{}
	check := func(what string, b *build, r Request) {
		t.Helper()
		name := b.entry(r)
		if other, ok := seen[name]; ok {
			t.Errorf("%s and %s have one name", what, other)
		}
		seen[name] = what
	}
	r := b.request(q4kToF16)
	check("all", b, r)
	check("kernel", b, b.request(q80ToF32))
	for what, change := range map[string]func(*Request){
		"library": func(r *Request) { r.Library = "other" },
		"source":  func(r *Request) { r.Source += " " },
		"options": func(r *Request) { r.Options = append(slices.Clone(r.Options), "-O1") },
	} {
		changed := r
		change(&changed)
		check(what, b, changed)
	}
	check("hipRTC", &build{dev: dev, hiprtc: "other", version: b.version, driver: b.driver}, r)
	check("version", &build{dev: dev, hiprtc: b.hiprtc, version: b.version + 1, driver: b.driver}, r)
	check("driver", &build{dev: dev, hiprtc: b.hiprtc, version: b.version, driver: b.driver + 1}, r)
	if again := b.entry(b.request(q4kToF16)); seen[again] != "all" {
		t.Errorf("the same has another name the second time")
	}
	if !slices.Contains(r.Options, "--gpu-architecture="+dev.Arch()) {
		t.Errorf("the options %q do not have the architecture", r.Options)
	}
}

// TestDamagedEntriesAreReplaced damages an entry in many ways. Each time the kernel must be compiled again, and the
// entry be whole afterwards.
func TestDamagedEntriesAreReplaced(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	dev, _ := openSoft(t)
	c := Compiler{Dir: dir}
	mustLoad(t, &c, dev, someKeys...)
	path, _ := entryOf(t, &c, dev, q4kToF16)
	other, _ := entryOf(t, &c, dev, q80ToF32)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := os.ReadFile(other)
	if err != nil {
		t.Fatal(err)
	}
	head := len(entryHead(strings.TrimSuffix(filepath.Base(path), ".co"), nil))
	flipped := func(i int) []byte {
		b := bytes.Clone(good)
		b[i] ^= 0x20
		return b
	}
	for name, content := range map[string][]byte{
		"empty": {}, "cut in the head": good[:head/2], "head only": good[:head], "cut in the code": good[:len(good)-1],
		"appended": append(bytes.Clone(good), 0), "another kernel's": foreign, "zeros": make([]byte, len(good)),
		"magic": flipped(0), "name": flipped(len(cacheMagic)), "checksum": flipped(head - 2), "code": flipped(head),
		"last byte": flipped(len(good) - 1),
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			replaced(t, c, path, good)
		})
	}
	t.Run("larger than any code", func(t *testing.T) {
		if err := os.Truncate(path, maxCode+1); err != nil {
			t.Fatal(err)
		}
		replaced(t, c, path, good)
	})
}

// replaced loads q4kToF16, whose cache file at path is damaged, and checks that the file is good afterwards.
func replaced(t *testing.T, c Compiler, path string, good []byte) {
	t.Helper()
	var log bytes.Buffer
	c.Logger = logTo(&log)
	if s, n := loaded(t, c, q4kToF16); s.Compiled != 1 || n != 1 {
		t.Errorf("%+v, %d compilations: the entry was used", s, n)
	}
	if text := log.String(); !strings.Contains(text, "is of no use") || strings.Contains(text, "level=WARN") {
		t.Errorf("the log should say, at debug level, why it was not used:\n%s", text)
	}
	if is, err := os.ReadFile(path); err != nil || !bytes.Equal(is, good) {
		t.Errorf("the entry was not replaced: %v, %d bytes, want %d", err, len(is), len(good))
	}
	if all := files(t, filepath.Dir(path)); len(all) != len(someKeys) {
		t.Errorf("the cache has %v", all)
	}
}

// TestCodeThatTheDeviceRefuses checks that refused code is compiled again if it came from the cache, and only then.
func TestCodeThatTheDeviceRefuses(t *testing.T) {
	t.Parallel()
	dev, sw := openSoft(t)
	c := Compiler{Dir: t.TempDir()}
	path, name := entryOf(t, &c, dev, q4kToF16)
	if err := writeEntry(path, name, []byte("whole, but no code")); err != nil {
		t.Fatal(err)
	}
	if s, n := loaded(t, c, q4kToF16); s.Compiled != 1 || s.Cached != 0 || n != 1 {
		t.Errorf("%+v, %d compilations", s, n)
	}
	if s, n := loaded(t, c, q4kToF16); s.Cached != 1 || n != 0 {
		t.Errorf("then %+v, %d compilations: the entry was not replaced", s, n)
	}
	before := sw.Calls()["hiprtcCompileProgram"]
	sw.Inject(soft.Fault{Func: "hipModuleLoadData", N: 1, Code: amdhip.ErrInvalidImage})
	_, err := new(Compiler).Load(t.Context(), dev, []Key{q4kToF16})
	if n := sw.Calls()["hiprtcCompileProgram"] - before; !errors.Is(err, amdhip.ErrInvalidImage) || n != 1 {
		t.Errorf("fresh code was refused: %v, %d compilations", err, n)
	}
	// From the cache, and refused both times.
	sw.Inject(soft.Fault{Func: "hipModuleLoadData", Code: amdhip.ErrNoBinaryForGPU})
	if _, err := c.Load(t.Context(), dev, []Key{q4kToF16}); !errors.Is(err, amdhip.ErrNoBinaryForGPU) {
		t.Errorf("error %v", err)
	}
	sw.Inject(soft.Fault{Func: "hiprtcCompileProgram", Code: amdhip.Status(amdhip.ErrRTCInternal)})
	_, err = c.Load(t.Context(), dev, []Key{q4kToF16})
	if !errors.Is(err, amdhip.ErrNoBinaryForGPU) || !errors.Is(err, amdhip.ErrRTCInternal) {
		t.Errorf("refused and not compiled: %v", err)
	}
}

// TestCacheThatCannotBeWritten checks that the kernels are loaded all the same, with one warning.
func TestCacheThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	readOnly := t.TempDir()
	if err := os.Chmod(readOnly, 0o500); err != nil {
		t.Fatal(err)
	}
	dev, _ := openSoft(t)
	occupied := t.TempDir()
	path, _ := entryOf(t, &Compiler{Dir: occupied}, dev, q4kToF16)
	if err := os.MkdirAll(filepath.Join(path, "not empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, dir := range map[string]string{
		"a file": file, "below a file": filepath.Join(file, "kernels"), "read-only": readOnly,
		"a directory in the place": occupied,
	} {
		t.Run(name, func(t *testing.T) {
			if f, err := os.CreateTemp(dir, "probe"); dir == readOnly && err == nil {
				f.Close()
				t.Skip("this user, or this system, may write to directories without permission to write")
			}
			var log bytes.Buffer
			c := Compiler{Dir: dir, Logger: logTo(&log)}
			if s, _ := loaded(t, c, someKeys...); s.Compiled != len(someKeys) {
				t.Errorf("%+v", s)
			}
			if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), "cannot be kept") {
				t.Errorf("%d warnings, want one:\n%s", n, &log)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "*.tmp")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// TestLoadsShareACache loads kernels on several devices at the same time, with one cache directory, from which files
// are removed meanwhile.
func TestLoadsShareACache(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := &Compiler{Dir: dir}
	var group sync.WaitGroup
	for range 6 {
		dev, _ := openSoft(t)
		path, _ := entryOf(t, c, dev, q4kToF16)
		group.Go(func() {
			for range 5 {
				s, err := c.Load(t.Context(), dev, someKeys)
				if err != nil {
					t.Error(err)
					return
				}
				if n := s.Stats().Compiled + s.Stats().Cached; n != len(someKeys) {
					t.Errorf("%d kernels", n)
				}
				closed(t, s)
				if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	loaded(t, *c, q4kToF16)
	if all := files(t, dir); len(all) != len(someKeys) {
		t.Errorf("the cache has %v", all)
	}
}
