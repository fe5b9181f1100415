package main

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/synth"
	"github.com/gguf2gpu/gguf2gpu/internal/term"
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
		Example: `  gguf2gpu synth -o test.gguf --preset small
  gguf2gpu synth -o 7b.gguf --preset llama-7b --type q8_0`,
		Args: cobra.NoArgs,
	}
	fs := cmd.Flags()
	out := fs.StringP("output", "o", "", "the file to write (required)")
	preset := textFlag(fs, "preset", synth.Llama1B, "NAME", "shape of the model: "+synth.PresetNames())
	types := textFlag(fs, "type", synth.Q4KM, "TYPE", "type of the matrices, such as q4_k_m, q8_0 or f16")
	seed := parsedFlag(fs, "seed", uint64(1), "N", "seed of the weights", func(s string) (uint64, error) {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return 0, errors.New("a whole number from 0 on is wanted")
		}
		return n, nil
	})
	force := fs.Bool("force", false, "replace the file if it exists")
	progress := progressFlag(fs)
	asJSON := jsonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *out == "" {
			return usageErrorf("-o FILE is required: where to write the model")
		}
		if err := checkOutputName(plannedOutput{flag: "-o", path: *out}); err != nil {
			return err
		}
		m := synth.Model{Preset: *preset, Types: *types, Seed: *seed}
		start := time.Now()
		f, err := createOutput(*out, *force)
		if err != nil {
			return err
		}
		defer f.Discard()
		bar := newProgress(*progress, cmd.ErrOrStderr(), "writing")
		defer bar.Abort()
		size, err := m.Write(cmd.Context(), f, bar.Update)
		if err != nil {
			return fmt.Errorf("%s: %w", *out, err)
		}
		if err := f.Commit(); err != nil {
			return err
		}
		bar.Finish()
		r := synthReport{
			File: *out, Bytes: size, Tensors: len(m.Tensors()), Seconds: time.Since(start).Seconds(),
		}
		if *asJSON {
			return writeJSON(cmd.OutOrStdout(), r)
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %d tensors, %s in %.2f s\n", term.Safe(r.File), r.Tensors,
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
