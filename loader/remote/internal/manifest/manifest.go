// Package manifest reads the manifests of model artifacts in registries: those of ollama, of Docker's model runner, of
// CNCF ModelPack, and plain files that were pushed with their names.
package manifest

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
)

// Media types of manifests.
const (
	OCI         = "application/vnd.oci.image.manifest.v1+json"
	Docker      = "application/vnd.docker.distribution.manifest.v2+json"
	OCIIndex    = "application/vnd.oci.image.index.v1+json"
	DockerIndex = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// Accept lists them, for requests.
const Accept = OCI + ", " + Docker + ", " + OCIIndex + ", " + DockerIndex

// Media types of layers that are GGUF files, one each, as they are.
const (
	ollamaModel   = "application/vnd.ollama.image.model"
	dockerGGUF    = "application/vnd.docker.ai.gguf.v3"
	modelPackGGUF = "application/vnd.cncf.model.weight.v1.gguf"
)

// rawWeights are layers that are a file as it is, of a kind that its name tells.
var rawWeights = []string{"application/vnd.cncf.model.weight.v1.raw", "application/vnd.cnai.model.weight.v1.raw"}

// nameKeys are the annotations that hold the name of a layer's file, the most telling first.
var nameKeys = []string{"org.cncf.model.filepath", "org.cnai.model.filepath", "org.opencontainers.image.title"}

// Descriptor is a layer, or a manifest in an index.
type Descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations"`
}

// Manifest is what a registry says of an artifact, or the index of several.
type Manifest struct {
	MediaType    string       `json:"mediaType"`
	ArtifactType string       `json:"artifactType"`
	Config       Descriptor   `json:"config"`
	Layers       []Descriptor `json:"layers"`
	Manifests    []Descriptor `json:"manifests"` // of an index
}

// ErrNoModel says that an artifact has no layer that is a GGUF file.
var ErrNoModel = errors.New("no GGUF file in it")

// maxLayers bounds the layers that are looked at.
const maxLayers = 10_000

// Parse reads a manifest, and checks digests and sizes.
func Parse(text []byte) (*Manifest, error) {
	var m Manifest
	if err := json.Unmarshal(text, &m); err != nil {
		return nil, fmt.Errorf("the manifest cannot be read: %w", err)
	}
	all := slices.Concat(m.Layers, m.Manifests)
	if len(all) == 0 || len(all) > maxLayers {
		return nil, fmt.Errorf("a manifest with %d layers", len(all))
	}
	for _, d := range all {
		if !IsDigest(d.Digest) || d.Size < 0 {
			return nil, fmt.Errorf("a manifest with a layer %.160q of %d bytes", d.Digest, d.Size)
		}
	}
	return &m, nil
}

// IsDigest reports whether s is a digest by SHA-256 or SHA-512.
func IsDigest(s string) bool {
	algorithm, digits, _ := strings.Cut(s, ":")
	_, err := hex.DecodeString(digits)
	return err == nil && digits == strings.ToLower(digits) &&
		(algorithm == "sha256" && len(digits) == 64 || algorithm == "sha512" && len(digits) == 128)
}

// IsIndex reports whether it is a list of manifests.
func (m *Manifest) IsIndex() bool { return len(m.Manifests) > 0 && len(m.Layers) == 0 }

// File is a GGUF file of an artifact.
type File struct {
	Descriptor
	Path string // in the artifact; "": it has no name
}

// Name is the file's name without a directory; "": it has none.
func (f File) Name() string {
	if f.Path == "" {
		return ""
	}
	return path.Base(f.Path)
}

// Files returns the GGUF files, in order. The error matches ErrNoModel if there are none, and says what there is.
func (m *Manifest) Files() ([]File, error) {
	var all []File
	var packed, others []string
	for _, l := range m.Layers {
		name := nameOf(l)
		kind, _, _ := strings.Cut(l.MediaType, ";")
		isGGUF := strings.HasSuffix(strings.ToLower(name), ".gguf")
		switch {
		case kind == ollamaModel, kind == dockerGGUF, kind == modelPackGGUF,
			isGGUF && !isPacked(kind):
			all = append(all, File{l, name})
		case slices.Contains(rawWeights, kind) && name == "": // it may be anything; opening it will tell
			all = append(all, File{l, ""})
		case strings.Contains(kind, "model.weight") && isPacked(kind):
			packed = append(packed, kind)
		default:
			others = append(others, kind)
		}
	}
	switch {
	case len(all) > 0:
		return all, nil
	case len(packed) > 0:
		return nil, fmt.Errorf("%w: its weights are packed (%s), and ranges of a file can only be read of what is not: "+
			"push the model again as raw layers", ErrNoModel, packed[0])
	}
	slices.Sort(others)
	return nil, fmt.Errorf("%w, but layers of the kinds %.400q", ErrNoModel, slices.Compact(others))
}

// isPacked reports whether a layer is an archive or compressed.
func isPacked(kind string) bool {
	return strings.HasSuffix(kind, "tar") || strings.HasSuffix(kind, "+gzip") || strings.HasSuffix(kind, "+zstd") ||
		strings.HasSuffix(kind, ".gzip")
}

// nameOf is the name of a layer's file; "" if it has none, or one that leads elsewhere.
func nameOf(l Descriptor) string {
	for _, key := range nameKeys {
		if name := l.Annotations[key]; name != "" && path.Clean("/"+name) == "/"+strings.TrimPrefix(name, "./") {
			return strings.TrimPrefix(name, "./")
		}
	}
	return ""
}
