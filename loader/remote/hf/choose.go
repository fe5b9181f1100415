package hf

import (
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// defaultQuant is what llama.cpp's -hf chooses if the name says nothing.
const defaultQuant = "Q4_K_M"

// splitName matches the names of the parts of a split model.
var splitName = regexp.MustCompile(`^(.*)-([0-9]{5})-of-([0-9]{5})\.gguf$`)

// model is a model of a repository: a file, or all parts of a split.
type model struct {
	path  string // of the file, or of the first part
	files int
	size  int64
}

// file returns the file at a path; nil: there is none.
func (r *repo) file(p string) *file {
	if i := slices.IndexFunc(r.files, func(f file) bool { return f.path == p }); i >= 0 {
		return &r.files[i]
	}
	return nil
}

// models returns the models of a repository in the order of its list, without what goes with a model: the projector of
// a vision model, and importance matrices.
func (r *repo) models() []model {
	if r == nil {
		return nil
	}
	var all []model
	for _, f := range r.files {
		name := strings.ToLower(path.Base(f.path))
		if !strings.HasSuffix(name, ".gguf") || strings.Contains(name, "mmproj") || strings.Contains(name, "imatrix") {
			continue
		}
		m := model{f.path, 1, f.size}
		if part := splitName.FindStringSubmatch(f.path); part != nil {
			if no, _ := strconv.Atoi(part[2]); no != 1 {
				continue
			}
			m.files, _ = strconv.Atoi(part[3])
			m.size = 0
			for _, p := range parts(f.path) {
				if q := r.file(p); q != nil {
					m.size += q.size
				}
			}
		}
		all = append(all, m)
	}
	return all
}

// maxParts bounds the parts of a split model: so many digits have their numbers.
const maxParts = 99999

// parts returns the paths of all parts of the model of which p is the first, or p alone.
func parts(p string) []string {
	part := splitName.FindStringSubmatch(p)
	if part == nil {
		return []string{p}
	}
	n, _ := strconv.Atoi(part[3])
	all := make([]string, 0, min(n, maxParts))
	for i := range min(n, maxParts) {
		all = append(all, fmt.Sprintf("%s-%05d-of-%05d.gguf", part[1], i+1, n))
	}
	return all
}

// find returns the path of the first model with a quantization in its name; "": there is none. Where several match, one
// whose name has it as a word of its own goes first: IQ4_NL is not Q4_NL.
func (r *repo) find(quant string) string {
	ends := regexp.MustCompile(`(?i)` + regexp.QuoteMeta(quant) + `[.-]`)
	word := regexp.MustCompile(`(?i)(?:^|[._/-])` + regexp.QuoteMeta(quant) + `[.-]`)
	models := r.models()
	for _, pattern := range []*regexp.Regexp{word, ends} {
		if i := slices.IndexFunc(models, func(m model) bool { return pattern.MatchString(m.path) }); i >= 0 {
			return models[i].path
		}
	}
	return ""
}

// hasExactly reports whether the model that find returns has just this quantization, so that no other one of the hub
// would be chosen instead.
func (r *repo) hasExactly(quant string) bool {
	p := r.find(quant)
	return p != "" && strings.EqualFold(remote.Quant(p), quant)
}

// choose returns the path of the file that n names.
func (r *repo) choose(n Name) (string, error) {
	models := r.models()
	switch {
	case n.File != "":
		if r.file(n.File) != nil {
			return n.File, nil
		}
		return "", fmt.Errorf("%s: the repository has no such file; %s: %w", n, offers(models), fs.ErrNotExist)
	case n.Quant != "":
		if p := r.find(n.Quant); p != "" {
			return p, nil
		}
		return "", fmt.Errorf("%s: no model has this quantization in its name; %s: %w", n, offers(models), fs.ErrNotExist)
	case len(models) == 0:
		return "", fmt.Errorf("%s: the repository has no GGUF files; another one may have converted them: %w", n, fs.ErrNotExist)
	}
	if p := r.find(defaultQuant); p != "" {
		return p, nil
	}
	return models[0].path, nil
}

// offers lists the models, for an error.
func offers(models []model) string {
	if len(models) == 0 {
		return "it has no GGUF files"
	}
	const most = 20
	var names []string
	for _, m := range models {
		name := remote.Quant(m.path)
		if name == "" || slices.Contains(names, name) {
			name = m.path
		}
		names = append(names, name)
	}
	more := ""
	if len(names) > most {
		names, more = names[:most], fmt.Sprintf(" and %d more", len(models)-most)
	}
	return fmt.Sprintf("it has %s%s", strings.Join(names, ", "), more)
}
