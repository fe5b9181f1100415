package main

import (
	"encoding"
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// parsed is a flag whose text is turned into a T by a function. The function's error must say what is allowed.
type parsed[T any] struct {
	value *T
	kind  string // what the help calls the argument
	parse func(string) (T, error)
}

func (p parsed[T]) String() string {
	if p.value == nil { // pflag also calls this on a zero value of the type
		return ""
	}
	return fmt.Sprint(*p.value)
}

func (p parsed[T]) Type() string { return p.kind }

func (p parsed[T]) Set(s string) error {
	v, err := p.parse(s)
	if err == nil {
		*p.value = v
	}
	return err
}

// parsedFlag registers a flag with the default def and returns a pointer to its value.
func parsedFlag[T any](fs *pflag.FlagSet, name string, def T, kind, usage string, parse func(string) (T, error)) *T {
	value := def
	fs.Var(parsed[T]{&value, kind, parse}, name, usage)
	return &value
}

// text is a type whose pointer reads itself from text, as the library's choices do.
type text[T any] interface {
	*T
	encoding.TextUnmarshaler
}

// parseText reads a value of such a type.
func parseText[T any, P text[T]](s string) (v T, err error) {
	err = P(&v).UnmarshalText([]byte(s))
	return v, err
}

// textFlag registers a flag for one of the library's choices.
func textFlag[T any, P text[T]](fs *pflag.FlagSet, name string, def T, kind, usage string) *T {
	return parsedFlag(fs, name, def, kind, usage, parseText[T, P])
}

// choiceFlag registers a flag that takes one of the allowed words.
func choiceFlag(fs *pflag.FlagSet, name, def, usage string, allowed ...string) *string {
	list := strings.Join(allowed, ", ")
	return parsedFlag(fs, name, def, "WORD", usage+" ("+list+")", func(s string) (string, error) {
		i := slices.IndexFunc(allowed, func(word string) bool { return strings.EqualFold(word, s) })
		if i < 0 {
			return "", fmt.Errorf("allowed are %s", list)
		}
		return allowed[i], nil
	})
}

// listFlag registers a flag that takes a list of some of the values in all, separated by commas or given in several
// flags. The default is all of them.
func listFlag[T any](fs *pflag.FlagSet, name, usage string, all []T) *[]T {
	var chosen []T
	list := parsedFlag(fs, name, all, "LIST", usage, func(s string) ([]T, error) {
		for word := range strings.SplitSeq(s, ",") {
			i := slices.IndexFunc(all, func(v T) bool { return strings.EqualFold(lowerName(v), word) })
			if i < 0 {
				names := make([]string, len(all))
				for i, v := range all {
					names[i] = lowerName(v)
				}
				return nil, fmt.Errorf("%q: allowed are %s", word, strings.Join(names, ", "))
			}
			chosen = append(chosen, all[i])
		}
		return chosen, nil
	})
	fs.Lookup(name).DefValue = "all"
	return list
}

// lowerName returns the name of a value as flags and reports spell it: in lower case.
func lowerName(v any) string { return strings.ToLower(fmt.Sprint(v)) }

// intFlag registers a flag that takes a whole number, from least on. It is read as decimal: 010 is ten.
func intFlag(fs *pflag.FlagSet, name string, def, least int, usage string) *int {
	return parsedFlag(fs, name, def, "N", usage, func(s string) (int, error) {
		n, err := strconv.Atoi(s)
		switch {
		case errors.Is(err, strconv.ErrRange):
			return 0, errors.New("such a large number is not taken")
		case err != nil && least >= 0:
			return 0, fmt.Errorf("a whole number from %d on is wanted", least)
		case err != nil:
			return 0, errors.New("a whole number is wanted")
		case n < least:
			return 0, fmt.Errorf("a whole number from %d on is wanted", least)
		}
		return n, nil
	})
}

// jsonFlag registers --json. Main looks it up by this name, to report errors as JSON, too.
func jsonFlag(cmd *cobra.Command) *bool {
	return cmd.Flags().Bool("json", false, "print one JSON object on stdout; everything else goes to stderr")
}

// dtypeFlag registers --dtype: what the weights become on the device.
func dtypeFlag(fs *pflag.FlagSet) *plan.Policy {
	return textFlag(fs, "dtype", plan.F16, "DTYPE", "element type on the device: raw (the file's bytes), f32, f16, bf16")
}

// byteSizeFlag registers a flag that takes a size such as 64MiB. The value, in bytes, is 0 when the flag is not given.
func byteSizeFlag(fs *pflag.FlagSet, name, usage string) *uint64 {
	return parsedFlag(fs, name, 0, "SIZE", usage, parseBytes)
}

func parseBytes(s string) (uint64, error) {
	n, err := humanize.ParseBytes(s)
	if err != nil && strings.Contains(err.Error(), "too large") || n > math.MaxInt64 {
		return 0, errors.New("such a large size is not taken")
	}
	if err != nil || n == 0 {
		return 0, errors.New("allowed are sizes above zero such as 4096, 256KiB, 64MiB or 16GB (1 KiB is 1024 bytes, 1 KB 1000)")
	}
	return n, nil
}

// byteRateFlag registers a flag that takes a rate such as 25GB/s. The value, in bytes per second, is 0 when the flag is
// not given.
func byteRateFlag(fs *pflag.FlagSet, name, usage string) *float64 {
	return parsedFlag(fs, name, 0, "RATE", usage, parseRate)
}

// bitRate matches rates in bits per second, as network hardware has them: a small b behind a capital prefix.
var bitRate = regexp.MustCompile(`[KMGT]i?(b|bit|bits|bps)(/s)?$`)

func parseRate(s string) (float64, error) {
	if bitRate.MatchString(s) {
		return 0, errors.New("that is in bits; allowed are rates in bytes such as 800MB/s, 25GB/s or 1GiB/s (8 Gb/s are 1 GB/s)")
	}
	n, err := parseBytes(strings.TrimSuffix(s, "/s"))
	if err != nil {
		return 0, errors.New("allowed are rates above zero such as 800MB/s, 25GB/s or 1GiB/s")
	}
	if n < 1000 {
		return 0, fmt.Errorf("that is %d bytes a second: give it a unit, as in 800MB/s, 25GB/s or 1GiB/s", n)
	}
	return float64(n), nil
}

// dequantFlags are --dequant and --kernel-cache: who converts, and where compiled kernels are kept.
type dequantFlags struct {
	by    *loader.Dequant
	cache *string
}

func addDequantFlags(fs *pflag.FlagSet) dequantFlags {
	return dequantFlags{
		by: textFlag(fs, "dequant", loader.DequantAuto, "WHO",
			"who converts: cpu, gpu (kernels compiled by hipRTC), auto (gpu where that is quicker)"),
		cache: kernelCacheFlag(fs),
	}
}

// check refuses --dequant gpu with --sync, as the synchronous loader always converts on the CPU.
func (f dequantFlags) check(sync bool) error {
	if sync && *f.by == loader.DequantGPU {
		return usageErrorf("--sync and --dequant gpu: the synchronous loader converts on the CPU; leave one of the two out")
	}
	return nil
}

// joinProve makes "--prove on" one argument, "--prove=on": a flag that needs no value takes only one that is joined to
// it.
func joinProve(args []string) []string {
	var joined []string
	for i := 0; i < len(args); i++ {
		if args[i] == "--" {
			return append(joined, args[i:]...)
		}
		joined = append(joined, args[i])
		if args[i] == "--prove" && i+1 < len(args) && new(loader.Prove).UnmarshalText([]byte(args[i+1])) == nil {
			i++
			joined[len(joined)-1] += "=" + args[i]
		}
	}
	return joined
}

// proveFlag registers --prove. Without a value it means on.
func proveFlag(fs *pflag.FlagSet) *loader.Prove {
	p := textFlag(fs, "prove", loader.ProveAuto, "WHEN", "compare fingerprints, made by the devices, of what they got with those of what "+
		"was sent: on, off, auto (where that is free: models of servers); --prove alone means on; exit status 6 if one differs")
	fs.Lookup("prove").NoOptDefVal = loader.ProveOn.String()
	return p
}

func kernelCacheFlag(fs *pflag.FlagSet) *string {
	return fs.String("kernel-cache", "",
		"directory for compiled kernels, "+gpu.NoCache+" for none (default gguf2gpu/kernels in the user's cache directory)")
}

// rulesFlag collects the values of a flag that may be given several times.
type rulesFlag[T fmt.Stringer] struct {
	rules *[]T
	kind  string // what the help calls a value
	parse func(string) (T, error)
}

func (f rulesFlag[T]) Type() string { return f.kind }

func (f rulesFlag[T]) String() string {
	if f.rules == nil || len(*f.rules) == 0 {
		return ""
	}
	texts := make([]string, len(*f.rules))
	for i, rule := range *f.rules {
		texts[i] = rule.String()
	}
	return strings.Join(texts, " ")
}

func (f rulesFlag[T]) Set(s string) error {
	rule, err := f.parse(s)
	if err == nil {
		*f.rules = append(*f.rules, rule)
	}
	return err
}
