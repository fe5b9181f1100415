package manifest

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

var digest = "sha256:" + strings.Repeat("ab", 32)

// layer is a layer of a manifest. Annotations are KEY=VALUE.
func layer(kind string, annotations ...string) string {
	var all []string
	for _, a := range annotations {
		k, v, _ := strings.Cut(a, "=")
		all = append(all, fmt.Sprintf("%q:%q", k, v))
	}
	return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":7,"annotations":{%s}}`, kind, digest, strings.Join(all, ","))
}

func TestFiles(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		what   string
		layers []string
		want   []string // paths; nil: none
		text   string   // of the error
	}{
		{"ollama", []string{
			layer("application/vnd.ollama.image.model"), layer("application/vnd.ollama.image.template"),
			layer("application/vnd.ollama.image.params"),
		}, []string{""}, ""},
		{"ollama, with parameters", []string{layer("application/vnd.ollama.image.model; x=y")}, []string{""}, ""},
		{"ollama's adapters", []string{layer("application/vnd.ollama.image.adapter")}, nil, "image.adapter"},
		{"Docker", []string{
			layer("application/vnd.docker.ai.gguf.v3"), layer("application/vnd.docker.ai.license"),
			layer("application/vnd.docker.ai.gguf.v3.mmproj"), layer("application/vnd.docker.ai.gguf.v3.lora"),
		}, []string{""}, ""},
		{
			"ModelPack",
			[]string{
				layer("application/vnd.cncf.model.weight.v1.raw", "org.cncf.model.filepath=model-00001-of-00002.gguf"),
				layer("application/vnd.cncf.model.weight.v1.raw", "org.cncf.model.filepath=a/model-00002-of-00002.gguf"),
				layer("application/vnd.cncf.model.doc.v1.raw", "org.cncf.model.filepath=README.md"),
			},
			[]string{"model-00001-of-00002.gguf", "a/model-00002-of-00002.gguf"},
			"",
		},
		{"ModelPack's own type", []string{layer("application/vnd.cncf.model.weight.v1.gguf")}, []string{""}, ""},
		{"ModelPack, before it was one", []string{
			layer("application/vnd.cnai.model.weight.v1.raw", "org.cnai.model.filepath=m.GGUF"),
		}, []string{"m.GGUF"}, ""},
		{"other weights", []string{
			layer("application/vnd.cncf.model.weight.v1.raw", "org.cncf.model.filepath=m.safetensors"),
		}, nil, "weight.v1.raw"},
		{"packed", []string{layer("application/vnd.cncf.model.weight.v1.tar", "org.cncf.model.filepath=m.gguf")}, nil, "are packed"},
		{"compressed", []string{layer("application/vnd.cncf.model.weight.v1.tar+gzip")}, nil, "are packed"},
		{"a plain file", []string{
			layer("application/octet-stream", "org.opencontainers.image.title=m.gguf"),
			layer("text/plain", "org.opencontainers.image.title=LICENSE"),
		}, []string{"m.gguf"}, ""},
		{"a name that leads out", []string{layer("application/octet-stream", "org.opencontainers.image.title=../m.gguf")}, nil, "octet"},
		{"an image", []string{layer("application/vnd.oci.image.layer.v1.tar+gzip")}, nil, "layer.v1.tar+gzip"},
	} {
		m, err := Parse([]byte(`{"layers":[` + strings.Join(tt.layers, ",") + `]}`))
		if err != nil {
			t.Fatal(err)
		}
		files, err := m.Files()
		var got []string
		for _, f := range files {
			got = append(got, f.Path)
		}
		if fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("%s: got %q, %v; want %q", tt.what, got, err, tt.want)
		}
		if tt.want == nil && (!errors.Is(err, ErrNoModel) || !strings.Contains(err.Error(), tt.text)) {
			t.Errorf("%s: got %v, want %q in it", tt.what, err, tt.text)
		}
	}
}

func TestParse(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"", "null", "{}", `{"layers":[]}`, `{"layers":[{"digest":"sha256:00"}]}`, `{"layers":[{"digest":"../x","size":1}]}`,
		fmt.Sprintf(`{"layers":[{"digest":%q,"size":-1}]}`, digest), `{"manifests":[{"digest":"sha256:"}]}`,
		fmt.Sprintf(`{"layers":[{"digest":%q}]}`, strings.ToUpper(digest)), "<html>",
	} {
		if m, err := Parse([]byte(text)); err == nil {
			t.Errorf("%q: got %+v", text, m)
		}
	}
	m, err := Parse(fmt.Appendf(nil, `{"manifests":[{"digest":%q,"size":7}]}`, digest))
	if err != nil || !m.IsIndex() {
		t.Errorf("%+v, %v", m, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"layers":[` + layer("application/vnd.ollama.image.model", "org.cncf.model.filepath=./a") + `]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := Parse(text)
		if err != nil {
			return
		}
		files, err := m.Files()
		if (err == nil) != (len(files) > 0) {
			t.Errorf("%d files, %v", len(files), err)
		}
		for _, x := range files {
			if strings.HasPrefix(x.Path, "/") || strings.HasPrefix(x.Path, "../") || !IsDigest(x.Digest) {
				t.Errorf("%+v", x)
			}
		}
	})
}
