package hf

import (
	"fmt"
	"net/url"
	"path"
	"regexp"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// Name names a model, or what a repository has.
type Name struct {
	Repo     string // ORG/REPO
	Revision string // branch, tag or commit; "": main
	Quant    string // quantization; "": the default
	File     string // the path of a file in the repository; "": chosen by the quantization
}

var (
	repoName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9._-]{1,96}$`)
	// refName matches revisions with slashes that need not be escaped in front of a file.
	refName = regexp.MustCompile(`^refs/(?:pr|convert)/[^/:@]+`)
	quant   = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)
)

// IsName reports whether s is meant to be a name of this package: whether it begins with hf:.
func IsName(s string) bool { return strings.HasPrefix(s, "hf:") }

// Parse reads a name. Its errors match [remote.ErrAddress].
func Parse(s string) (n Name, err error) {
	refuse := func(format string, args ...any) (Name, error) {
		return Name{}, fmt.Errorf("%w %.300q: %s; use hf:ORG/REPO[@REVISION][:QUANTIZATION or /FILE]",
			remote.ErrAddress, s, fmt.Sprintf(format, args...))
	}
	rest, ok := strings.CutPrefix(s, "hf:")
	if !ok {
		return refuse("it does not begin with hf:")
	}
	rest = strings.TrimPrefix(rest, "//")
	slash := strings.IndexByte(rest, '/')
	if slash < 0 {
		return refuse("it names no repository")
	}
	end := len(rest)
	if i := strings.IndexAny(rest[slash+1:], "@:/"); i >= 0 {
		end = slash + 1 + i
	}
	n.Repo, rest = rest[:end], rest[end:]
	if !repoName.MatchString(n.Repo) || strings.Contains(n.Repo, "..") {
		return refuse("%q cannot be a repository", n.Repo)
	}
	if after, ok := strings.CutPrefix(rest, "@"); ok {
		if n.Revision = refName.FindString(after); n.Revision == "" {
			end := len(after)
			if i := strings.IndexAny(after, ":/"); i >= 0 {
				end = i
			}
			n.Revision = after[:end]
		}
		rest = after[len(n.Revision):]
	} else if i := strings.LastIndexByte(rest, '@'); i >= 0 {
		rest, n.Revision = rest[:i], rest[i+1:]
	}
	if strings.Contains(s, "@") {
		if n.Revision, err = url.PathUnescape(n.Revision); err != nil || !isRevision(n.Revision) {
			return refuse("it names no revision")
		}
	}
	switch {
	case rest == "" || rest == "/":
	case rest[0] == ':':
		if n.Quant = rest[1:]; !quant.MatchString(n.Quant) {
			return refuse("%q cannot be a quantization", n.Quant)
		}
	default:
		if n.File = rest[1:]; !isFile(n.File) {
			return refuse("%q cannot be a file of a repository", n.File)
		}
	}
	return n, nil
}

// String returns the name in the form that Parse reads.
func (n Name) String() string {
	s := "hf:" + n.Repo
	if n.Revision != "" {
		s += "@" + url.PathEscape(n.Revision)
	}
	switch {
	case n.File != "":
		s += "/" + n.File
	case n.Quant != "":
		s += ":" + n.Quant
	}
	return s
}

// revision is that of the name, or the default.
func (n Name) revision() string {
	if n.Revision == "" {
		return "main"
	}
	return n.Revision
}

// isRevision reports whether s can be a git revision that is safe as a part of a path.
func isRevision(s string) bool {
	return s != "" && len(s) < 256 && !strings.Contains(s, "..") && !strings.ContainsAny(s, "\\?*[~^: \x00") &&
		!strings.HasPrefix(s, "/") && path.Clean(s) == s && plain(s)
}

// isFile reports whether s can be the path of a file that stays in its repository.
func isFile(s string) bool {
	return s != "" && len(s) < 1024 && path.Clean("/"+s) == "/"+s && !strings.Contains(s, "\\") && plain(s)
}

// plain reports whether s has no control characters.
func plain(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}
