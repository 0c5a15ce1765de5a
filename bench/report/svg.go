package report

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// Size of a chart, in the units of its viewBox, and the room around what is drawn.
const (
	chartWidth, chartHeight = 560.0, 280.0
	padLeft, padRight       = 92.0, 14.0
	padTop, padBottom       = 14.0, 34.0
	plotWidth               = chartWidth - padLeft - padRight
	plotHeight              = chartHeight - padTop - padBottom
	ticks                   = 5 // about so many lines across a linear axis
	maxPoints               = 600
	maxDots                 = 30 // a line of so few points shows them
)

// colors is the number of classes c0, c1, ... in the page's style sheet.
const colors = 8

// line is one series of a line chart.
type line struct {
	name  string
	color int
	x, y  []float64
}

// axis maps values to a side of the plot.
type axis struct {
	lo, hi float64
	log    bool
	show   func(float64) string
}

func (a *axis) at(v float64) float64 {
	if a.log {
		v, lo, hi := math.Log(max(v, a.lo)), math.Log(a.lo), math.Log(a.hi)
		return (v - lo) / max(hi-lo, 1e-9)
	}
	return (v - a.lo) / max(a.hi-a.lo, 1e-9)
}

// marks are where the axis has lines: powers of ten (with 2 and 5 between if there are few), or round steps.
func (a *axis) marks() (m []float64) {
	if a.log {
		between := []float64{1}
		if a.hi/a.lo < 1e3 {
			between = []float64{1, 2, 5}
		}
		for p := math.Pow(10, math.Floor(math.Log10(a.lo)+1e-9)); p <= a.hi*1.0001; p *= 10 {
			for _, f := range between {
				if v := f * p; v >= a.lo*0.9999 && v <= a.hi*1.0001 {
					m = append(m, v)
				}
			}
		}
		return m
	}
	step := niceStep((a.hi - a.lo) / ticks)
	for i := int(math.Ceil(a.lo/step - 1e-9)); float64(i)*step <= a.hi*1.0001; i++ {
		m = append(m, float64(i)*step)
	}
	return m
}

// niceStep is the smallest of 1, 2 or 5 times a power of ten that is not below v.
func niceStep(v float64) float64 {
	if v <= 0 {
		return 1
	}
	p := math.Pow(10, math.Floor(math.Log10(v)))
	for _, f := range []float64{1, 2, 5} {
		if f*p >= v*0.9999 {
			return f * p
		}
	}
	return 10 * p
}

func text(b *strings.Builder, x, y float64, anchor, s string) {
	fmt.Fprintf(b, `<text x="%.1f" y="%.1f" text-anchor="%s">%s</text>`, x, y, anchor, html.EscapeString(s))
}

func begin(label string) *strings.Builder {
	b := new(strings.Builder)
	fmt.Fprintf(b, `<svg viewBox="0 0 %g %g" role="img" aria-label="%s">`, chartWidth, chartHeight, html.EscapeString(label))
	return b
}

func drawY(b *strings.Builder, a *axis) {
	for _, v := range a.marks() {
		y := padTop + plotHeight*(1-a.at(v))
		fmt.Fprintf(b, `<path class="grid" d="M%.1f %.1fH%.1f"/>`, padLeft, y, padLeft+plotWidth)
		text(b, padLeft-6, y+4, "end", a.show(v))
	}
}

// lineChart draws series; x is linear from 0 to end or further, or, with names, one place for each name.
func lineChart(label string, series []line, names []string, end float64, y axis) string {
	x := axis{hi: end, show: func(v float64) string { return fmt.Sprintf("%g s", v) }}
	lo, hi := math.Inf(1), 0.0
	for _, s := range series {
		for i := range s.x {
			x.hi = max(x.hi, s.x[i])
			hi = max(hi, s.y[i])
			if s.y[i] > 0 {
				lo = min(lo, s.y[i])
			}
		}
	}
	y.lo, y.hi = 0, max(hi*1.05, 1e-9)
	if y.log {
		if hi == 0 {
			lo, hi = 1, 10
		}
		y.lo, y.hi = math.Pow(10, math.Floor(math.Log10(lo))), math.Pow(10, math.Ceil(math.Log10(hi)))
		if y.lo == y.hi {
			y.hi *= 10
		}
	}
	b := begin(label)
	drawY(b, &y)
	bottom := padTop + plotHeight
	if len(names) > 0 {
		x.hi = float64(len(names) - 1)
		for i, n := range names {
			text(b, padLeft+plotWidth*(0.03+0.94*x.at(float64(i))), bottom+18, "middle", n)
		}
	} else {
		for _, v := range x.marks() {
			text(b, padLeft+plotWidth*x.at(v), bottom+18, "middle", x.show(v))
		}
	}
	for _, s := range series {
		fmt.Fprintf(b, `<path class="line s%d" d="`, s.color%colors)
		every := max(1, len(s.x)/maxPoints)
		var dots strings.Builder
		for i := 0; i < len(s.x); i += every {
			px := x.at(s.x[i])
			if len(names) > 0 {
				px = 0.03 + 0.94*px
			}
			op := 'L'
			if i == 0 {
				op = 'M'
			}
			px, py := padLeft+plotWidth*px, padTop+plotHeight*(1-y.at(s.y[i]))
			fmt.Fprintf(b, "%c%.1f %.1f", op, px, py)
			if len(s.x) <= maxDots {
				fmt.Fprintf(&dots, `<circle class="c%d" cx="%.1f" cy="%.1f" r="3"><title>%s</title></circle>`, s.color%colors, px, py,
					html.EscapeString(s.name+" "+y.show(s.y[i])))
			}
		}
		fmt.Fprintf(b, `"><title>%s</title></path>%s`, html.EscapeString(s.name), dots.String())
	}
	b.WriteString("</svg>")
	return b.String()
}

// bar is one bar of a chart: parts on top of each other.
type bar struct {
	name  string
	parts []part
}

type part struct {
	name  string
	color int
	v     float64
}

// barChart draws bars that lie on their sides.
func barChart(label string, bars []bar, show func(float64) string) string {
	x := axis{show: show}
	for _, v := range bars {
		sum := 0.0
		for _, p := range v.parts {
			sum += p.v
		}
		x.hi = max(x.hi, sum)
	}
	x.hi = max(x.hi*1.12, 1e-9)
	b := begin(label)
	bottom := padTop + plotHeight
	for _, v := range x.marks() {
		px := padLeft + plotWidth*x.at(v)
		fmt.Fprintf(b, `<path class="grid" d="M%.1f %.1fV%.1f"/>`, px, padTop, bottom)
		text(b, px, bottom+18, "middle", show(v))
	}
	height := plotHeight / float64(max(len(bars), 1))
	for i, v := range bars {
		y := padTop + height*(float64(i)+0.18)
		text(b, padLeft-6, y+height*0.32+4, "end", v.name)
		sum := 0.0
		for _, p := range v.parts {
			fmt.Fprintf(b, `<rect class="c%d" x="%.1f" y="%.1f" width="%.1f" height="%.1f"><title>%s</title></rect>`, p.color%colors,
				padLeft+plotWidth*x.at(sum), y, plotWidth*x.at(p.v), height*0.64, html.EscapeString(p.name+" "+show(p.v)))
			sum += p.v
		}
		text(b, padLeft+plotWidth*x.at(sum)+5, y+height*0.32+4, "start", show(sum))
	}
	b.WriteString("</svg>")
	return b.String()
}
