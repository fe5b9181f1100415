//go:build race

package main

// raceDetector is whether the race detector is in the program: it multiplies memory and time.
const raceDetector = true
