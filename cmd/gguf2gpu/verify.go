package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func newVerifyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify MODEL [flags]",
		Short: "Load a model, read everything back and compare it with the file",
		Long: `Load a model, read everything back from device memory and compare it, byte for byte, with what the reference kernels
make of the file. Any NaN equals any other. Of a MODEL on a server the file is fetched twice.`,
		Example: `  gguf2gpu verify model.gguf
  gguf2gpu verify model.gguf --dtype f32 --device hip:all`,
		Args: cobra.ExactArgs(1),
	}
	f := addLoadFlags(cmd)
	f.hashes, f.shard = addHashFlags(cmd, f.json), addShardFlags(cmd.Flags(), false)
	f.hashes.shard, f.split = f.shard, addSplitFlags(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		f.twice = "verify"
		s, err := f.load(cmd, args[0], nil)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.close()) }()
		if err := s.verify(cmd.Context()); err != nil {
			return err
		}
		r := s.report()
		return f.printReport(cmd, s, &r)
	}
	return cmd
}
