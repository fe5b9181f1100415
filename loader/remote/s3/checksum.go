package s3

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"

	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// checksums are those that stores keep of an object, the best first: the header, the name of the algorithm in a digest,
// and the bytes that it has.
var checksums = []struct {
	header, algorithm string
	bytes             int
}{{"X-Amz-Checksum-Sha256", "sha256", 32}, {"X-Amz-Checksum-Crc64nvme", "crc64nvme", 8}}

// checksum asks the store for the checksum of an object, and returns it as a digest; "" if there is none of the whole
// object. What came in several parts has a SHA-256 of their SHA-256s, which is of no use here. Errors are left to the
// requests that follow.
func (s *Store) checksum(ctx context.Context, o remote.Object) string {
	send := o.Send
	if send == nil {
		send = s.client.RoundTrip
	}
	_, header, err := s.client.Get(ctx, remote.Document{
		URL: o.URL, Head: true, Send: func(req *http.Request) (*http.Response, error) {
			req.Header.Set("X-Amz-Checksum-Mode", "ENABLED")
			return send(req)
		},
	})
	if err != nil || header.Get("X-Amz-Checksum-Type") == "COMPOSITE" {
		return ""
	}
	for _, c := range checksums {
		sum, err := base64.StdEncoding.DecodeString(header.Get(c.header))
		if err == nil && len(sum) == c.bytes { // of parts there is a hyphen and their number behind it
			return fmt.Sprintf("%s:%x", c.algorithm, sum)
		}
	}
	return ""
}
