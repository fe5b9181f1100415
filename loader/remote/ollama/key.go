package ollama

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"errors"
)

// What the private keys of OpenSSH begin with, and the kind of key that ollama makes.
const (
	keyMagic = "openssh-key-v1\x00"
	keyKind  = "ssh-ed25519"
)

var errKey = errors.New("not a private key of OpenSSH as ollama makes it: ed25519, without a passphrase")

// parseKey reads a private key in OpenSSH's format (PROTOCOL.key). The error does not show any of it.
func parseKey(text []byte) (ed25519.PrivateKey, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "OPENSSH PRIVATE KEY" {
		return nil, errKey
	}
	outer, ok := bytes.CutPrefix(block.Bytes, []byte(keyMagic))
	cipher, kdf := cutString(&outer), cutString(&outer)
	cutString(&outer) // options of the key derivation
	if !ok || string(cipher) != "none" || string(kdf) != "none" || cutNumber(&outer) != 1 {
		return nil, errKey
	}
	cutString(&outer) // the public key
	inner := cutString(&outer)
	check := cutNumber(&inner)
	if check != cutNumber(&inner) || string(cutString(&inner)) != keyKind {
		return nil, errKey
	}
	public, private := cutString(&inner), cutString(&inner)
	const size, all = ed25519.PublicKeySize, ed25519.PrivateKeySize
	if len(public) != size || len(private) != all || !bytes.HasSuffix(private, public) {
		return nil, errKey
	}
	return ed25519.PrivateKey(bytes.Clone(private)), nil
}

// cutNumber takes a number from the beginning of b; 0 if there is none.
func cutNumber(b *[]byte) uint32 {
	if len(*b) < 4 {
		*b = nil
		return 0
	}
	n := binary.BigEndian.Uint32(*b)
	*b = (*b)[4:]
	return n
}

// cutString takes a string with its length before it from the beginning of b; nil if there is none.
func cutString(b *[]byte) []byte {
	n := cutNumber(b)
	if uint64(n) > uint64(len(*b)) {
		*b = nil
		return nil
	}
	s := (*b)[:n]
	*b = (*b)[n:]
	return s
}

// publicText is the public key as OpenSSH writes it, without its kind and comment.
func publicText(key ed25519.PrivateKey) string {
	var b []byte
	for _, s := range [][]byte{[]byte(keyKind), key.Public().(ed25519.PublicKey)} {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
	}
	return base64.StdEncoding.EncodeToString(b)
}
