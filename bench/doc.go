// Package bench is the place of Spindle's load tester. It is not built yet: there is nothing here to run,
// and no number in this repository's documents comes from it.
package bench
