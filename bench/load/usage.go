package load

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"syscall"
)

// clockTick is the kernel's USER_HZ: /proc counts CPU time in hundredths of a second on every Linux.
const clockTick = 100

// CPUSeconds is the CPU time that a process has used so far, user and system, from /proc. It is exact to 10 ms.
func CPUSeconds(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseStat(b)
}

// parseStat reads utime and stime, fields 14 and 15 (proc(5)); the name in field 2 may hold anything.
func parseStat(b []byte) (float64, error) {
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(f) < 13 {
		return 0, fmt.Errorf("/proc/PID/stat: %q", b)
	}
	sum := 0
	for _, v := range f[11:13] {
		n, err := strconv.Atoi(string(v))
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return float64(sum) / clockTick, nil
}

// machineCPU is the CPU time that all processes of this machine have used so far, with what its host has taken from it (steal), and how much
// there was to use, in seconds; 0 where there is no /proc. What interrupts used is in neither: kernels differ in whom they charge with it.
func machineCPU() (used, all float64) {
	b, _ := os.ReadFile("/proc/stat")
	return parseMachine(b)
}

// parseMachine reads the first line: user, nice, system, idle, iowait, irq, softirq, steal (proc(5)).
func parseMachine(b []byte) (used, all float64) {
	line, _, _ := bytes.Cut(b, []byte("\n"))
	f := bytes.Fields(line)
	if len(f) < 9 || string(f[0]) != "cpu" {
		return 0, 0
	}
	for i, v := range f[1:9] {
		n, _ := strconv.ParseFloat(string(v), 64)
		switch i {
		case 0, 1, 2, 7:
			used += n
			all += n
		case 3, 4:
			all += n
		}
	}
	return used / clockTick, all / clockTick
}

// Memory returns the resident memory of a process and the most that it has been, in bytes.
func Memory(pid int) (now, peak int64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	return statusField(b, "VmRSS:"), statusField(b, "VmHWM:"), nil
}

func statusField(b []byte, name string) int64 {
	_, rest, _ := bytes.Cut(b, []byte(name))
	f := bytes.Fields(rest)
	if len(f) == 0 {
		return 0
	}
	n, _ := strconv.ParseInt(string(f[0]), 10, 64)
	return n << 10
}

// ResetPeak makes the present resident memory of a process its peak. It needs the right to; else the peak is that of
// the process's life.
func ResetPeak(pid int) { _ = os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0) }

// ownCPU is the CPU time of this process, in seconds.
func ownCPU() float64 {
	var r syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &r) != nil {
		return 0
	}
	return float64(r.Utime.Nano()+r.Stime.Nano()) / 1e9
}
