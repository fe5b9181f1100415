package main

import (
	"context"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/readback"
)

// The values of --names.
const (
	namesGGUF = "gguf"
	namesHF   = "hf"
)

// indexName is what transformers calls the index of a checkpoint in several files.
const indexName = "model.safetensors.index.json"

// exportFlags say whether and how the model is written to a safetensors file. A nil *exportFlags is that of a command
// that does not write one.
type exportFlags struct {
	to, names *string
}

func addExportFlags(fs *pflag.FlagSet, when string) *exportFlags {
	return &exportFlags{
		to: fs.String("readback", "", "write what is in device memory to this safetensors file"+when),
		names: choiceFlag(fs, "names", namesGGUF,
			"with --readback, what tensors are called, and the order of their rows: as in the file, or in transformers", namesGGUF, namesHF),
	}
}

// check refuses flags that say nothing, and a model whose names are not known. file is nil where it is not open yet.
func (f *exportFlags) check(file *gguf.File) error {
	switch {
	case f == nil || *f.names != namesHF:
		return nil
	case *f.to == "":
		return usageErrorf("--names hf is for --readback")
	case file == nil:
		return nil
	}
	_, err := plan.HFTensors(file)
	return err
}

// export is what the flags ask for. hf returns the names of transformers.
func (f *exportFlags) export(hf func() (map[string][]plan.HFTensor, error)) (e readback.Export, err error) {
	if *f.names == namesHF {
		e.HF, err = hf()
	}
	return e, err
}

// write writes m, if the flags say so, as the file that they name.
func (f *exportFlags) write(ctx context.Context, m *loader.Model, hf func() (map[string][]plan.HFTensor, error)) error {
	if *f.to == "" {
		return nil
	}
	e, err := f.export(hf)
	if err != nil {
		return err
	}
	return writeFile(*f.to, func(o *outputFile) error { return e.WriteSafetensors(ctx, m, o) })
}

// writeRank writes what this rank has of a model, if the flags say so. The first of several ranks that have whole
// layers, and write files of their own, also writes the index that makes one checkpoint of them.
func (f *exportFlags) writeRank(ctx context.Context, s *loaded, spec plan.Spec) error {
	if *f.to == "" {
		return nil
	}
	e, err := f.export(func() (map[string][]plan.HFTensor, error) { return plan.HFTensors(s.file) })
	if err != nil {
		return err
	}
	to := s.shard.expand(*f.to)
	err = writeFile(to, func(o *outputFile) error { return e.WriteSafetensors(ctx, s.weights, o) })
	if err != nil || e.HF == nil || spec.Shard.By != plan.ShardLayers || spec.Shard.Rank != 0 ||
		!strings.Contains(filepath.Base(*f.to), "{rank}") {
		return err
	}
	var files []readback.IndexedFile
	for rank := range spec.Shard.World {
		of := s.shard.of(rank)
		part := spec
		part.Shard, part.Split = of.shard, plan.Split{}
		p, err := plan.New(s.file, part, []uint64{0})
		if err != nil {
			return err
		}
		files = append(files, readback.IndexedFile{Name: filepath.Base(of.expand(*f.to)), Plan: p})
	}
	return writeFile(filepath.Join(filepath.Dir(to), indexName), func(o *outputFile) error {
		return e.WriteIndex(o, files)
	})
}
