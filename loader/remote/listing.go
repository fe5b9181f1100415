package remote

import "regexp"

// Listing is what a name offers that is not one model, such as a repository or a directory.
type Listing struct {
	Name     string  `json:"name"`
	Revision string  `json:"revision,omitempty"` // that the entries are of, such as a commit
	Entries  []Entry `json:"entries"`
}

// Entry is a model of a Listing.
type Entry struct {
	Name    string `json:"name"`              // what the model can be opened by
	File    string `json:"file,omitempty"`    // its file, or the first one of a split
	Quant   string `json:"quant,omitempty"`   // its quantization, as its name says
	Files   int    `json:"files,omitempty"`   // how many it consists of; 0: not known
	Bytes   int64  `json:"bytes,omitempty"`   // of all files; 0: not known
	Default bool   `json:"default,omitempty"` // what the name of the listing opens
	Local   bool   `json:"local,omitempty"`   // it is on this machine already
}

// quant matches the quantizations of llama.cpp, and what others call theirs in the same way.
var quant = regexp.MustCompile(`(?i)(?:^|[._/-])((?:UD-)?(?:I?Q[0-9](?:_[0-9A-Z]+)*|TQ[0-9]_[0-9]|BF16|FP?16|FP?32|FP8|MXFP4(?:_MOE)?|NVFP4))(?:[._/-]|$)`)

// Quant returns the quantization that the name of a file says, such as "Q4_K_M", or "".
func Quant(name string) string {
	all := quant.FindAllStringSubmatch(name, -1)
	if len(all) == 0 {
		return ""
	}
	return all[len(all)-1][1]
}
