package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"spindle/bench/report"
)

// parse reads args into f. --help shows usage and the flags, and is flag.ErrHelp; what is wrong with args is an error of
// one line.
func parse(f *flag.FlagSet, usage string, args []string) error {
	f.SetOutput(io.Discard)
	f.Usage = func() {}
	err := f.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Println(usage)
		f.SetOutput(os.Stdout)
		f.PrintDefaults()
		return err
	case err != nil:
		return fmt.Errorf("%w (%s --help lists the flags)", err, f.Name())
	case f.NArg() > 0:
		return fmt.Errorf("%q is not a flag, nor a command (%s --help lists them)", f.Arg(0), f.Name())
	}
	return nil
}

// duration is a flag for one; the standard one does not say how it is written.
type duration time.Duration

// Set implements flag.Value.
func (d *duration) Set(s string) error {
	v, err := time.ParseDuration(s)
	if err != nil {
		return errors.New("say 30s, or 2m")
	}
	*d = duration(v)
	return nil
}

// String implements flag.Value.
func (d *duration) String() string { return time.Duration(*d).String() }

// outputs are the files that a report is written to; "" is none.
type outputs struct{ json, html string }

func outputFlags(f *flag.FlagSet) *outputs {
	o := new(outputs)
	f.StringVar(&o.json, "json", "", "write the results to `FILE`; times are in nanoseconds")
	f.StringVar(&o.html, "html", "", "write a report with charts to `FILE`")
	return o
}

// check makes sure, before the work, that there will be files after it.
func (o *outputs) check() error {
	for _, name := range []string{o.json, o.html} {
		if name == "" {
			continue
		}
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			if f, err = os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644); err == nil {
				defer os.Remove(name)
			}
		}
		if err != nil {
			return err
		}
		f.Close()
	}
	return nil
}

func (o *outputs) write(doc *report.Doc) error {
	doc.Machine, doc.Command = report.ThisMachine(), commandLine(os.Args)
	var errs []error
	if o.json != "" {
		b, err := json.MarshalIndent(doc, "", "  ")
		if err == nil {
			err = os.WriteFile(o.json, append(b, '\n'), 0o644)
		}
		errs = append(errs, err)
	}
	if o.html != "" {
		file, err := os.Create(o.html)
		if err == nil {
			err = errors.Join(report.HTML(file, doc), file.Close())
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// commandLine is how this program was called, for a report that others read: without a password.
func commandLine(args []string) string {
	shown := append([]string{filepath.Base(args[0])}, args[1:]...)
	for i, arg := range shown {
		flag, user, same := strings.Cut(arg, "=")
		if strings.TrimLeft(flag, "-") != "user" || !strings.HasPrefix(flag, "-") {
			continue
		}
		if !same && i+1 < len(shown) {
			name, _, _ := strings.Cut(shown[i+1], ":")
			shown[i+1] = name + ":..."
		} else if same {
			name, _, _ := strings.Cut(user, ":")
			shown[i] = flag + "=" + name + ":..."
		}
	}
	return strings.Join(shown, " ")
}
