// Package revclock is the logical clock: the log of ticks on the coordinator that hands out ranges of
// revisions, its fold that every proxy computes alike, and `now`.
//
// Log is the fold, a plain state machine. Clock keeps a Log up to date with the coordinator through a
// codec.Transport: it sends ticks, reads now, watches, writes snapshots. Both belong to the goroutine
// that owns the core, and use no timers or goroutines of their own: time is passed in, and Clock.Deadline
// says when Clock.Tick wants to be called next.
package revclock
