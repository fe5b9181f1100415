package hold

import (
	"fmt"

	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// nameHF puts into m what its tensors are in transformers: names, or err that says why nobody knows.
func (m *manifest) nameHF(names map[string][]plan.HFTensor, err error) {
	m.HF = new(manifestHF)
	if err != nil {
		m.HF.Unknown = err.Error()
		return
	}
	for i := range m.Groups {
		for j := range m.Groups[i].Tensors {
			t := &m.Groups[i].Tensors[j]
			t.HF = names[t.Name]
		}
	}
}

// namesHF is what the Holder says that the tensors are in transformers. Whoever uses it checks it against the tensors.
func (m *manifest) namesHF() (map[string][]plan.HFTensor, error) {
	switch {
	case m.HF == nil:
		return nil, fmt.Errorf("hold: %w: the holder is of a version that does not say them", plan.ErrUnknownNames)
	case m.HF.Unknown != "":
		return nil, fmt.Errorf("hold: %w: %.300s", plan.ErrUnknownNames, m.HF.Unknown)
	}
	names := make(map[string][]plan.HFTensor)
	for i := range m.Groups {
		for j := range m.Groups[i].Tensors {
			t := &m.Groups[i].Tensors[j]
			names[t.Name] = t.HF
		}
	}
	return names, nil
}
