package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

func newSynthCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "synth -o FILE [flags]",
		Short: "Write a model with real shapes and random weights, for tests and benchmarks",
		Long: `Write a model with the tensors, metadata and vocabulary size of a real one, and random weights of a sensible size.
The same preset, type and seed give the same file on every machine.

Presets: tiny and small (1.4 and 25 million weights, for tests), llama-1b (TinyLlama 1.1B), llama-7b and llama-70b (Llama 2). --type is
the type of the matrices: any type of ggml that holds weights, or q4_k_m, the mix of Q4_K and Q6_K that most models are
published in. Normalization weights are F32, as in real models. Every row of every preset is a multiple of 256 elements,
so each type fits each matrix.`,
		Args: cobra.NoArgs,
	}
	fs := cmd.Flags()
	out := fs.StringP("output", "o", "", "the file to write (required)")
	preset := parsedFlag(fs, "preset", presets[1], "NAME", "shape of the model: "+presetNames(), parsePreset)
	types := parsedFlag(fs, "type", mixQ4KM, "TYPE", "type of the matrices, such as q4_k_m, q8_0 or f16", parseSynthTypes)
	seed := fs.Uint64("seed", 1, "seed of the weights")
	force := fs.Bool("force", false, "replace the file if it exists")
	progress := progressFlag(fs)
	asJSON := jsonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *out == "" {
			return usageErrorf("-o FILE is required: where to write the model")
		}
		m := synthModel{shape: *preset, types: *types, seed: *seed}
		start := time.Now()
		f, err := createOutput(*out, *force)
		if err != nil {
			return err
		}
		defer f.Discard()
		bar := newProgress(*progress, cmd.ErrOrStderr(), "writing")
		defer bar.Abort()
		size, err := m.write(cmd.Context(), f, bar.Update)
		if err != nil {
			return fmt.Errorf("%s: %w", *out, err)
		}
		if err := f.Commit(); err != nil {
			return err
		}
		bar.Finish()
		r := synthReport{*out, size, len(m.tensors()), time.Since(start).Seconds()}
		if *asJSON {
			return writeJSON(cmd.OutOrStdout(), r)
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %d tensors, %s in %.2f s\n", r.File, r.Tensors,
			humanize.Bytes(uint64(r.Bytes)), r.Seconds)
		return err
	}
	return cmd
}

// synthReport is the JSON of synth.
type synthReport struct {
	File    string  `json:"file"`
	Bytes   int64   `json:"bytes"`
	Tensors int     `json:"tensors"`
	Seconds float64 `json:"seconds"`
}

// synthModel is a model to be made up.
type synthModel struct {
	shape
	types synthTypes
	seed  uint64
}

// write writes the model to f and returns its size in bytes. update learns how many bytes of how many are through.
func (m *synthModel) write(ctx context.Context, f io.Writer, update func(done, total int64)) (int64, error) {
	tensors := m.tensors()
	var total int64
	for _, t := range tensors {
		total += t.bytes()
	}
	count := &countingWriter{w: f, update: func(done int64) { update(min(done, total), total) }}
	// Collects what the writer copies into writes of whole chunks.
	buffered := bufio.NewWriterSize(count, chunkBytes)
	w := gguf.NewWriter(buffered, gguf.WriterOptions{})
	m.declare(w, tensors)
	if err := w.WriteHeader(); err != nil {
		return 0, err
	}
	err := synthesize(ctx, tensors, m.seed, func(r io.Reader) error {
		for _, t := range tensors {
			if err := w.CopyTensor(t.name, r); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	if err := w.Close(); err != nil {
		return 0, err
	}
	err = buffered.Flush()
	return count.n, err
}

// countingWriter counts the bytes that go through it.
type countingWriter struct {
	w      io.Writer
	n      int64
	update func(n int64)
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	c.update(c.n)
	return n, err
}
