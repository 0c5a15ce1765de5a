//go:build !race

package e2e

const raceEnabled = false

const smallRing = 1024
