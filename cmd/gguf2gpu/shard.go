package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// shardFlags are the flags that say which part of a model this process loads. A nil *shardFlags is that of a command
// that has none.
type shardFlags struct {
	by          *plan.ShardBy
	rules       []plan.ShardRule
	rank, world *int
	local       int // the number among the ranks of this host, -1 if unknown; after resolve
	shard       plan.Shard
}

func addShardFlags(fs *pflag.FlagSet) *shardFlags {
	f := &shardFlags{
		by: textFlag(fs, "shard", plan.ShardNone, "HOW",
			"load one rank's part only: layer (a run of whole layers), tensor (a slice of each matrix)"),
		rank:  intFlag(fs, "rank", -1, 0, "with --shard, which of the ranks this is, from 0 on (default from the environment of torchrun, mpirun, srun, ...)"),
		world: intFlag(fs, "world", -1, 1, "with --shard, how many ranks there are (default likewise)"),
		local: -1,
	}
	fs.Lookup("rank").DefValue, fs.Lookup("world").DefValue = "", ""
	fs.Var(rulesFlag[plan.ShardRule]{&f.rules, "REGEXP=HOW", parseText[plan.ShardRule]}, "shard-rule",
		"how tensors are divided by name: rows, columns, experts or replicate, as in 'attn_[kv]\\.=replicate'; repeatable, the first match wins")
	return f
}

// resolve finds out which part it is.
func (f *shardFlags) resolve() error {
	if f == nil {
		return nil
	}
	f.shard = plan.Shard{}
	if *f.by == plan.ShardNone {
		if *f.rank >= 0 || *f.world >= 0 || len(f.rules) > 0 {
			return usageErrorf("--rank, --world and --shard-rule say which part to load: --shard layer or --shard tensor must say how to divide")
		}
		return nil
	}
	r, err := rankOf(*f.rank, *f.world, os.Getenv)
	if err != nil {
		return err
	}
	f.shard, f.local = plan.Shard{Rank: r.Rank, World: r.World, By: *f.by, Rules: f.rules}, r.Local
	return nil
}

// allRanks makes do without a rank, for a plan of all: it reports whether there is a world and no rank, and then
// chooses the first.
func (f *shardFlags) allRanks() bool {
	if *f.by == plan.ShardNone || *f.world < 1 || *f.rank >= 0 {
		return false
	}
	*f.rank = 0
	return true
}

// expand puts the rank and the world in place of {rank} and {world} in a path, so that the ranks of one command line
// write files of their own.
func (f *shardFlags) expand(path string) string {
	if f == nil || f.shard.World == 0 {
		return path
	}
	return strings.NewReplacer("{rank}", strconv.Itoa(f.shard.Rank), "{world}", strconv.Itoa(f.shard.World)).Replace(path)
}

// shardReport is what --json says about the part that was loaded.
type shardReport struct {
	By     string `json:"by"`
	Rank   int    `json:"rank"`
	World  int    `json:"world"`
	Slices int    `json:"slices"` // tensors that are not whole
}

// report is nil when everything was loaded.
func (f *shardFlags) report(tensors []loader.Tensor) *shardReport {
	if f == nil {
		return nil
	}
	return reportShard(f.shard, tensors)
}

// reportShard is what JSON says about s, of which these tensors are there; nil when it is everything.
func reportShard(s plan.Shard, tensors []loader.Tensor) *shardReport {
	if s.By == plan.ShardNone {
		return nil
	}
	r := &shardReport{By: s.By.String(), Rank: s.Rank, World: s.World}
	for _, t := range tensors {
		if t.Slice != nil {
			r.Slices++
		}
	}
	return r
}

// print tells people which part it was, so that the ranks' reports can be told apart.
func (r *shardReport) print(w io.Writer) {
	if r != nil {
		fmt.Fprintf(w, "  rank %d of %d, by %s: %d of the tensors are slices\n", r.Rank, r.World, r.By, r.Slices)
	}
}
