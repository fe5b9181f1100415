package s3

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"hash/crc64"
	"net/http"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// TestChecksums: the checksum that the store keeps of the whole object is compared if that is asked for. That of parts,
// and what is none, is left alone.
func TestChecksums(t *testing.T) {
	t.Parallel()
	model := fake.Model(4, 3<<20)
	text := base64.StdEncoding.EncodeToString
	sum := sha256.Sum256(model)
	crc := crc64.New(crc64.MakeTable(0x9a6c9329ac4bc9b5))
	crc.Write([]byte("123456789"))
	if crc.Sum64() != 0xae8b14860a799888 { // the check value of CRC-64/NVME
		t.Fatalf("%x", crc.Sum64())
	}
	crc.Reset()
	crc.Write(model)
	for _, x := range []struct {
		name    string
		header  map[string]string
		digests remote.Digests
		checked bool
		err     error
	}{
		{"SHA-256", map[string]string{"Sha256": text(sum[:])}, remote.DigestsAlways, true, nil},
		{"a wrong one", map[string]string{"Sha256": text(sum[:31]) + "AA=="}, remote.DigestsAlways, false, nil},
		{"another one", map[string]string{"Sha256": text(make([]byte, 32)), "Type": "FULL_OBJECT"}, remote.DigestsAlways, false, remote.ErrDigest},
		{"CRC", map[string]string{"Crc64nvme": text(crc.Sum(nil)), "Type": "FULL_OBJECT"}, remote.DigestsAlways, true, nil},
		{"another CRC", map[string]string{"Crc64nvme": text(make([]byte, 8))}, remote.DigestsAlways, false, remote.ErrDigest},
		{"of parts", map[string]string{"Sha256": text(sum[:]) + "-3"}, remote.DigestsAlways, false, nil},
		{"of parts, said", map[string]string{"Sha256": text(sum[:]), "Type": "COMPOSITE"}, remote.DigestsAlways, false, nil},
		{"none", nil, remote.DigestsAlways, false, nil},
		{"not asked for", map[string]string{"Sha256": text(make([]byte, 32))}, remote.DigestsAuto, false, nil},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			server := newStore(t, alice)
			heads := 0
			server.Fault(func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != http.MethodHead || server.check(r) != "" || r.Header.Get("X-Amz-Checksum-Mode") != "ENABLED" {
					return false
				}
				heads++
				for k, v := range x.header {
					w.Header().Set("X-Amz-Checksum-"+k, v)
				}
				return true
			})
			s := connect(t, Options{Endpoint: server.URL, Region: "eu-west-1", Credentials: alice.provider()},
				remote.Options{Digests: x.digests})
			f, err := open(t, s, "s3://models/a/m-Q4_K_M.gguf")
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Check(t.Context(), true); !errors.Is(err, x.err) {
				t.Errorf("%v, not %v", err, x.err)
			}
			if id, _ := remote.Identify(f.Parts()[0]); id.Checked != x.checked {
				t.Errorf("%+v", id)
			}
			if (heads > 0) != (x.digests == remote.DigestsAlways) {
				t.Errorf("%d times asked for it", heads)
			}
		})
	}
}
