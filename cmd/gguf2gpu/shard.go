package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// shardFlags are the flags that say which part of a model this process loads. A nil *shardFlags is that of a command
// that has none.
type shardFlags struct {
	by      *plan.ShardBy
	rules   []plan.ShardRule
	numbers *rankList // of --rank; nil: it was not given
	world   *int
	several bool // the command can have the parts of several ranks

	// After resolve.

	local int // the number among the ranks of this host, -1 if unknown
	shard plan.Shard
	ranks []int // all that were named, of which shard has the first; nil: it is one
}

func addShardFlags(fs *pflag.FlagSet, several bool) *shardFlags {
	which := "with --shard, which of the ranks this is, from 0 on"
	if several {
		which += ", or whose parts to hold: 0,1 or 0-3"
	}
	parse := func(s string) (rankList, error) {
		all, err := parseRanks(s)
		if errors.Is(err, errNoRanks) && !several {
			err = errors.New("a whole number from 0 on is wanted")
		}
		return all, err
	}
	f := &shardFlags{
		by: textFlag(fs, "shard", plan.ShardNone, "HOW",
			"load one rank's part only: layer (a run of whole layers), tensor (a slice of each matrix)"),
		numbers: parsedFlag(fs, "rank", rankList(nil), "N", which+" (default from the environment of torchrun, mpirun, srun, ...)",
			parse),
		world:   intFlag(fs, "world", -1, 1, "with --shard, how many ranks there are (default likewise)"),
		several: several, local: -1,
	}
	fs.Lookup("rank").DefValue, fs.Lookup("world").DefValue = "", ""
	fs.Var(rulesFlag[plan.ShardRule]{&f.rules, "REGEXP=HOW", parseText[plan.ShardRule]}, "shard-rule",
		"how tensors are divided by name: rows, columns, experts or replicate, as in 'attn_[kv]\\.=replicate'; repeatable, the first match wins")
	return f
}

// rankList is the value of --rank. It prints as the flag takes it.
type rankList []int

func (l rankList) String() string {
	words := make([]string, len(l))
	for i, n := range l {
		words[i] = strconv.Itoa(n)
	}
	return strings.Join(words, ",")
}

// maxRanks bounds the ranks that --rank names: more than a host has devices for.
const maxRanks = 1024

var errNoRanks = errors.New("allowed are numbers from 0 on, and ranges such as 0-3, separated by commas")

// parseRanks reads numbers and ranges, separated by commas.
func parseRanks(s string) (rankList, error) {
	var all rankList
	for word := range strings.SplitSeq(s, ",") {
		from, to, isRange := strings.Cut(word, "-")
		first, err := strconv.ParseUint(from, 10, 31)
		last := first
		if isRange && err == nil {
			last, err = strconv.ParseUint(to, 10, 31)
		}
		if err != nil || last < first {
			return nil, errNoRanks
		}
		if last-first >= maxRanks || len(all)+int(last-first) >= maxRanks {
			return nil, fmt.Errorf("that names more than %d ranks", maxRanks)
		}
		for n := first; n <= last; n++ {
			if slices.Contains(all, int(n)) {
				return nil, fmt.Errorf("rank %d is named twice", n)
			}
			all = append(all, int(n))
		}
	}
	return all, nil
}

// resolve finds out which part it is.
func (f *shardFlags) resolve() error {
	if f == nil {
		return nil
	}
	f.shard, f.ranks = plan.Shard{}, nil
	if *f.by == plan.ShardNone {
		if len(*f.numbers) > 0 || *f.world >= 0 || len(f.rules) > 0 {
			return usageErrorf("--rank, --world and --shard-rule say which part to load: --shard layer or --shard tensor must say how to divide")
		}
		return nil
	}
	if len(*f.numbers) > 1 && !f.several {
		return usageErrorf("--rank %v: this command has the part of one rank; hold can have those of several", *f.numbers)
	}
	numbers := []int(*f.numbers)
	if len(numbers) == 0 {
		numbers = []int{-1}
	}
	for i, n := range numbers {
		r, err := rankOf(n, *f.world, os.Getenv)
		if err != nil {
			return err
		}
		if i == 0 {
			f.shard, f.local = plan.Shard{Rank: r.Rank, World: r.World, By: *f.by, Rules: f.rules}, r.Local
		}
	}
	if len(numbers) > 1 { // --device says which they have
		f.ranks, f.local = numbers, -1
	}
	return nil
}

// of is f for one of the ranks.
func (f *shardFlags) of(rank int) *shardFlags {
	one := *f
	one.shard.Rank, one.ranks = rank, nil
	return &one
}

// each is f for each of the ranks.
func (f *shardFlags) each() []*shardFlags {
	if f.ranks == nil {
		return []*shardFlags{f}
	}
	var all []*shardFlags
	for _, rank := range f.ranks {
		all = append(all, f.of(rank))
	}
	return all
}

// allRanks makes do without a rank, for a plan of all: it reports whether there is a world and no rank, and then
// chooses the first.
func (f *shardFlags) allRanks() bool {
	if *f.by == plan.ShardNone || *f.world < 1 || len(*f.numbers) > 0 {
		return false
	}
	*f.numbers = rankList{0}
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
