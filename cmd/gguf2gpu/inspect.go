package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// maxArray is the length from which a metadata array is told by its type and length only: vocabularies have 10^5 entries.
const maxArray = 16

// maxText is the length from which the text report cuts a string value: chat templates have thousands of characters.
const maxText = 72

func newInspectCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "inspect MODEL [flags]",
		Short: "Show a model's header, metadata, tensors and sizes per dtype",
		Long: `Show a model's header, metadata, tensors, and how many bytes its tensors need on a device in each dtype.

MODEL is a GGUF file, or any part of a split model. Of one on a server, https://HOST/PATH, the header alone is fetched. Metadata arrays with more than 16 entries are shown by type and
length; --full shows them all. Integer tensors keep their bytes in every dtype.`,
		Args: cobra.ExactArgs(1),
	}
	asJSON := jsonFlag(cmd)
	far := addRemoteFlags(cmd.Flags())
	full := cmd.Flags().Bool("full", false, "show long metadata arrays and strings in full")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		m, client, err := far.open(cmd.Context(), args[0], nil)
		if err != nil {
			return err
		}
		if client != nil {
			defer client.Close()
		}
		defer m.Close()
		r := inspect(remote.Redact(args[0]), m, *full)
		if *asJSON {
			return writeJSON(cmd.OutOrStdout(), r)
		}
		return r.print(cmd.OutOrStdout(), m.Metadata(), *full)
	}
	return cmd
}

// modelReport is the JSON of inspect. Sizes are in bytes.
type modelReport struct {
	Model        string               `json:"model"`
	Architecture string               `json:"architecture"`
	FileBytes    uint64               `json:"file_bytes"`
	Elements     uint64               `json:"elements"` // of all tensors: the number of parameters
	Parts        []partReport         `json:"parts"`
	Metadata     orderedObject        `json:"metadata"`
	Types        map[string]typeTotal `json:"types"`
	DeviceBytes  map[string]uint64    `json:"device_bytes"` // by dtype: what the tensors take on a device
	Tensors      []tensorReport       `json:"tensors"`
}

type partReport struct {
	Path       string `json:"path"`
	Version    uint32 `json:"version"`
	Bytes      int64  `json:"bytes"`
	Alignment  uint32 `json:"alignment"`
	DataOffset int64  `json:"data_offset"`
	Tensors    int    `json:"tensors"`
}

type typeTotal struct {
	Tensors  int    `json:"tensors"`
	Elements uint64 `json:"elements"`
	Bytes    uint64 `json:"bytes"`
}

type tensorReport struct {
	Name   string   `json:"name"`
	Type   string   `json:"type"`
	Shape  []uint64 `json:"shape"` // ggml's order: the first dimension is the contiguous one
	Part   int      `json:"part"`
	Offset int64    `json:"offset"` // in the part's file
	Bytes  int64    `json:"bytes"`
}

// inspect gathers the report.
func inspect(path string, m *gguf.Model, full bool) *modelReport {
	r := &modelReport{
		Model: path, Architecture: m.Architecture(), FileBytes: m.Size(),
		Types: map[string]typeTotal{}, DeviceBytes: map[string]uint64{},
	}
	for _, p := range m.Parts() {
		r.Parts = append(r.Parts, partReport{
			Path: p.Path, Version: p.Version, Bytes: p.Size, Alignment: p.Alignment, DataOffset: p.DataOffset,
		})
	}
	for key, v := range m.Metadata().All() {
		r.Metadata = append(r.Metadata, member{key, jsonValue(v, full)})
	}
	for _, t := range m.Tensors() {
		total := r.Types[t.Type.String()]
		total.Tensors++
		total.Elements += t.Elems()
		total.Bytes += uint64(t.Size)
		r.Types[t.Type.String()] = total
		r.Elements += t.Elems()
		r.Parts[t.Part].Tensors++
		for _, d := range loader.DTypes() {
			n, _ := d.Target(t.Type).Bytes(t.Elems()) // cannot overflow: the file holds the elements
			r.DeviceBytes[d.String()] += n
		}
		r.Tensors = append(r.Tensors, tensorReport{t.Name, t.Type.String(), t.Shape, t.Part, t.Offset, t.Size})
	}
	return r
}

// orderedObject is a JSON object whose members keep the file's order.
type orderedObject []member

type member struct {
	key   string
	value any
}

// MarshalJSON writes the members in order.
func (o orderedObject) MarshalJSON() ([]byte, error) {
	b := []byte{'{'}
	for i, m := range o {
		key, err := json.Marshal(m.key)
		if err != nil {
			return nil, err
		}
		value, err := json.Marshal(m.value)
		if err != nil {
			return nil, fmt.Errorf("metadata key %q: %w", m.key, err)
		}
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(append(b, key...), ':'), value...)
	}
	return append(b, '}'), nil
}

// arrayReport stands for a long metadata array.
type arrayReport struct {
	Type   string `json:"type"` // of the elements
	Length int    `json:"length"`
}

// jsonValue returns what encoding/json makes the value of. Numbers that JSON cannot express become strings.
func jsonValue(v gguf.Value, full bool) any {
	if t, ok := v.Text(); ok {
		return t
	}
	if b, ok := v.Bool(); ok {
		return b
	}
	if f, ok := v.Float(); ok {
		return jsonFloat(f, v.Kind())
	}
	elem, ok := v.ElemKind()
	if !ok {
		return json.Number(v.String()) // an integer
	}
	if v.Len() > maxArray && !full {
		return arrayReport{elem.String(), v.Len()}
	}
	list := make([]any, 0, v.Len())
	for _, t := range v.Strings() {
		list = append(list, t)
	}
	for _, b := range v.Bools() {
		list = append(list, b)
	}
	for _, f := range v.Floats() {
		list = append(list, jsonFloat(f, elem))
	}
	for _, a := range v.Arrays() {
		list = append(list, jsonValue(a, full))
	}
	for _, u := range v.Uints() {
		list = append(list, u)
	}
	if len(list) == 0 { // Ints takes small unsigned ones, too
		for _, i := range v.Ints() {
			list = append(list, i)
		}
	}
	return list
}

// jsonFloat prints a float32 with the digits of a float32.
func jsonFloat(f float64, kind gguf.Kind) any {
	switch {
	case math.IsNaN(f) || math.IsInf(f, 0):
		return fmt.Sprint(f)
	case kind == gguf.Float32:
		return float32(f)
	}
	return f
}

// print writes the report for people. Names and texts from the file are quoted where they could drive a terminal.
func (r *modelReport) print(w io.Writer, metadata *gguf.Metadata, full bool) error {
	out := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(out, "model\t%s\n", r.Model)
	fmt.Fprintf(out, "architecture\t%s\n", printable(r.Architecture))
	fmt.Fprintf(out, "parameters\t%s\n", humanize.SIWithDigits(float64(r.Elements), 2, ""))
	fmt.Fprintf(out, "files\t%s\n", sizeText(r.FileBytes))
	for _, p := range r.Parts {
		fmt.Fprintf(out, "  %s\tGGUF version %d, %s, alignment %d, data at %#x, %d tensors\n", p.Path, p.Version,
			humanize.IBytes(uint64(p.Bytes)), p.Alignment, p.DataOffset, p.Tensors)
	}
	fmt.Fprintln(out, "\nbytes on a device, by dtype")
	for _, d := range loader.DTypes() {
		fmt.Fprintf(out, "  %v\t%s\n", d, sizeText(r.DeviceBytes[d.String()]))
	}
	fmt.Fprintln(out, "\ntypes in the file")
	for _, name := range slices.Sorted(maps.Keys(r.Types)) {
		t := r.Types[name]
		fmt.Fprintf(out, "  %s\t%d tensors\t%s\n", name, t.Tensors, sizeText(t.Bytes))
	}
	fmt.Fprintf(out, "\nmetadata, %d keys\n", metadata.Len())
	for key, v := range metadata.All() {
		fmt.Fprintf(out, "  %s\t%s\n", printable(key), textValue(v, full))
	}
	fmt.Fprintf(out, "\ntensors, %d\n", len(r.Tensors))
	for _, t := range r.Tensors {
		shape := strings.Trim(strings.ReplaceAll(fmt.Sprint(t.Shape), " ", " x "), "[]")
		fmt.Fprintf(out, "  %s\t%s\t%s\tpart %d at %#x\t%s\n", printable(t.Name), t.Type, shape, t.Part, t.Offset,
			humanize.IBytes(uint64(t.Bytes)))
	}
	return out.Flush()
}

func sizeText(n uint64) string { return fmt.Sprintf("%d bytes (%s)", n, humanize.IBytes(n)) }

// textValue is a metadata value on one line, cut unless all of it is wanted.
func textValue(v gguf.Value, full bool) string {
	if _, ok := v.ElemKind(); ok && (full || v.Len() <= maxArray) {
		if text, err := json.Marshal(jsonValue(v, true)); err == nil {
			return string(text)
		}
	}
	text := v.String()
	if len(text) > maxText && !full {
		return fmt.Sprintf("%s… (%d bytes)", strings.ToValidUTF8(text[:maxText], ""), len(text))
	}
	return text
}

// printable quotes what is not plain text.
func printable(s string) string {
	if quoted := strconv.Quote(s); quoted[1:len(quoted)-1] != s {
		return quoted
	}
	return s
}
