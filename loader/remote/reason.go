package remote

import (
	"encoding/json"
	"encoding/xml"
	"io"
	"net/http"
	"regexp"
	"time"
)

// maxReason is how many bytes of a refusal are read for its reason.
const maxReason = 16 << 10

// reasonName matches what programs read: a word.
var reasonName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_.-]{0,63}$`)

// reason returns what a refusal says of itself, as far as it is a word: the code of a store's or a registry's error, or
// a header of Hugging Face's. It does not wait longer than stall for it.
func reason(resp *http.Response, stall time.Duration) string {
	if code := resp.Header.Get("X-Error-Code"); reasonName.MatchString(code) {
		return code
	}
	if resp.Body == nil {
		return ""
	}
	watch := time.AfterFunc(stall, func() { _ = resp.Body.Close() })
	defer watch.Stop()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxReason))
	if err != nil {
		return ""
	}
	var store struct {
		XMLName xml.Name `xml:"Error"`
		Code    string
	}
	var registry struct {
		Errors []struct {
			Code string `json:"code"`
		} `json:"errors"`
	}
	switch {
	case xml.Unmarshal(text, &store) == nil && reasonName.MatchString(store.Code):
		return store.Code
	case json.Unmarshal(text, &registry) == nil && len(registry.Errors) > 0 &&
		reasonName.MatchString(registry.Errors[0].Code):
		return registry.Errors[0].Code
	}
	return ""
}
