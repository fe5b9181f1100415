package oci

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"regexp"

	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// maxPages bounds the pages of a list of tags.
const maxPages = 100

// tags returns the tags of a repository.
func (r *Registry) tags(ctx context.Context, n Name) ([]string, error) {
	base, err := r.base(ctx, n)
	if err != nil {
		return nil, err
	}
	var tags []string
	page := base + "/tags/list"
	for range maxPages {
		text, header, err := r.client.Get(ctx, remote.Document{URL: page, Accept: "application/json", Send: r.sender(n)})
		if err != nil {
			return nil, r.explain(n, err)
		}
		var reply struct{ Tags []string }
		if err := json.Unmarshal(text, &reply); err != nil {
			return nil, fmt.Errorf("%s: %w: the list of tags cannot be read: %w", n, remote.ErrReply, err)
		}
		for _, tag := range reply.Tags {
			named := n
			named.Reference, named.File = tag, ""
			if again, err := Parse(named.String()); err == nil && again.Reference == tag {
				tags = append(tags, tag)
			}
		}
		if page, err = nextPage(page, header); err != nil {
			return nil, fmt.Errorf("%s: %w", n, err)
		}
		if page == "" {
			return tags, nil
		}
	}
	return nil, fmt.Errorf("%s: %w: the list of tags has more than %d pages", n, remote.ErrReply, maxPages)
}

// nextLink matches the header that names the next page of a list (RFC 8288).
var nextLink = regexp.MustCompile(`^\s*<([^>]*)>\s*;\s*rel="?next"?`)

// nextPage returns the address of the page behind the one at an address; "" if that was the last. It has to be of the
// same list, on the same host: it is asked for with credentials.
func nextPage(page string, header http.Header) (string, error) {
	link := nextLink.FindStringSubmatch(header.Get("Link"))
	if link == nil {
		return "", nil
	}
	this, err := url.Parse(page)
	if err != nil {
		return "", err
	}
	next, err := this.Parse(link[1])
	if err != nil || next.Scheme != this.Scheme || next.Host != this.Host || next.User != nil || next.Path != this.Path {
		return "", fmt.Errorf("%w: the list of tags goes on at %.300q, which is another place", remote.ErrReply, link[1])
	}
	return next.String(), nil
}
