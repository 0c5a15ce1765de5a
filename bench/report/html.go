package report

import (
	"bytes"
	"fmt"
	"html/template"
	"io"
	"slices"
	"time"

	"spindle/bench/load"
)

// HTML writes d as one page with charts. It loads nothing: it can be sent by mail and opened without a network.
func HTML(w io.Writer, d *Doc) error {
	p := page{Doc: d}
	for _, g := range groups(d.Runs) {
		i := slices.IndexFunc(p.Sections, func(s *section) bool { return s.Name == g.scenario })
		if i < 0 {
			i = len(p.Sections)
			p.Sections = append(p.Sections, &section{Name: g.scenario})
		}
		p.Sections[i].groups = append(p.Sections[i].groups, g)
	}
	for _, s := range p.Sections {
		s.fill(d)
	}
	// Made whole before it is written: a template that fails leaves no half a file.
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, p); err != nil {
		return err
	}
	_, err := w.Write(b.Bytes())
	return err
}

type page struct {
	*Doc
	Sections []*section
}

// section is one scenario.
type section struct {
	Name    string
	Load    string
	Summary string
	Legend  []key
	Parts   []key // of the bars
	Charts  []chart
	Rounds  []string // each as a table
	groups  []*group
	end     float64 // seconds of the longest round
}

type key struct {
	Name  string
	Color int
}

type chart struct {
	Title string
	SVG   template.HTML // made by this package, all text in it escaped
}

func perSecond(v float64) string {
	switch {
	case v >= 1e6:
		return fmt.Sprintf("%.4gM/s", v/1e6)
	case v >= 1e4:
		return fmt.Sprintf("%.4gk/s", v/1e3)
	}
	return fmt.Sprintf("%.4g/s", v)
}

func nanos(v float64) string { return load.Round(time.Duration(v)).String() }

func (s *section) fill(d *Doc) {
	first := s.groups[0].results[0].Spec
	s.Load = describe(&first)
	var b bytes.Buffer
	var runs []Run
	for _, r := range d.Runs {
		if r.Scenario == s.Name {
			runs = append(runs, r)
		}
	}
	Summary(&b, &Doc{Runs: runs})
	s.Summary = b.String()

	var ops, events, tail, lat []line
	var bars []bar
	var names []string
	quantiles := []string{"p50", "p90", "p99", "p99.9", "max"}
	for i, g := range s.groups {
		s.Legend = append(s.Legend, key{g.target, i % colors})
		for n, r := range g.results {
			name := g.target
			if g.rounds[n] > 0 {
				name = fmt.Sprintf("%s, round %d", name, g.rounds[n])
			}
			o, e, p := line{name: name, color: i}, line{name: name, color: i}, line{name: name, color: i}
			begin := 0.0
			for _, sec := range r.Series {
				at := (begin + sec.At) / 2 // the middle of the second; the last one may be shorter
				begin = sec.At
				o.x, o.y = append(o.x, at), append(o.y, sec.Ops)
				e.x, e.y = append(e.x, at), append(e.y, sec.Events)
				if sec.Ops > 0 { // else there is none
					p.x, p.y = append(p.x, at), append(p.y, float64(sec.P99))
				}
			}
			s.end = max(s.end, r.Seconds)
			ops, tail = append(ops, o), append(tail, p)
			var b bytes.Buffer
			fmt.Fprintf(&b, "%s: ", name)
			_ = Table(&b, r) // a Buffer takes all
			s.Rounds = append(s.Rounds, b.String())
			if len(r.Watches) > 0 {
				events = append(events, e)
			}
		}
		l := line{name: g.target, color: i}
		for q, f := range []func(*load.Latency) time.Duration{
			func(l *load.Latency) time.Duration { return l.P50 }, func(l *load.Latency) time.Duration { return l.P90 },
			func(l *load.Latency) time.Duration { return l.P99 }, func(l *load.Latency) time.Duration { return l.P999 },
			func(l *load.Latency) time.Duration { return l.Max },
		} {
			mid, ok := g.medianTime(func(r *load.Result) (uint64, time.Duration) { return r.Total.Count, f(&r.Total.Latency) })
			if ok {
				l.x, l.y = append(l.x, float64(q)), append(l.y, mid)
			}
		}
		lat = append(lat, l)
		v := bar{name: g.target}
		for _, name := range append(g.processes(), "generator") {
			if !slices.Contains(names, name) {
				names = append(names, name)
				s.Parts = append(s.Parts, key{name, (len(names) - 1) % colors})
			}
			mid, _ := g.medianTime(func(r *load.Result) (uint64, time.Duration) {
				if name == "generator" {
					return r.Total.Count, r.Generator.CPUPerOp
				}
				return r.Total.Count, cpu(r, name)
			})
			v.parts = append(v.parts, part{name, slices.Index(names, name), mid})
		}
		bars = append(bars, v)
	}
	s.add("Requests per second, over time", lineChart("requests per second", ops, nil, s.end, axis{show: perSecond}))
	s.add("p99 of the requests, over time", lineChart("p99", tail, nil, s.end, axis{log: true, show: nanos}))
	if len(events) > 0 {
		s.add("Events per second, over time", lineChart("events per second", events, nil, s.end, axis{show: perSecond}))
	}
	s.add("Latency, medians of the rounds", lineChart("latency", lat, quantiles, 0, axis{log: true, show: nanos}))
	s.add("CPU time for a request, by process", barChart("CPU time for a request", bars, nanos))
}

// describe says in words what the load was.
func describe(s *load.Spec) string {
	plural := func(n int, what string) string {
		if n == 1 {
			return "one " + what
		}
		return fmt.Sprintf("%d %ss", n, what)
	}
	text := fmt.Sprintf("%s: %s on %s, values of %d bytes", s.Mix, plural(s.Clients, "client"), plural(s.Connections, "connection"), s.ValueSize)
	if s.Rate > 0 {
		text += fmt.Sprintf(", %.0f requests/s", s.Rate)
	}
	if s.Watchers > 0 {
		text += ", " + plural(s.Watchers, "watcher")
	}
	if s.WatchAll {
		text += ", a watch of everything"
	}
	return text
}

func (s *section) add(title, svg string) {
	s.Charts = append(s.Charts, chart{title, template.HTML(svg)})
}

var pageTemplate = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{.Title}}</title>
<style>
:root{--bg:#fff;--fg:#1d2129;--dim:#667;--grid:#e2e4ea;--bad:#b3261e;--good:#1a7f37}
@media(prefers-color-scheme:dark){:root{--bg:#16181d;--fg:#e6e8ee;--dim:#99a;--grid:#333842;--bad:#ff8a80;--good:#6fdd8b}}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1200px;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.5rem}h3{font-size:.9rem;margin:.4rem 0;font-weight:600}
.dim{color:var(--dim)}pre{overflow-x:auto;font-size:13px}
table{border-collapse:collapse}td,th{text-align:left;padding:.25rem .8rem .25rem 0;border-bottom:1px solid var(--grid);vertical-align:top}
.good{color:var(--good)}.bad{color:var(--bad);font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:1.5rem}
svg{width:100%;height:auto;font:11px system-ui,sans-serif}svg text{fill:var(--dim)}
.grid{stroke:var(--grid);fill:none}.line{fill:none;stroke-width:2;stroke-linejoin:round}
.key{display:inline-block;margin-right:1rem}.key i{display:inline-block;width:.8em;height:.8em;margin-right:.35em;border-radius:2px}
.c0{fill:#4269d0;background:#4269d0}.c1{fill:#e08a1e;background:#e08a1e}.c2{fill:#d6434b;background:#d6434b}.c3{fill:#2f9e8f;background:#2f9e8f}
.c4{fill:#8a5cd1;background:#8a5cd1}.c5{fill:#3ca951;background:#3ca951}.c6{fill:#c75a9b;background:#c75a9b}.c7{fill:#8d7b68;background:#8d7b68}
.s0{stroke:#4269d0}.s1{stroke:#e08a1e}.s2{stroke:#d6434b}.s3{stroke:#2f9e8f}.s4{stroke:#8a5cd1}.s5{stroke:#3ca951}.s6{stroke:#c75a9b}.s7{stroke:#8d7b68}
</style></head><body>
<h1>{{.Title}}</h1>
<p class="dim">{{with .Machine}}{{.CPUs}} CPUs{{with .CPU}} ({{.}}){{end}}, {{printf "%.0f" .MemoryGiB}} GiB, {{.OS}}/{{.Arch}} {{.Kernel}}, {{.Go}}{{with .Load}}; load average {{.}}{{end}}{{end}}<br><code>{{.Command}}</code></p>
{{if .Checks}}<h2>What was to be reached</h2>
<table><tr><th>scenario<th>what<th>to reach<th>measured<th></tr>
{{range .Checks}}<tr><td>{{.Scenario}}<td>{{.What}}<td>{{.Want}}<td>{{.Got}}<td class="{{if or .Skipped (and .OK .Until)}}dim{{else if .OK}}good{{else}}bad{{end}}">{{.Verdict}}</tr>
{{end}}</table>{{end}}
{{range .Failed}}<p class="bad">{{.Scenario}} {{.Target}}: FAILED: {{.Short}}</p>
{{end}}{{range .Sections}}<h2>{{.Name}}</h2>
<p class="dim">{{.Load}}</p>
<p>{{range .Legend}}<span class="key"><i class="c{{.Color}}"></i>{{.Name}}</span>{{end}}</p>
<div class="charts">{{range .Charts}}<div><h3>{{.Title}}</h3>{{.SVG}}</div>{{end}}</div>
<p class="dim">bars: {{range .Parts}}<span class="key"><i class="c{{.Color}}"></i>{{.Name}}</span>{{end}}</p>
<pre>{{.Summary}}</pre>
<details><summary>each round</summary>{{range .Rounds}}<pre>{{.}}</pre>{{end}}</details>
{{end}}</body></html>
`))
