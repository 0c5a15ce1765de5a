//go:build race

package e2e

const raceEnabled = true

// smallRing is the ring of tests that overrun it, in revisions; these write a multiple of it.
const smallRing = 512
