package codec

import (
	"math"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestTimeoutRoundTrip(t *testing.T) {
	tests := []struct {
		in   time.Duration
		text string
	}{
		{1, "1n"}, {99_999_999, "99999999n"}, {100_000_000, "100000u"}, {time.Second, "1000000u"},
		{100 * time.Second, "100000m"}, {100*time.Second + 1, "100001m"}, {1 << 62, "1281024H"},
		{time.Duration(math.MaxInt64), "2562048H"},
	}
	for _, tt := range tests {
		got := string(appendTimeout(nil, tt.in))
		d, err := parseTimeout(got)
		if err != nil || d < tt.in {
			t.Errorf("%v: %q, parsed %v %v", tt.in, got, d, err)
		}
		if tt.in < 1<<62 && got != tt.text {
			t.Errorf("%v: %q, want %q", tt.in, got, tt.text)
		}
	}
	if d, err := parseTimeout("99999999H"); err != nil || d != math.MaxInt64 {
		t.Error(d, err)
	}
	for _, bad := range []string{"", "S", "123456789S", "1x", "aS", "-1S", "+1S"} {
		if _, err := parseTimeout(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestGRPCMessageEncoding(t *testing.T) {
	for _, msg := range []string{"", "plain", "100%", "a\nb\tc", "grüße \u2028 \U0001F600", "~ }", "%41"} {
		enc := appendGRPCMessage(nil, msg)
		if len(enc) != grpcMessageLen(msg) {
			t.Errorf("%q: length %d, announced %d", msg, len(enc), grpcMessageLen(msg))
		}
		if got := decodeGRPCMessage(string(enc)); got != msg {
			t.Errorf("%q: %s decodes to %q", msg, enc, got)
		}
	}
	if got := string(appendGRPCMessage(nil, "a\xffb")); got != "a%EF%BF%BDb" {
		t.Error(got)
	}
	if got := decodeGRPCMessage("%4"); got != "%4" {
		t.Error(got)
	}
	if got := decodeGRPCMessage("%zz%41"); got != "%zzA" {
		t.Error(got)
	}
	long := strings.Repeat("ü", maxStatusText)
	enc := appendGRPCMessage(nil, long)
	if len(enc) > maxStatusText || len(enc) != grpcMessageLen(long) || !utf8.ValidString(decodeGRPCMessage(string(enc))) {
		t.Error("a long message is not cut at a character")
	}
}

func TestCheckPrefixTexts(t *testing.T) {
	tests := []struct {
		flag   byte
		n      uint32
		enc    string
		client bool
		want   Status
	}{
		{0, 10, "", false, Status{}},
		{0, 11, "", false, Status{ResourceExhausted, "grpc: received message larger than max (11 vs. 10)"}},
		{0, 11, "", true, Status{ResourceExhausted, "spindle: an answer larger than max (11 vs. 10)"}},
		{1, 1, "", false, Status{Internal, "grpc: compressed flag set with identity or empty encoding"}},
		{1, 1, "gzip", false, Status{}},
		{1, 1, "odd", false, Status{Unimplemented, `grpc: Decompressor is not installed for grpc-encoding "odd"`}},
		{1, 1, "gzip", true, Status{Internal, `grpc: Decompressor is not installed for grpc-encoding "gzip"`}},
		{7, 1, "", false, Status{Internal, "grpc: received unexpected payload format 7"}},
	}
	for _, tt := range tests {
		if got := checkPrefix(tt.flag, tt.n, 10, tt.enc, tt.client); got != tt.want {
			t.Errorf("%+v: got %+v", tt, got)
		}
	}
}

func TestContentType(t *testing.T) {
	for v, want := range map[string]bool{"application/grpc": true, "application/grpc+proto": true,
		"application/grpc;x": true, "application/grpcx": false, "application/json": false, "": false} {
		if isGRPCContentType(v) != want {
			t.Errorf("%q", v)
		}
	}
}
