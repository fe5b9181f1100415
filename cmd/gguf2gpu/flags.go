package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gguf2gpu/gguf2gpu/loader"
)

// parsed is a flag whose text a function turns into a T. The function's error says what is allowed.
type parsed[T any] struct {
	value *T
	kind  string // what the help calls the argument
	parse func(string) (T, error)
}

func (p parsed[T]) String() string {
	if p.value == nil { // pflag asks a zero value of the type, too
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

// parsedFlag registers a flag with the default def, and returns where its value will be.
func parsedFlag[T any](fs *pflag.FlagSet, name string, def T, kind, usage string, parse func(string) (T, error)) *T {
	value := def
	fs.Var(parsed[T]{&value, kind, parse}, name, usage)
	return &value
}

// choiceFlag registers a flag that takes one of the allowed words.
func choiceFlag(fs *pflag.FlagSet, name, def, usage string, allowed ...string) *string {
	list := strings.Join(allowed, ", ")
	return parsedFlag(fs, name, def, "WORD", usage+" ("+list+")", func(s string) (string, error) {
		if !slices.Contains(allowed, s) {
			return "", fmt.Errorf("allowed are %s", list)
		}
		return s, nil
	})
}

// listFlag registers a flag that takes some of the values all: comma-separated, or in several flags. The default is all.
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

// lowerName is the name of a value as flags and reports spell it.
func lowerName(v any) string { return strings.ToLower(fmt.Sprint(v)) }

// jsonFlag registers --json. Main looks it up by this name.
func jsonFlag(cmd *cobra.Command) *bool {
	return cmd.Flags().Bool("json", false, "print one JSON object on stdout; everything else goes to stderr")
}

// dtypeFlag registers --dtype: what the weights become on the device.
func dtypeFlag(fs *pflag.FlagSet) *loader.DType {
	return parsedFlag(fs, "dtype", loader.F16, "DTYPE", "element type on the device: raw (the file's bytes), f32, f16, bf16",
		loader.ParseDType)
}

// byteSizeFlag registers a flag that takes a size such as 64MiB. The value is 0 when the flag is not given.
func byteSizeFlag(fs *pflag.FlagSet, name, usage string) *uint64 {
	return parsedFlag(fs, name, 0, "SIZE", usage, parseBytes)
}

func parseBytes(s string) (uint64, error) {
	n, err := humanize.ParseBytes(s)
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

func parseRate(s string) (float64, error) {
	n, err := parseBytes(strings.TrimSuffix(s, "/s"))
	if err != nil {
		return 0, errors.New("allowed are rates above zero such as 800MB/s, 25GB/s or 1GiB/s")
	}
	return float64(n), nil
}

// deviceSpec is the value of --device.
type deviceSpec struct {
	kind  string // "auto", "soft" or "hip"
	index int    // of the GPU; 0 unless the value was hip:N
	named bool   // a number was given
	list  string // several devices: "0,1" or "all" of hip, the number of them of soft
}

func (d deviceSpec) String() string {
	switch {
	case d.list != "":
		return d.kind + ":" + d.list
	case d.named:
		return d.kind + ":" + strconv.Itoa(d.index)
	}
	return d.kind
}

// numbers are those of the devices that d names, of count that there are.
func (d deviceSpec) numbers(count int) []int {
	if d.list == "" {
		return []int{d.index}
	}
	var all []int
	if d.list == "all" || d.kind == "soft" {
		for i := range count {
			all = append(all, i)
		}
		return all
	}
	for word := range strings.SplitSeq(d.list, ",") {
		n, _ := strconv.Atoi(word) // parseDevice has seen it
		all = append(all, n)
	}
	return all
}

// maxSoftDevices is how many software devices there can be.
const maxSoftDevices = 64

func parseDevice(s string) (deviceSpec, error) {
	kind, number, numbered := strings.Cut(s, ":")
	d := deviceSpec{kind: kind}
	switch {
	case !numbered && (s == "auto" || s == "soft" || s == "hip"):
		return d, nil
	case kind == "hip" && number == "all":
		d.list = number
		return d, nil
	case kind == "soft":
		if n, err := strconv.ParseUint(number, 10, 8); err == nil && n >= 1 && n <= maxSoftDevices {
			d.list = strconv.Itoa(int(n))
			return d, nil
		}
	case kind == "hip":
		var words []string
		for word := range strings.SplitSeq(number, ",") {
			n, err := strconv.ParseUint(word, 10, 16)
			if err != nil || slices.Contains(words, strconv.Itoa(int(n))) {
				words = nil
				break
			}
			words = append(words, strconv.Itoa(int(n)))
		}
		switch len(words) {
		case 0:
		case 1:
			d.index, _ = strconv.Atoi(words[0])
			d.named = true
			return d, nil
		default:
			d.list = strings.Join(words, ",")
			return d, nil
		}
	}
	return deviceSpec{}, errors.New("allowed are auto, soft, hip, and hip:N for GPU number N; several are hip:N,M..., hip:all, and soft:COUNT")
}
