package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// entrypoint is the program in the image: 'docker run IMAGE load MODEL' runs it.
const entrypoint = "/usr/local/bin/gguf2gpu"

// describeImage rewrites the configuration of a container image, as docker load reads it: what it runs, its labels,
// and when it was made. Everything else, such as the environment and the user, stays as in the image that it was built
// on, which must be of the same platform.
func describeImage(name, platform string, labels []string) (err error) {
	date, err := sourceDate()
	if err != nil {
		return err
	}
	in, err := os.Open(name)
	if err != nil {
		return err
	}
	defer in.Close()
	m, old, err := readManifest(in)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	config, err := describe(old, platform, labels, date)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	was := m[0]["Config"]
	m[0]["Config"] = fmt.Sprintf("sha256:%x", sha256.Sum256(config))
	manifest, err := json.Marshal(m)
	if err != nil {
		return err
	}
	out, err := os.Create(name + ".new")
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, out.Close()); err == nil {
			err = os.Rename(name+".new", name)
		}
	}()
	if _, err := in.Seek(0, io.SeekStart); err != nil {
		return err
	}
	r, w := tar.NewReader(in), tar.NewWriter(out)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return w.Close()
		}
		if err != nil {
			return err
		}
		content := io.Reader(r)
		switch h.Name {
		case was:
			h.Name, h.Size, content = m[0]["Config"].(string), int64(len(config)), bytes.NewReader(config)
		case "manifest.json":
			h.Size, content = int64(len(manifest)), bytes.NewReader(manifest)
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(w, content); err != nil {
			return err
		}
	}
}

// readManifest returns the manifest of an image, and the configuration that it names.
func readManifest(in io.ReadSeeker) (m []map[string]any, config []byte, err error) {
	find := func(name string) ([]byte, error) {
		if _, err := in.Seek(0, io.SeekStart); err != nil {
			return nil, err
		}
		r := tar.NewReader(in)
		for {
			h, err := r.Next()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			if h.Name == name {
				return io.ReadAll(r)
			}
		}
	}
	text, err := find("manifest.json")
	if err != nil {
		return nil, nil, err
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return nil, nil, err
	}
	if len(m) != 1 {
		return nil, nil, fmt.Errorf("the manifest is of %d images", len(m))
	}
	of, _ := m[0]["Config"].(string)
	config, err = find(of)
	return m, config, err
}

// describe returns the configuration with what it runs, labels (KEY=VALUE) and a date.
func describe(config []byte, platform string, labels []string, date time.Time) ([]byte, error) {
	type object = map[string]json.RawMessage
	var all, run object
	set := func(o object, key string, v any) {
		o[key], _ = json.Marshal(v) // strings, lists and maps of them
	}
	if err := json.Unmarshal(config, &all); err != nil {
		return nil, err
	}
	system, arch, _ := strings.Cut(platform, "/")
	for key, want := range map[string]string{"os": system, "architecture": arch} {
		var have string
		if err := json.Unmarshal(all[key], &have); err != nil {
			return nil, fmt.Errorf("%s of the image: %w", key, err)
		}
		if have != "" && have != want {
			return nil, fmt.Errorf("the image is for %s %q, want %q", key, have, want)
		}
		set(all, key, want)
	}
	if text := all["config"]; text != nil {
		if err := json.Unmarshal(text, &run); err != nil {
			return nil, err
		}
	}
	if run == nil {
		run = object{}
	}
	named := map[string]string{}
	if text := run["Labels"]; text != nil {
		if err := json.Unmarshal(text, &named); err != nil {
			return nil, err
		}
	}
	for _, label := range labels {
		key, value, ok := strings.Cut(label, "=")
		if !ok {
			return nil, fmt.Errorf("label %q is not of the form KEY=VALUE", label)
		}
		named[key] = value
	}
	set(run, "Labels", named)
	set(run, "Entrypoint", []string{entrypoint})
	set(run, "Cmd", []string{"--help"})
	set(all, "config", run)
	set(all, "created", date.Format(time.RFC3339))
	var history []object
	if err := json.Unmarshal(all["history"], &history); err != nil {
		return nil, err
	}
	if len(history) == 0 {
		return nil, errors.New("the image has no history")
	}
	last := history[len(history)-1]
	set(last, "created", date.Format(time.RFC3339))
	set(last, "created_by", "gguf2gpu, make dist")
	set(all, "history", history)
	return json.Marshal(all)
}
