package main

import (
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// otherWords are words that other programs use for what a command of this one does.
var otherWords = map[string]string{
	"info": "inspect", "show": "inspect", "dump": "inspect", "view": "inspect", "metadata": "inspect",
	"benchmark": "bench", "serve": "hold", "server": "hold", "daemon": "hold", "list": "hold --list", "ps": "hold --list",
	"gpus": "devices", "device": "devices", "doctor": "devices", "generate": "synth", "create": "synth", "upload": "load",
	"check": "verify", "run": "load",
}

// otherValues are words that other programs use for values of flags of this one.
var otherValues = map[string]map[string]string{
	"device": {"gpu": "hip", "cuda": "hip", "rocm": "hip", "amd": "hip", "software": "soft", "cpu": "soft", "none": "soft"},
	"dtype": {
		"float16": "f16", "half": "f16", "fp16": "f16", "float32": "f32", "float": "f32", "fp32": "f32", "single": "f32",
		"bfloat16": "bf16", "brain": "bf16", "none": "raw", "native": "raw", "original": "raw",
	},
	"split":    {"row": "layer", "layers": "layer", "copy": "none", "replicate": "none"},
	"shard":    {"tp": "tensor", "row": "tensor", "pp": "layer", "pipeline": "layer"},
	"progress": {"off": "none", "quiet": "none", "no": "none", "on": "auto", "yes": "auto"},
	"dequant":  {"hip": "gpu", "host": "cpu", "device": "gpu"},
	"prove":    {"yes": "on", "true": "on", "no": "off", "false": "off", "always": "on", "never": "off"},
	"digest":   {"on": "always", "off": "never", "yes": "always", "no": "never"},
}

// meantValue returns the end of an error about a value of a flag: the one that was meant, if that can be guessed.
func meantValue(cmd *cobra.Command, flag, value string) string {
	words := choices(cmd, flag)
	if other := otherValues[flag][strings.ToLower(value)]; slices.Contains(words, other) {
		return " (did you mean " + other + "?)"
	}
	if strings.Contains(value, ":") { // soft:0 is no misspelled soft:2
		return ""
	}
	return didYouMean(value, words)
}

// didYouMean returns the end of an error about a word that is not among the candidates: the one that was meant, if one
// is similar, else "".
func didYouMean(word string, candidates []string) string {
	if s := nearest(word, candidates); s != "" {
		return " (did you mean " + s + "?)"
	}
	return ""
}

// nearest returns the candidate that is most similar to word, "" if none is similar enough to have been meant.
func nearest(word string, candidates []string) string {
	best, least, several := "", max(2, len(word)/3)+1, false
	if len(word) <= 3 {
		least = 2
	}
	for _, c := range candidates {
		d := distance(strings.ToLower(word), strings.ToLower(c))
		several = several && d >= least || best != "" && d == least
		if d < least && d < len(c) {
			best, least = c, d
		}
	}
	switch {
	case several && len(word) <= 3: // two names of types, such as f16 and f32 for f12
		return ""
	case best != "":
		return best
	}
	for _, c := range candidates { // a beginning of it, or the other way round
		a, b := strings.ToLower(strings.Trim(word, "-")), strings.ToLower(strings.Trim(c, "-"))
		if len(a) >= 3 && len(b) >= 3 && (strings.HasPrefix(b, a) || strings.HasPrefix(a, b)) {
			return c
		}
	}
	return ""
}

// distance returns how many letters have to be put in, left out, changed or swapped with the next to make b of a.
func distance(a, b string) int {
	const limit = 64 // of what a person types; longer words are not alike
	if len(a) > limit || len(b) > limit {
		return limit
	}
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			change := 1
			if a[i-1] == b[j-1] {
				change = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
