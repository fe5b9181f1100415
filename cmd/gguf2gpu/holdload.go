package main

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/hold"
	"github.com/gguf2gpu/gguf2gpu/loader/readback"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/models"
)

// holdPart is what the flags say about the part of one rank, or about a model that is not divided.
type holdPart struct {
	shard  *shardFlags
	hashes *hashFlags
}

// prepare finds out before anything is loaded what the flags want of each part of the model of that name.
func (f *holdFlags) prepare(name string) error {
	ranks := f.load.shard.ranks
	if ranks != nil {
		if models.IsStream(name) {
			return usageErrorf("each part of several ranks is read by itself, and %s comes once: write it to a file first", name)
		}
		if f.load.split.set("split") || f.load.split.set("split-ratio") {
			return usageErrorf("--split and --split-ratio are for one rank: each of several has all of its part on one device")
		}
		for _, o := range []plannedOutput{
			{flag: "--socket", path: *f.socket}, {flag: "--keep", path: *f.keep}, {flag: "--trace", path: *f.trace},
		} {
			if strings.Contains(o.path, "{rank}") {
				return usageErrorf("%s %s: this process holds the parts of several ranks, so that {rank} is no one number", o.flag, o.path)
			}
		}
		_, hash := hashTarget(*f.load.hashes.to)
		for _, o := range []plannedOutput{{flag: "--hash", path: hash}, {flag: "--readback", path: *f.export.to}} {
			if o.path != "" && !strings.Contains(o.path, "{rank}") {
				return usageErrorf("%s %s: each of several ranks has a file of its own: put {rank} into its name", o.flag, o.path)
			}
		}
	}
	for _, shard := range f.load.shard.each() {
		hashes := *f.load.hashes
		hashes.shard = shard
		if err := hashes.prepare(name); err != nil {
			return err
		}
		f.parts = append(f.parts, holdPart{shard, &hashes})
	}
	f.load.hashes = f.parts[0].hashes // what is hashed, and with what, is the same for all
	return nil
}

// openForOutputs opens the file that outputs must not overwrite; nil for "", of what is no file.
func openForOutputs(path string) (*gguf.File, error) {
	if path == "" {
		return nil, nil
	}
	return gguf.Open(path)
}

// checkOutputs finds out whether what the flags name can be written.
func (f *holdFlags) checkOutputs(names []string) error {
	outputs := []plannedOutput{{flag: "--trace", path: f.load.shard.expand(*f.trace)}}
	for _, p := range f.parts {
		outputs = append(outputs, append(p.hashes.outputs(),
			plannedOutput{flag: "--readback", path: p.shard.expand(*f.export.to)})...)
	}
	if !slices.ContainsFunc(outputs, func(o plannedOutput) bool { return o.path != "" }) {
		return nil
	}
	for _, path := range names {
		if !models.IsPath(path) {
			path = ""
		}
		m, err := openForOutputs(path)
		if err != nil {
			return err
		}
		err = checkOutputs(m, outputs...)
		if m != nil {
			err = errors.Join(err, m.Close())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// loadAll loads the models, one after the other: each has the link for itself. It calls serve when there is something
// to attach to; who comes earlier waits.
func (f *holdFlags) loadAll(ctx context.Context, h *hold.Holder, paths []string, serve func(),
	bar *atomic.Pointer[progress],
	notices, stderr io.Writer,
) error {
	for _, path := range paths {
		if err := f.load.sayUselessFor(notices, f.flags, path); err != nil {
			return err
		}
		doing(ctx, waitCopies, whyCopies)
		b := newProgress(*f.load.progress, stderr, "loading "+filepath.Base(path))
		bar.Store(b)
		err := f.loadOne(ctx, h, path, serve)
		if err != nil {
			b.Abort()
			return err
		}
		b.Finish()
	}
	bar.Store(nil)
	return nil
}

// loadOne loads a model and does with it, or with each part of it, what the flags say.
func (f *holdFlags) loadOne(ctx context.Context, h *hold.Holder, path string, serve func()) error {
	name, err := h.Add(ctx, *f.name, path)
	if err != nil {
		return err
	}
	serve()
	if err := h.Wait(ctx, name); err != nil {
		return err
	}
	names, err := h.Parts(name)
	if err != nil {
		return err
	}
	for _, name := range names {
		w, err := h.Model(name)
		if err != nil {
			return err
		}
		for _, p := range f.parts {
			if len(f.parts) == 1 || p.shard.shard.Rank == w.Plan().Spec.Shard.Rank {
				err = errors.Join(err, f.use(ctx, p, w, path))
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// use does with a part that is loaded what the flags say.
func (f *holdFlags) use(ctx context.Context, p holdPart, w *loader.Model, path string) error {
	compares := p.hashes.given() || *f.export.to != ""
	if !*f.verify && !compares {
		return nil
	}
	return f.load.remote.withModel(ctx, path, func(file *gguf.File) error {
		if *f.verify {
			if _, err := readback.Verify(ctx, w, file); err != nil {
				return err
			}
		}
		if !compares {
			return nil
		}
		one := &loaded{path: path, file: file, weights: w, shard: p.shard}
		if err := f.export.writeRank(ctx, one, w.Plan().Spec); err != nil {
			return err
		}
		return p.hashes.finish(one)
	})
}
