package main

import (
	"cmp"
	"context"
	"errors"
	"regexp"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

func newInspectCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "inspect MODEL [flags]",
		Short: "Show a model's header, metadata, tensors and sizes per dtype",
		Long: `Show what a model is: its quantization and shape, metadata, tensors, and how many bytes its tensors need on a device in
each dtype. Integer tensors keep their bytes in every dtype, and so do types of other programs than ggml.

MODEL is a GGUF file, or any part of a split model, or any other name that load takes; of those that are not on this
machine, the header alone is fetched. hf:ORG/REPO, ollama:, oci://REGISTRY/REPO and s3://BUCKET/DIRECTORY/ list what is
there.
Of long texts and arrays the beginning is shown, and with --json of arrays of more than 16 elements; --full shows all.`,
		Example: `  gguf2gpu inspect model.gguf --no-tensors
  gguf2gpu inspect model.gguf --tensors '^blk\.0\.' --keys '^general\.'
  gguf2gpu inspect hf:ORG/REPO
  gguf2gpu inspect model.gguf --json | jq .device_bytes.f16`,
		Args: cobra.ExactArgs(1),
	}
	fs := cmd.Flags()
	asJSON := jsonFlag(cmd)
	far := addRemoteFlags(cmd)
	o := inspection{
		full: fs.Bool("full", false, "show long metadata arrays and texts in full"),
		tensors: parsedFlag(fs, "tensors", nil, "REGEXP", "list only the tensors whose names match; sizes are still those of all",
			parseNames),
		noTensors: fs.Bool("no-tensors", false, "list no tensors"),
		keys:      parsedFlag(fs, "keys", nil, "REGEXP", "show only the metadata whose keys match", parseNames),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		if *o.noTensors && *o.tensors != nil {
			return usageErrorf("--tensors says which tensors to list and --no-tensors to list none; leave one of the two out")
		}
		// A model of many tensors needs tens of megabytes for their table. No more than a quarter of that may be garbage.
		defer debug.SetGCPercent(debug.SetGCPercent(25))
		if l, err := far.list(cmd.Context(), args[0]); l != nil || err != nil {
			return printFound(cmd, l, *asJSON, err)
		}
		m, opener, err := far.view(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if opener != nil {
			defer opener.Close()
		}
		defer func() { err = errors.Join(err, m.Close()) }()
		o.ctx, o.model = cmd.Context(), m
		if *asJSON {
			return o.printJSON(cmd.OutOrStdout(), remote.Redact(args[0]))
		}
		return m.Guard(func() error { return o.print(cmd.OutOrStdout(), remote.Redact(args[0])) })
	}
	return cmd
}

// inspection is one run of inspect: a model, and what of it is shown. All that it prints is written as it goes, since a
// header can have a gigabyte. The model is a view, so all of it must be read inside its Guard.
type inspection struct {
	ctx   context.Context
	model *gguf.File

	full, noTensors *bool
	tensors, keys   **regexp.Regexp
}

// listsTensor reports whether a tensor is to be listed.
func (o *inspection) listsTensor(t *gguf.Tensor) bool {
	return !*o.noTensors && (*o.tensors == nil || (*o.tensors).MatchString(t.Name))
}

// showsKey reports whether a key of the metadata is to be shown.
func (o *inspection) showsKey(key string) bool { return *o.keys == nil || (*o.keys).MatchString(key) }

// typeTotal is all tensors of one type together. Sizes are in bytes.
type typeTotal struct {
	Tensors  int    `json:"tensors"`
	Elements uint64 `json:"elements"`
	Bytes    uint64 `json:"bytes"`
	Unsized  int    `json:"unsized,omitempty"` // of the tensors, those of unknown size, which are missing in Bytes
	Origin   string `json:"origin,omitempty"`  // the program that the type comes from, if that is not ggml
}

// totals is what inspect tells of a model as a whole.
type totals struct {
	elements    uint64
	sized       uint64 // of the elements, those of tensors of known size
	bytes       uint64 // of those
	types       map[string]typeTotal
	deviceBytes map[string]uint64 // what all tensors take on a device, by dtype
	unsized     int               // tensors that are missing in these sums
	partTensors []int
}

// total adds up a model's tensors.
func total(m *gguf.File) *totals {
	s := &totals{
		types: map[string]typeTotal{}, deviceBytes: map[string]uint64{}, partTensors: make([]int, len(m.Parts())),
	}
	for i := range m.Tensors() {
		t := &m.Tensors()[i]
		name := t.Type.String()
		one := s.types[name]
		one.Tensors++
		one.Elements += t.Elems()
		if !t.Type.Valid() {
			one.Origin = cmp.Or(t.Type.Origin(), "unknown")
		}
		s.elements += t.Elems()
		s.partTensors[t.Part]++
		if t.Sized() {
			one.Bytes += uint64(t.Size)
			s.bytes += uint64(t.Size)
			s.sized += t.Elems()
		} else {
			one.Unsized++
			s.unsized++
		}
		s.types[name] = one
		for _, p := range plan.Policies() {
			n, ok := p.Target(t.Type).Bytes(t.Elems())
			if !ok || !t.Type.Valid() { // its bytes can be taken as they are
				n = uint64(max(t.Size, 0))
			}
			s.deviceBytes[p.String()] += n
		}
	}
	return s
}

// bitsPerWeight is the average over all tensors of known size; 0 if there are none.
func (s *totals) bitsPerWeight() float64 {
	if s.sized == 0 {
		return 0
	}
	return 8 * float64(s.bytes) / float64(s.sized)
}

// quantization says how the weights are stored: what the file says of itself, or the type that takes most bytes.
func (o *inspection) quantization(s *totals) string {
	if n, ok := o.model.Metadata().Uint("general.file_type"); ok {
		return fileTypeName(n)
	}
	most := ""
	for name, t := range s.types {
		if most == "" || t.Bytes > s.types[most].Bytes || t.Bytes == s.types[most].Bytes && name < most {
			most = name
		}
	}
	if most != "" && len(s.types) > 1 {
		return "mostly " + most
	}
	return most
}

// shape is what a model's metadata says of its architecture. 0 stands for what it does not say.
type shape struct {
	Layers      uint64 `json:"layers,omitempty"`
	Heads       uint64 `json:"heads,omitempty"` // in the layer that has most, as for all that layers differ in
	KVHeads     uint64 `json:"kv_heads,omitempty"`
	Embedding   uint64 `json:"embedding,omitempty"`
	FeedForward uint64 `json:"feed_forward,omitempty"`
	Context     uint64 `json:"context,omitempty"`
	Vocabulary  uint64 `json:"vocabulary,omitempty"`
	Experts     uint64 `json:"experts,omitempty"`
	ExpertsUsed uint64 `json:"experts_used,omitempty"`
}

// shape reads the model's shape from its metadata.
func (o *inspection) shape() shape {
	md := o.model.Metadata()
	number := func(key string) uint64 { return largest(md, o.model.Architecture()+"."+key) }
	s := shape{
		Layers: number("block_count"), Heads: number("attention.head_count"), KVHeads: number("attention.head_count_kv"),
		Embedding: number("embedding_length"), FeedForward: number("feed_forward_length"), Context: number("context_length"),
		Vocabulary: number("vocab_size"), Experts: number("expert_count"), ExpertsUsed: number("expert_used_count"),
	}
	if tokens, ok := md.Get("tokenizer.ggml.tokens"); ok && s.Vocabulary == 0 {
		s.Vocabulary = uint64(tokens.Len())
	}
	return s
}

// maxPerLayer is the longest array that is taken for one with an element for each layer.
const maxPerLayer = 1 << 16

// largest returns a number of the metadata; of an array, which has one for each layer, the largest. It returns 0 if
// there is none.
func largest(md *gguf.Metadata, key string) (n uint64) {
	v, _ := md.Get(key)
	if u, ok := v.Uint(); ok {
		return u
	}
	if v.Len() > maxPerLayer {
		return 0
	}
	for _, u := range v.Uints() {
		n = max(n, u)
	}
	for _, i := range v.Ints() { // also of small unsigned numbers
		n = max(n, uint64(max(i, 0)))
	}
	return n
}
