//go:build !linux

package compare

import "errors"

var errLinux = errors.New("throttled disks need Linux")

type disk struct{ dir string }

func noDisks() error                   { return errLinux }
func (e *Env) newDisk() (*disk, error) { return nil, errLinux }
func (d *disk) throttle(int) error     { return errLinux }
func (d *disk) remove() error          { return nil }
