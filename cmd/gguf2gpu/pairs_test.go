package main

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// This file has the table of all choices that a command line of load, verify or hold makes about the way that a model
// takes to the device, and the rules of what is refused. Every pair of values of two choices is tested in at least one
// combination: what ends up in device memory must be what the plain load of the whole model puts there, byte for byte.
// TestPairs does that, FuzzCombinations takes random combinations. cover in pairs_cover_test.go chooses the
// combinations, and pairs_run_test.go runs them and compares.

// dimension is one choice. Its first value is the plain one.
type dimension struct {
	name   string
	values []value
}

// value is one way to choose. args are the arguments that it adds to the command line; where they depend on other
// choices, too, they are empty here, and combination.args adds them.
type value struct{ name, args string }

var dimensions = []dimension{
	// Models: a llama that two and three ranks can divide, the sample, one with fused tensors and experts, one without
	// layers, and the same with a value that is not a number, and with a tensor of a type that ggml does not have. See
	// pairs_models_test.go.
	{"model", []value{{"llama", ""}, {"tiny", ""}, {"fused", ""}, {"flat", ""}, {"nan", ""}, {"fork", ""}}},
	{"source", []value{{"file", ""}, {"parts", ""}, {"http", ""}, {"http-parts", ""}}},
	{"by", []value{{"load", ""}, {"load-verify", "--verify"}, {"verify", ""}, {"hold", ""}, {"add", ""}}},
	// All but soft are the simulated library: hip as of HIP 6, apu a GPU that shares the host's memory.
	{"device", []value{{"soft", ""}, {"hip", ""}, {"hip5", ""}, {"hip7", ""}, {"apu", ""}, {"auto", ""}}},
	{"memory", []value{{"unset", ""}, {"enough", "--soft-memory 64MiB"}, {"little", "--soft-memory 4KiB"}}},
	{"devices", []value{{"unnamed", ""}, {"1", ""}, {"2", ""}, {"3", ""}}},
	{"split", []value{
		{"unset", ""}, {"layer", "--split layer"}, {"none", "--split none"}, {"ratio", ""}, {"short-ratio", ""}, {"ratio-of-none", "--split none"},
	}},
	{"shard", []value{
		{"none", ""}, {"layer/1", ""}, {"layer/2", ""}, {"layer/5", ""}, {"tensor/1", ""}, {"tensor/2", ""}, {"tensor/3", ""},
	}},
	{"shard-rule", []value{{"none", ""}, {"replicate", `--shard-rule attn_[kv]\.=replicate`}, {"columns", "--shard-rule rope=columns"}}},
	{"dtype", []value{{"f16", ""}, {"raw", "--dtype raw"}, {"f32", "--dtype f32"}, {"bf16", "--dtype bf16"}}},
	{"dtype-for", []value{
		{"none", ""}, {"attn", "--dtype-for attn_=f32"}, {"all", "--dtype-for .=raw"}, {"two", "--dtype-for norm=bf16 --dtype-for ffn_down=raw"},
	}},
	{"tensors", []value{
		{"all", ""}, {"attn", "--tensors attn_"}, {"ends", `--tensors ^(token_embd|output)\.weight$`}, {"nothing", "--tensors ^nothing$"},
	}},
	{"dequant", []value{{"auto", ""}, {"cpu", "--dequant cpu"}, {"gpu", "--dequant gpu"}}},
	{"io", []value{{"auto", ""}, {"mmap", "--io mmap"}, {"direct", "--io direct"}}},
	{"threads", []value{{"unset", ""}, {"1", "--threads 1"}, {"3", "--threads 3"}}},
	{"streams", []value{{"unset", ""}, {"1", "--streams 1"}, {"4", "--streams 4"}}},
	{"staging", []value{
		{"unset", ""}, {"chunk", "--chunk 64KiB"}, {"staging", "--staging 192KiB"}, {"least", "--chunk 64KiB --staging 64KiB"},
	}},
	{"connections", []value{{"unset", ""}, {"1", "--connections 1"}, {"3", "--connections 3"}}},
	{"check", []value{{"no", ""}, {"yes", "--check"}}},
	{"hash", []value{{"none", ""}, {"write", ""}, {"expect", ""}, {"both", ""}, {"blake3", ""}, {"stdout", "--hash -"}}},
	{"prove", []value{{"auto", ""}, {"on", "--prove"}, {"off", "--prove=off"}}},
	{"sync", []value{{"no", ""}, {"yes", "--sync"}}},
	{"output", []value{{"json", "--progress none"}, {"progress", "--progress plain"}, {"trace", "--progress none"}}},
}

// refusal is a rule: combinations in which each of the named dimensions has one of the named values are refused.
type refusal struct {
	when string // such as "device=hip,auto devices=2"
	code exitCode
	says string // part of the message
	some bool   // not every rank has to be refused, but one at least
}

var refusals = []refusal{
	{when: "tensors=nothing", code: exitFailed, says: "no tensor's name matches"},
	{when: "tensors=attn model=flat,nan,fork", code: exitFailed, says: "no tensor's name matches"},
	{when: "device=auto devices=1,2,3", code: exitUsage, says: "allowed are auto, soft, hip"},
	{when: "devices=unnamed split=layer,none,ratio,short-ratio,ratio-of-none", code: exitUsage, says: "are for several devices"},
	{when: "device=hip,hip5,hip7,apu devices=1 split=layer,none,ratio,short-ratio,ratio-of-none", code: exitUsage, says: "are for several devices"},
	{when: "split=short-ratio", code: exitUsage, says: "a ratio of"},
	{when: "split=ratio-of-none", code: exitUsage, says: "a ratio is for a split by layers"},
	{when: "shard=none shard-rule=replicate,columns", code: exitUsage, says: "must say how to divide"},
	{when: "shard=layer/1,layer/2,layer/5 shard-rule=columns", code: exitUsage, says: "only replicate makes sense"},
	{when: "shard=tensor/2,tensor/3 model=tiny tensors=all,attn", code: exitUsage, says: "cannot be divided evenly among"},
	{
		when: "model=fork tensors=all dtype=f16,f32,bf16 dtype-for=none,attn,two", code: exitBadModel,
		says: "type 137 is IQ2_K of ik_llama.cpp",
	},
	{when: "sync=yes dequant=gpu", code: exitUsage, says: "the synchronous loader converts on the CPU"},
	{when: "source=http,http-parts io=mmap,direct", code: exitUsage, says: "is read by ranges"},
	{when: "staging=least devices=2,3 split=unset,layer,ratio", code: exitUsage, says: "do not hold a chunk"},
	{when: "by=load,load-verify,verify,hold hash=stdout", code: exitUsage, says: "both want stdout"},
	{when: "by=add hash=write,expect,both,blake3,stdout", code: exitUsage, says: "are for one MODEL"},
	{when: "by=load,load-verify,verify,hold check=yes model=nan", code: exitBadModel, says: "is NaN", some: true},
	{when: "device=hip,hip5,hip7,apu memory=enough,little", code: exitUsage, says: "are for the software device"},
	{when: "device=soft memory=little", code: exitNoMemory, says: "not enough device memory", some: true},
	// The holder says what is wrong, and those who ask it fail.
	{when: "by=add check=yes model=nan", code: exitFailed, says: "is NaN"},
	{when: "by=hold,add sync=yes", code: exitUsage, says: "--sync is not for hold"},
}

// found are combinations that once went wrong, or came near to it: always tried, beside those that cover chooses.
var found = []string{
	"devices=1 split=ratio by=load-verify",                   // a split onto one device loaded some of the tensors, and verified these
	"devices=3 split=layer source=http-parts",                // sizes were not those of remote models
	"devices=2 split=none by=hold",                           // a holder that was verified ended
	"model=fork dtype=raw shard=tensor/2",                    // a tensor of unknown type that every rank has was refused
	"model=fork dtype=raw shard=tensor/3 shard-rule=columns", // likewise
	"model=llama shard=layer/5 devices=3 tensors=ends",       // more ranks and devices than there are tensors
	"device=apu devices=3 split=none dequant=gpu dtype=bf16", // copies on devices that share the host's memory
	"device=apu devices=3 dequant=gpu prove=on",              // sums of what the device converted, in shared memory
	"device=apu devices=3 tensors=ends shard=tensor/2",       // --plan said another split, by what is free at the moment
}

// combination has a value of every dimension, as an index; open where none is chosen yet.
type combination []int

const open = -1

// numberOf returns the index of a dimension and panics if there is none of that name.
func numberOf(name string) int {
	return mustFind(slices.IndexFunc(dimensions, func(d dimension) bool { return d.name == name }), name)
}

func mustFind(i int, name string) int {
	if i < 0 {
		panic("the table of pairs has no " + name)
	}
	return i
}

// valueOf returns the index of a value of dimension d and panics if there is none of that name.
func valueOf(d int, name string) int {
	return mustFind(slices.IndexFunc(dimensions[d].values, func(v value) bool { return v.name == name }),
		dimensions[d].name+"="+name)
}

// is reports whether the dimension has one of the values.
func (c combination) is(name string, values ...string) bool {
	d := numberOf(name)
	return slices.ContainsFunc(values, func(v string) bool { return c[d] == valueOf(d, v) })
}

// value returns the name of the value of a dimension.
func (c combination) value(name string) string {
	d := numberOf(name)
	return dimensions[d].values[c[d]].name
}

// String returns every dimension that has not its plain value. set reads it.
func (c combination) String() string {
	var words []string
	for d, v := range c {
		if v > 0 {
			words = append(words, dimensions[d].name+"="+dimensions[d].values[v].name)
		}
	}
	if len(words) == 0 {
		return "plain"
	}
	return strings.Join(words, " ")
}

// set sets the dimensions that are named in words such as "by=hold,add sync=yes".
func (c combination) set(words string) combination {
	for word := range strings.FieldsSeq(words) {
		name, v, _ := strings.Cut(word, "=")
		d := numberOf(name)
		c[d] = valueOf(d, v)
	}
	return c
}

// plain returns the combination with the plain value of every dimension.
func plain() combination { return make(combination, len(dimensions)) }

// world returns how many ranks load the model, and by what it is divided among them: "none", "layer" or "tensor".
func (c combination) world() (by string, n int) {
	by, number, _ := strings.Cut(c.value("shard"), "/")
	n, err := strconv.Atoi(number)
	if err != nil {
		n = 1
	}
	return by, n
}

// holds reports whether a process holds the model and others attach.
func (c combination) holds() bool { return c.is("by", "hold", "add") }

// count returns the number of devices.
func (c combination) count() int {
	n, err := strconv.Atoi(c.value("devices"))
	if err != nil {
		n = 1
	}
	return n
}

// condition is one of the conditions of a refusal.
type condition struct {
	dimension int
	values    []int
}

// conditions returns when as indices.
func (r *refusal) conditions() (all []condition) {
	for word := range strings.FieldsSeq(r.when) {
		name, list, _ := strings.Cut(word, "=")
		k := condition{dimension: numberOf(name)}
		for v := range strings.SplitSeq(list, ",") {
			k.values = append(k.values, valueOf(k.dimension, v))
		}
		all = append(all, k)
	}
	return all
}

// conditionsOf are those of each refusal.
var conditionsOf = func() (all [][]condition) {
	for i := range refusals {
		all = append(all, refusals[i].conditions())
	}
	return all
}()

// refused returns the refusals whose conditions hold, whatever is chosen for the dimensions that are open.
func (c combination) refused() (all []*refusal) {
	for i, conditions := range conditionsOf {
		holds := func(k condition) bool { return slices.Contains(k.values, c[k.dimension]) }
		if !slices.ContainsFunc(conditions, func(k condition) bool { return !holds(k) }) {
			all = append(all, &refusals[i])
		}
	}
	return all
}

// TestPairs loads models in all the ways that cover needs for every pair, and compares.
func TestPairs(t *testing.T) {
	t.Parallel()
	r := newPairsRig(t)
	rows, impossible := cover(r.accepts)
	pairs := 0
	for i := range dimensions {
		for j := range i {
			pairs += len(dimensions[i].values) * len(dimensions[j].values)
		}
	}
	t.Logf("%d pairs, of which %d are refused, in %d combinations", pairs, len(impossible), len(rows))
	for _, words := range found {
		if c := plain().set(words); r.has(c) {
			rows = append(rows, c)
		}
	}
	r.all(t, rows)
}

// TestRefusedPairs tries every way to be refused by one rule alone: each combination of the values that the rule names,
// with plain values of all other dimensions as far as other rules let them.
func TestRefusedPairs(t *testing.T) {
	t.Parallel()
	r := newPairsRig(t)
	var rows []combination
	for i := range refusals {
		for _, c := range waysToHold(conditionsOf[i]) {
			only := func(c combination) bool {
				return r.has(c) && !slices.ContainsFunc(c.refused(), func(other *refusal) bool { return other != &refusals[i] })
			}
			if row := complete(c, only, func(combination, int) []int { return nil }); row != nil {
				rows = append(rows, row)
			} else if only(c) {
				t.Errorf("%v: nothing is refused by %q alone", c, refusals[i].when)
			}
		}
	}
	r.all(t, rows)
}

// waysToHold returns a combination for each choice of values by which all conditions hold. Other dimensions are open.
func waysToHold(conditions []condition) []combination {
	all := []combination{slices.Repeat(combination{open}, len(dimensions))}
	for _, k := range conditions {
		var next []combination
		for _, c := range all {
			for _, v := range k.values {
				c = slices.Clone(c)
				c[k.dimension] = v
				next = append(next, c)
			}
		}
		all = next
	}
	return all
}

// FuzzCombinations loads models in random ways. The seed decides on all values; of every four seeds, three make
// combinations that are accepted.
func FuzzCombinations(f *testing.F) {
	r := newPairsRig(f)
	for seed := range uint64(8) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		c := r.random(rand.New(rand.NewPCG(seed, 0)), seed%4 != 0)
		if err := r.try(t.Context(), c); err != nil {
			t.Fatal(r.smallest(t.Context(), c, err))
		}
	})
}

// random returns a random combination; one that is accepted, if so wanted.
func (r *pairsRig) random(rng *rand.Rand, accepted bool) combination {
	fits := r.has
	if accepted {
		fits = r.accepts
	}
	c := slices.Repeat(combination{open}, len(dimensions))
	return complete(c, fits, func(_ combination, d int) []int {
		order := rng.Perm(len(dimensions[d].values))
		if rng.IntN(16) > 0 { // what needs processes takes longer, and is taken less often
			slices.SortStableFunc(order, func(v, w int) int { return cmp.Compare(processes(d, v), processes(d, w)) })
		}
		return order
	})
}

// processes returns how many processes a value needs beside this one, about.
func processes(d, v int) int {
	c := plain()
	c[d] = v
	switch {
	case c.holds():
		return 2
	case c.is("device", "soft"):
		return 0
	}
	return 1
}

// all tries combinations, several at the same time.
func (r *pairsRig) all(t *testing.T, rows []combination) {
	for i, c := range rows {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			if err := r.try(t.Context(), c); err != nil {
				t.Error(r.smallest(t.Context(), c, err))
			}
		})
	}
}
