//go:build !linux

package main

import (
	"context"
	"errors"
	"testing"
)

// canHold: attaching is tested where processes can share the software device's memory.
const canHold = false

// pairsSimulator returns nothing: the simulator is for Linux.
func pairsSimulator(testing.TB) string { return "" }

func leftovers(string, map[string]int) error { return nil }

func (r *pairsRig) holdAndAttach(context.Context, combination, string, int) error {
	return errors.New("hold is not tested on this system")
}

func (r *pairsRig) addAndAttach(context.Context, combination, string, int) (outcome, error) {
	return outcome{}, errors.New("hold is not tested on this system")
}
