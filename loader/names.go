package loader

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// nameOf is the name of a choice, what being what is chosen, for a number that has no name.
func nameOf[C ~uint8](c C, names []string, what string) string {
	if int(c) >= len(names) {
		return fmt.Sprintf("%s %d", what, uint8(c))
	}
	return names[c]
}

// parseName is the choice of that name, what being what is chosen.
func parseName[C ~uint8](s string, names []string, what string) (C, error) {
	if i := slices.Index(names, s); i >= 0 {
		return C(i), nil
	}
	return 0, fmt.Errorf("unknown %s %q: use %s", what, s, strings.Join(names, ", "))
}

// parseRule reads the form 'REGEXP=VALUE', where the last '=' divides and value reads what is behind it; form names it in errors.
func parseRule[V any](s, form string, value func(string) (V, error)) (*regexp.Regexp, V, error) {
	var none V
	i := strings.LastIndexByte(s, '=')
	if i <= 0 {
		return nil, none, fmt.Errorf("rule %q is not of the form REGEXP=%s", s, form)
	}
	v, err := value(s[i+1:])
	if err != nil {
		return nil, none, fmt.Errorf("rule %q: %w", s, err)
	}
	re, err := regexp.Compile(s[:i])
	if err != nil {
		return nil, none, fmt.Errorf("rule %q: %w", s, err)
	}
	return re, v, nil
}
