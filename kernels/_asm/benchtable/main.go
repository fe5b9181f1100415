// Command benchtable turns the output of BenchmarkDequant and BenchmarkMemcpy into the table of kernels/README.md:
//
//	go test -run '^$' -bench 'Dequant|Memcpy' -count 10 ./kernels | go run -C kernels/_asm ./benchtable
//
// Each figure is the median of all runs: GB/s of output. The last columns compare float32 output with the memcpy of the
// same run.
package main

import (
	"bufio"
	"fmt"
	"io"
	"log"
	"os"
	"slices"
	"strconv"
	"strings"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("benchtable: ")
	results, err := parse(os.Stdin)
	if err != nil {
		log.Fatal(err)
	}
	if err := write(os.Stdout, results); err != nil {
		log.Fatal(err)
	}
}

// results holds the rates of each benchmark, by its name without the number of processors.
type results struct {
	order []string
	rates map[string][]float64
}

// parse reads the lines that the testing package prints.
func parse(r io.Reader) (results, error) {
	res := results{rates: map[string][]float64{}}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		i := slices.Index(fields, "out-GB/s")
		if i < 1 {
			continue
		}
		rate, err := strconv.ParseFloat(fields[i-1], 64)
		if err != nil {
			return res, fmt.Errorf("%q: %w", lines.Text(), err)
		}
		name := fields[0]
		if dash := strings.LastIndex(name, "-"); dash >= 0 && !strings.Contains(name[dash:], "/") {
			name = name[:dash]
		}
		if res.rates[name] == nil {
			res.order = append(res.order, name)
		}
		res.rates[name] = append(res.rates[name], rate)
	}
	return res, lines.Err()
}

// median returns the median rate of a benchmark, 0 if it did not run.
func (r results) median(name string) float64 {
	rates := slices.Sorted(slices.Values(r.rates[name]))
	if len(rates) == 0 {
		return 0
	}
	return (rates[(len(rates)-1)/2] + rates[len(rates)/2]) / 2
}

// write prints the table: a row for each type, a column for each output and instruction set.
func write(w io.Writer, r results) error {
	outs, isas := []string{"F32", "F16", "BF16"}, []string{"generic", "avx2", "avx512"}
	var types []string
	for _, name := range r.order {
		typ, ok := strings.CutPrefix(name, "BenchmarkDequant/type=")
		typ, _, _ = strings.Cut(typ, "/")
		if ok && !slices.Contains(types, typ) {
			types = append(types, typ)
		}
	}
	memcpy := r.median("BenchmarkMemcpy")
	var b strings.Builder
	fmt.Fprintf(&b, "memcpy: %.1f GB/s\n\n| type |", memcpy)
	for _, out := range outs {
		for _, isa := range isas {
			fmt.Fprintf(&b, " %s %s |", strings.ToLower(out), isa)
		}
	}
	fmt.Fprintf(&b, " avx2 / memcpy | avx512 / memcpy |\n|---|%s\n", strings.Repeat("--:|", len(outs)*len(isas)+2))
	for _, typ := range types {
		rate := func(out, isa string) float64 {
			return r.median(fmt.Sprintf("BenchmarkDequant/type=%s/out=%s/isa=%s", typ, out, isa))
		}
		fmt.Fprintf(&b, "| %s |", typ)
		for _, out := range outs {
			for _, isa := range isas {
				fmt.Fprintf(&b, " %.1f |", rate(out, isa))
			}
		}
		fmt.Fprintf(&b, " %.2f | %.2f |\n", rate("F32", "avx2")/memcpy, rate("F32", "avx512")/memcpy)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
