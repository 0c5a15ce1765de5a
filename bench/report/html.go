package report

import "io"

func HTML(w io.Writer, d *Doc) error { return nil }
