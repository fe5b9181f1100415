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
	kind     string // "auto", "soft" or "hip"
	index    int    // of the GPU; 0 unless the value was hip:N
	numbered bool   // it was
}

func (d deviceSpec) String() string {
	if d.numbered {
		return d.kind + ":" + strconv.Itoa(d.index)
	}
	return d.kind
}

func parseDevice(s string) (deviceSpec, error) {
	switch s {
	case "auto", "soft", "hip":
		return deviceSpec{kind: s}, nil
	}
	if number, ok := strings.CutPrefix(s, "hip:"); ok {
		if n, err := strconv.ParseUint(number, 10, 16); err == nil {
			return deviceSpec{kind: "hip", index: int(n), numbered: true}, nil
		}
	}
	return deviceSpec{}, errors.New("allowed are auto, soft, hip, and hip:N for GPU number N")
}
