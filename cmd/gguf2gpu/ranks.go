package main

import (
	"errors"

	"github.com/gguf2gpu/gguf2gpu/loader/rank"
)

// rankOf returns which rank this process is. number and world are the values of --rank and --world, negative if they
// were not given; they win over the environment, which then tells the local rank only. Every error is one of usage.
func rankOf(number, world int, getenv func(string) string) (rank.Rank, error) {
	const flags = ", or give --rank and --world"
	if number < 0 && world < 0 {
		r, err := rank.Detect(getenv)
		switch {
		case errors.Is(err, rank.ErrUnknown):
			err = usageErrorf("--shard needs to know which rank of how many this is: start it through torchrun, mpirun or srun" + flags)
		case err != nil:
			err = usageErrorf("%w%s", err, flags)
		}
		return r, err
	}
	switch {
	case world < 0:
		return rank.Rank{}, usageErrorf("--rank is given without --world, the number of ranks")
	case number < 0:
		return rank.Rank{}, usageErrorf("--world is given without --rank, which of them this is, counted from 0")
	case world == 0:
		return rank.Rank{}, usageErrorf("--world is 0: there must be at least one rank")
	case number >= world:
		return rank.Rank{}, usageErrorf("--rank is %d, but --world is %d: ranks are counted from 0 to %d", number, world, world-1)
	}
	local, err := rank.Local(getenv)
	if err != nil {
		return rank.Rank{}, usageErrorf("%w", err)
	}
	return rank.Rank{Rank: number, World: world, Local: local, Source: "--rank and --world"}, nil
}
