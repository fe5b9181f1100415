package plan

import (
	"encoding"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// names is an enumerated type's pointer.
type names[E any] interface {
	*E
	encoding.TextUnmarshaler
}

// roundTrip wants every value of an enumerated type to be read from what it is written as, in any case, and a number
// without a name to be refused.
func roundTrip[E interface {
	~uint8
	fmt.Stringer
	encoding.TextMarshaler
}, P names[E]](t *testing.T, kind string, want ...string) {
	t.Helper()
	for i, name := range want {
		text, err := E(i).MarshalText()
		if err != nil || string(text) != name || E(i).String() != name {
			t.Errorf("%s %d: %q, %v, want %q", kind, i, text, err, name)
		}
		for _, s := range []string{name, strings.ToUpper(name)} {
			got := E(len(want) - 1 - i)
			if err := P(&got).UnmarshalText([]byte(s)); err != nil || got != E(i) {
				t.Errorf("%s %q: %v, %v", kind, s, got, err)
			}
		}
	}
	beyond := E(len(want))
	if _, err := beyond.MarshalText(); !errors.Is(err, ErrBadOption) {
		t.Errorf("%s %d is written: %v", kind, len(want), err)
	}
	if s := beyond.String(); s != fmt.Sprintf("%s %d", kind, len(want)) {
		t.Errorf("%s %d is %q", kind, len(want), s)
	}
	for _, s := range []string{"", "f12", beyond.String(), " " + want[0]} {
		var got E
		err := P(&got).UnmarshalText([]byte(s))
		if err == nil || !strings.Contains(err.Error(), "use "+strings.Join(want, ", ")) {
			t.Errorf("%s %q: %v, want what there is", kind, s, err)
		}
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	roundTrip[Policy](t, "policy", "f16", "f32", "bf16", "raw")
	roundTrip[SplitBy](t, "split", "layer", "none")
	roundTrip[ShardBy](t, "shard", "none", "layer", "tensor")
	roundTrip[Division](t, "division", "replicate", "rows", "columns", "experts")
	if len(Policies()) != len(policyNames) {
		t.Errorf("there are the policies %v", Policies())
	}
}

func TestRuleTexts(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"a=b=bf16", "x=raw", `^blk\.[0-3]\.=f32`, "(?:)=f16"} {
		var r Rule
		if err := r.UnmarshalText([]byte(text)); err != nil || r.String() != text {
			t.Errorf("%q: %v, %v", text, r, err)
		}
		if again, err := r.MarshalText(); err != nil || string(again) != text {
			t.Errorf("%q: %q, %v", text, again, err)
		}
	}
	for _, text := range []string{"a=b=rows", `attn_[kv]\.=replicate`, "x=experts", "x=columns", "(?:)=rows"} {
		var r ShardRule
		if err := r.UnmarshalText([]byte(text)); err != nil || r.String() != text {
			t.Errorf("%q: %v, %v", text, r, err)
		}
		if again, err := r.MarshalText(); err != nil || string(again) != text {
			t.Errorf("%q: %q, %v", text, again, err)
		}
	}
	for text, want := range map[string]string{
		"": "REGEXP=", "f16": "REGEXP=", "rows": "REGEXP=", "=f16": "REGEXP=", "=rows": "REGEXP=",
		"x=": "unknown", "x=q4_k": "unknown", "x=row": "unknown", "(=f16": "missing closing )", "(=rows": "missing closing )",
	} {
		var r Rule
		var s ShardRule
		policyErr, shardErr := r.UnmarshalText([]byte(text)), s.UnmarshalText([]byte(text))
		if policyErr == nil || shardErr == nil ||
			!strings.Contains(policyErr.Error(), want) && !strings.Contains(shardErr.Error(), want) {
			t.Errorf("%q: %v and %v, want %q", text, policyErr, shardErr, want)
		}
	}
	if (Rule{}).String() != "<nil>=f16" || (ShardRule{}).String() != "<nil>=replicate" {
		t.Errorf("empty rules are %v and %v", Rule{}, ShardRule{})
	}
	if _, err := (Rule{}).MarshalText(); !errors.Is(err, ErrBadOption) {
		t.Errorf("an empty rule is written: %v", err)
	}
	if _, err := (ShardRule{}).MarshalText(); !errors.Is(err, ErrBadOption) {
		t.Errorf("an empty rule is written: %v", err)
	}
	// An expression that was made without a text gets one that can be read again.
	var again Rule
	text, err := Rule{regexp.MustCompile(""), F32}.MarshalText()
	err = errors.Join(err, again.UnmarshalText(text))
	if err != nil || !again.Name.MatchString("x") || again.Policy != F32 {
		t.Errorf("%q: %v, %v", text, again, err)
	}
}
