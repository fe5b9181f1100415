package hold

import (
	"fmt"
	"regexp"

	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// specOf is what an add request asks for: the Holder's Spec with the request's exceptions.
func (h *Holder) specOf(r *request) (s plan.Spec, err error) {
	s = h.options.Spec
	if r.Policy != "" {
		if err = s.Policy.UnmarshalText([]byte(r.Policy)); err != nil {
			return s, fmt.Errorf("%w: %w", loader.ErrBadOption, err)
		}
	}
	if len(r.Rules) > 0 {
		s.Rules = nil
	}
	for _, text := range r.Rules {
		var rule plan.Rule
		if err := rule.UnmarshalText([]byte(text)); err != nil {
			return s, fmt.Errorf("%w: %w", loader.ErrBadOption, err)
		}
		s.Rules = append(s.Rules, rule)
	}
	if r.Tensors != "" {
		if s.Tensors, err = regexp.Compile(r.Tensors); err != nil {
			return s, fmt.Errorf("%w: %w", loader.ErrBadOption, err)
		}
	}
	return s, nil
}
