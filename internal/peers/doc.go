// Package peers compares this module with other programs that read the same format. It has tests only.
package peers
