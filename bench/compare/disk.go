package compare

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// diskSize is the size of a throttled disk's image; it is sparse, and etcd lays out 64 MB logs.
	diskSize = 2 << 30
	// throttleFile limits writes by device for the whole machine (Linux, Documentation/admin-guide/cgroup-v1/
	// blkio-controller): the root group of version 1 has it, of version 2 not. The root is the right place: what a
	// journal writes is accounted there, not to the process that waits for it.
	throttleFile = "/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device"
	probeBytes   = 1 << 20
)

// disk is an ext4 in a file on a loop device, whose writes are throttled.
type disk struct {
	image, dir, loop, number string
	mounted, throttled       bool
}

// noDisks says why there can be none here, nil if they can.
func noDisks() error {
	if os.Geteuid() != 0 {
		return errors.New("throttled disks need root")
	}
	for _, tool := range []string{"losetup", "mkfs.ext4"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("throttled disks need %s", tool)
		}
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		return errors.New("throttled disks need loop devices")
	}
	if _, err := os.Stat(throttleFile); err != nil {
		return fmt.Errorf("throttled disks need the blkio cgroup of version 1 (%s)", throttleFile)
	}
	return nil
}

// newDisk makes and mounts one, where noDisks has no objection; it is not throttled yet.
func (e *Env) newDisk() (*disk, error) {
	dir, err := os.MkdirTemp(e.dir, "disk-")
	if err != nil {
		return nil, err
	}
	d := &disk{image: dir + ".img", dir: dir}
	e.disks = append(e.disks, d) // whatever happens now, it is removed
	f, err := os.Create(d.image)
	if err == nil {
		err = errors.Join(f.Truncate(diskSize), f.Close())
	}
	if err != nil {
		return nil, err
	}
	out, err := exec.Command("losetup", "-f", "--show", d.image).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("losetup: %w: %s", err, out)
	}
	if err := d.attached(string(bytes.TrimSpace(out))); err != nil {
		return nil, err
	}
	// Nothing is left for the kernel to write in the background while it is measured.
	if out, err := exec.Command("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", d.loop).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	if err := unix.Mount(d.loop, d.dir, "ext4", 0, ""); err != nil {
		return nil, fmt.Errorf("mount %s: %w", d.loop, err)
	}
	d.mounted = true
	return d, nil
}

// attached notes the loop device.
func (d *disk) attached(loop string) error {
	d.loop = loop
	number, err := os.ReadFile("/sys/block/" + filepath.Base(loop) + "/dev")
	d.number = string(bytes.TrimSpace(number))
	return err
}

// leftDisk is a disk that a run which was killed has made: as it may be, mounted and throttled.
func leftDisk(image string) *disk {
	d := &disk{image: image, dir: strings.TrimSuffix(image, ".img")}
	out, err := exec.Command("losetup", "-j", image).Output()
	loop, _, found := strings.Cut(string(out), ":")
	if err == nil && found && d.attached(loop) == nil {
		d.throttled = true
		d.mounted = unix.Unmount(d.dir, 0) != nil // else it is not any more
	}
	return d
}

func (d *disk) limit(bps int) error {
	return os.WriteFile(throttleFile, []byte(d.number+" "+strconv.Itoa(bps)), 0)
}

// throttle limits the disk's writes, and makes sure that synced writes are as slow as that.
func (d *disk) throttle(bps int) error {
	d.throttled = true
	if err := d.limit(bps); err != nil {
		return fmt.Errorf("%s: %w", throttleFile, err)
	}
	probe := filepath.Join(d.dir, "probe")
	defer os.Remove(probe)
	f, err := os.Create(probe)
	if err != nil {
		return err
	}
	defer f.Close()
	block := make([]byte, probeBytes)
	begin := time.Now()
	if _, err = f.Write(block); err == nil {
		err = f.Sync()
	}
	if err != nil {
		return err
	}
	if took, want := time.Since(begin), time.Duration(float64(probeBytes)/float64(bps)*float64(time.Second)); took < want/2 {
		return fmt.Errorf("the kernel does not throttle: %d bytes were synced to %s in %v, which should take %v", probeBytes, d.loop, took, want)
	}
	return nil
}

// remove undoes all, as far as it was done.
func (d *disk) remove() error {
	var errs []error
	if d.throttled {
		errs = append(errs, d.limit(0))
	}
	if d.mounted {
		err := unix.Unmount(d.dir, 0)
		if err != nil { // somebody looks into it
			err = unix.Unmount(d.dir, unix.MNT_DETACH)
		}
		errs = append(errs, err)
	}
	if d.loop != "" {
		if out, err := exec.Command("losetup", "-d", d.loop).CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("losetup -d %s: %w: %s", d.loop, err, out))
		}
	}
	return errors.Join(append(errs, os.Remove(d.image))...)
}
