package main

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"strings"
)

// version of this Spindle; the CHANGELOG says what is in it. A release sets it by -ldflags.
var version = "0.1.0-dev"

const helpWidth = 100

// printHelp writes --help, from the options table.
func printHelp(w io.Writer) {
	fmt.Fprint(w, `Spindle serves the etcd API in front of several etcd clusters: one keyspace, one line of
revisions, the writes spread over the disks of all of them.

Without flags it runs three small etcds inside this process, with their data in ./spindle.data, and
serves http://127.0.0.1:2379. For real use name your own clusters:

  spindle --shard a=http://10.0.0.1:2379,http://10.0.0.2:2379,http://10.0.0.3:2379 \
          --shard b=http://10.0.1.1:2379,http://10.0.1.2:2379,http://10.0.1.3:2379 \
          --coordinator http://10.0.2.1:2379
`)
	group := ""
	for _, o := range options {
		if o.group != group {
			group = o.group
			fmt.Fprintf(w, "\n%s\n", group)
		}
		printOption(w, o.name, o.arg, o.help, o.def, o.repeat)
	}
	printOption(w, "config", "FILE", "YAML file with the names of the flags as keys.", "", false)
	printOption(w, "version", "", "Print the version and exit.", "", false)
	printOption(w, "help", "", "Print this and exit.", "", false)
	fmt.Fprintf(w, `
Every flag can also be set in the environment (--data-dir is %s; several --shard are
separated by spaces there). A flag wins over the environment, the environment over the file.
`, envName("data-dir"))
}

func printOption(w io.Writer, name, arg, help, def string, repeat bool) {
	head := "  --" + name
	if arg != "" {
		head += " " + arg
	}
	fmt.Fprintln(w, head)
	if def != "" {
		help += " Default: " + def + "."
	}
	if repeat {
		help += " May be repeated."
	}
	const indent = "        "
	line := indent
	for word := range strings.FieldsSeq(help) {
		if len(line)+1+len(word) > helpWidth && line != indent {
			fmt.Fprintln(w, line)
			line = indent
		}
		if line != indent {
			line += " "
		}
		line += word
	}
	fmt.Fprintln(w, line)
}

// printVersion writes what an operator is asked for in a bug report.
func printVersion(w io.Writer) {
	commit := ""
	if bi, ok := debug.ReadBuildInfo(); ok {
		for _, s := range bi.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				commit = ", commit " + s.Value[:12]
			}
		}
	}
	fmt.Fprintf(w, "spindle %s%s (%s, %s/%s)\n", version, commit, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
