package ollama

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// What a name says if it leaves it out.
const (
	DefaultHost      = "registry.ollama.ai"
	DefaultNamespace = "library"
	DefaultTag       = "latest"
)

// Name names a model.
type Name struct{ Host, Namespace, Model, Tag string }

// The parts of a name. They are names of directories, too, so none may be "." or "..".
var (
	hostPart      = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,349}(:[0-9]{1,5})?$`)
	namespacePart = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_-]{0,79}$`)
	modelPart     = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}$`)
)

// IsName reports whether s is meant to be a name of this package: whether it begins with ollama:.
func IsName(s string) bool { return strings.HasPrefix(s, "ollama:") }

// Parse reads a name. Its errors match [remote.ErrAddress].
func Parse(s string) (n Name, err error) {
	rest, ok := strings.CutPrefix(s, "ollama:")
	rest = strings.TrimPrefix(rest, "//")
	n = Name{DefaultHost, DefaultNamespace, "", DefaultTag}
	parts := strings.Split(rest, "/")
	last := parts[len(parts)-1]
	if i := strings.IndexByte(last, ':'); i >= 0 {
		last, n.Tag = last[:i], last[i+1:]
	}
	n.Model = last
	switch len(parts) {
	case 1:
	case 2:
		n.Namespace = parts[0]
	case 3:
		n.Host, n.Namespace = parts[0], parts[1]
	default:
		ok = false
	}
	if !ok || !hostPart.MatchString(n.Host) || !namespacePart.MatchString(n.Namespace) ||
		!modelPart.MatchString(n.Model) ||
		!modelPart.MatchString(n.Tag) {
		return Name{}, fmt.Errorf("%w %.300q: use ollama:[HOST/][NAMESPACE/]MODEL[:TAG]", remote.ErrAddress, s)
	}
	return n, nil
}

// String returns the name in the form that Parse reads, without what is the default, but with the tag.
func (n Name) String() string {
	s := n.Model + ":" + n.Tag
	switch {
	case n.Host != DefaultHost:
		s = n.Host + "/" + n.Namespace + "/" + s
	case n.Namespace != DefaultNamespace:
		s = n.Namespace + "/" + s
	}
	return "ollama:" + s
}
