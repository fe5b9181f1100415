package plan

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// ErrBadOption is matched by the errors of New that refuse a field of Spec.
var ErrBadOption = errors.New("bad option")

// nameOf returns the name of an enumerated value, and a text with its number if it has no name. kind is what is named.
func nameOf[E ~uint8](e E, names []string, kind string) string {
	if int(e) >= len(names) {
		return fmt.Sprintf("%s %d", kind, uint8(e))
	}
	return names[e]
}

// parseName finds the value of that name; upper and lower case are the same. The error lists all names.
func parseName[E ~uint8](text []byte, names []string, kind string) (E, error) {
	name := strings.ToLower(string(text))
	if i := slices.Index(names, name); i >= 0 {
		return E(i), nil
	}
	return 0, fmt.Errorf("unknown %s %q: use %s", kind, text, strings.Join(names, ", "))
}

// checkName refuses a number that is none of the enumerated values.
func checkName[E ~uint8](e E, names []string, kind string) error {
	if int(e) < len(names) {
		return nil
	}
	return fmt.Errorf("%w: there is no %s number %d: use %s", ErrBadOption, kind, uint8(e), strings.Join(names, ", "))
}

// ruleText returns the form that parseRule reads. An expression that is empty gets parentheses, as the form needs one.
func ruleText(name *regexp.Regexp, value any) string {
	if name != nil && name.String() == "" {
		return fmt.Sprintf("(?:)=%v", value)
	}
	return fmt.Sprintf("%v=%v", name, value)
}

// parseRule reads the form 'REGEXP=VALUE'. The last '=' divides, so that the expression may contain one. form is what
// the error calls VALUE.
func parseRule(text []byte, form string, value func([]byte) error) (*regexp.Regexp, error) {
	s := string(text)
	i := strings.LastIndexByte(s, '=')
	if i <= 0 {
		return nil, fmt.Errorf("rule %q is not of the form REGEXP=%s", s, form)
	}
	if err := value([]byte(s[i+1:])); err != nil {
		return nil, fmt.Errorf("rule %q: %w", s, err)
	}
	re, err := regexp.Compile(s[:i])
	if err != nil {
		return nil, fmt.Errorf("rule %q: %w", s, err)
	}
	return re, nil
}
