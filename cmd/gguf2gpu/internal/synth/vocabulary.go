package synth

import (
	"fmt"
	"strings"
)

// Token types of tokenizer.ggml.token_type.
const (
	tokenNormal  = 1
	tokenUnknown = 2
	tokenControl = 3
	tokenByte    = 6
)

// vocabulary makes up n tokens of a SentencePiece tokenizer, with their scores and types: three special ones, the 256
// bytes, and words.
func vocabulary(n int) (tokens []string, scores []float32, types []int32) {
	add := func(token string, typ int32) {
		tokens = append(tokens, token)
		scores = append(scores, -float32(len(scores)))
		types = append(types, typ)
	}
	add("<unk>", tokenUnknown)
	add("<s>", tokenControl)
	add("</s>", tokenControl)
	for b := range 256 {
		add(fmt.Sprintf("<0x%02X>", b), tokenByte)
	}
	for i := 0; len(tokens) < n; i++ {
		add(word(i), tokenNormal)
	}
	return tokens, scores, types
}

// word returns the i-th made-up word: the digits of i as syllables. Every other word starts with the mark of a space.
func word(i int) string {
	const consonants, vowels = "bdfgklmnprstvz", "aeiou"
	var b strings.Builder
	if i%2 == 0 {
		b.WriteString("\u2581")
	}
	for i /= 2; ; i = i/(len(consonants)*len(vowels)) - 1 {
		digit := i % (len(consonants) * len(vowels))
		b.WriteByte(consonants[digit/len(vowels)])
		b.WriteByte(vowels[digit%len(vowels)])
		if i < len(consonants)*len(vowels) {
			return b.String()
		}
	}
}
