package oci

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"oras.land/oras-go/v2/registry"

	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// Name names an artifact, or one model of several in it.
type Name struct {
	Registry   string // host, with a port if it is not the usual one
	Repository string
	Reference  string // tag or digest; "": the tag latest
	File       string // the path of a file in the artifact; "": the only model
}

// IsName reports whether s is meant to be a name of this package: whether it begins with oci://.
func IsName(s string) bool { return strings.HasPrefix(s, "oci://") }

// Parse reads a name: oci://REGISTRY/REPOSITORY[:TAG|@DIGEST][#FILE]. Its errors match [remote.ErrAddress].
func Parse(s string) (n Name, err error) {
	const form = "use oci://REGISTRY/REPOSITORY:TAG or @DIGEST"
	rest, ok := strings.CutPrefix(s, "oci://")
	if !ok {
		return n, fmt.Errorf("%w %.300q: %s", remote.ErrAddress, s, form)
	}
	if host, _, _ := strings.Cut(rest, "/"); strings.Contains(host, "@") { // which may be a password
		return n, fmt.Errorf("%w oci://…: credentials belong into Docker's configuration; %s", remote.ErrAddress, form)
	}
	rest, n.File, _ = strings.Cut(rest, "#")
	ref, err := registry.ParseReference(rest)
	if err == nil && ref.Reference == "" && strings.ContainsAny(rest[strings.LastIndexByte(rest, '/'):], ":@") {
		err = errors.New("it names no tag")
	}
	if err != nil {
		return Name{}, fmt.Errorf("%w %.300q: %w; %s", remote.ErrAddress, s, err, form)
	}
	if n.File != "" && (path.Clean("/"+n.File) != "/"+n.File || strings.ContainsFunc(n.File, func(r rune) bool { return r < ' ' })) {
		return Name{}, fmt.Errorf("%w %.300q: %q cannot be a file of an artifact", remote.ErrAddress, s, n.File)
	}
	n.Registry, n.Repository, n.Reference = ref.Registry, ref.Repository, ref.Reference
	if n.Registry == "docker.io" && !strings.Contains(n.Repository, "/") {
		n.Repository = "library/" + n.Repository // what Docker makes of it
	}
	return n, nil
}

// String returns the name in the form that Parse reads.
func (n Name) String() string {
	s := "oci://" + n.Registry + "/" + n.Repository
	switch {
	case strings.Contains(n.Reference, ":"):
		s += "@" + n.Reference
	case n.Reference != "":
		s += ":" + n.Reference
	}
	if n.File != "" {
		s += "#" + n.File
	}
	return s
}

// host is the host of the registry.
func (n Name) host() string { return registry.Reference{Registry: n.Registry}.Host() }

// reference is that of the name, or the default.
func (n Name) reference() string {
	if n.Reference == "" {
		return "latest"
	}
	return n.Reference
}
