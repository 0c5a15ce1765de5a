package server

import (
	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// This file is gRPC's own health check (grpc.health.v1), as etcd serves it with grpc-go's health server: one service,
// the empty name, which serves. A proxy that is not ready takes no connections, so who can ask is
// told SERVING, until the server goes away.

// Values of HealthCheckResponse.ServingStatus.
const (
	healthServing    = 1
	healthNotServing = 2
	healthUnknown    = 3
)

const healthPath = "/grpc.health.v1.Health/"

var statusUnknownService = codec.Status{Code: codec.NotFound, Msg: "unknown service"}

// serveHealth registers the methods with e.
func serveHealth(e *Engine) {
	for name, f := range map[string]func(*healthRPC, string){
		"Check": (*healthRPC).check, "List": (*healthRPC).list, "Watch": (*healthRPC).watch,
	} {
		e.HandleStream(healthPath+name, func(*Loop) StreamHandler { return &healthRPC{eng: e, answer: f} })
	}
}

// healthRPC is one call of any of the methods; all have one request.
type healthRPC struct {
	eng      *Engine
	rpc      *RPC
	answer   func(*healthRPC, string)
	asked    bool
	watching string // the service's name, once asked
	last     uint64 // status sent last, of a Watch
}

// Open implements StreamHandler.
func (h *healthRPC) Open(rpc *RPC) { h.rpc = rpc }

// Message implements StreamHandler.
func (h *healthRPC) Message(msg []byte) {
	if h.asked {
		return
	}
	h.asked = true
	it := codec.Fields{Msg: msg}
	service := ""
	for it.Next() {
		if it.Field.Num == 1 && it.Field.Type == protowire.BytesType {
			service = string(it.Field.Bytes)
		}
	}
	if it.Bad {
		h.rpc.Finish(statusBadMessage)
		return
	}
	h.answer(h, service)
}

// HalfClose implements StreamHandler.
func (h *healthRPC) HalfClose() {
	if !h.asked {
		h.rpc.Finish(statusNoMessage)
	}
}

// Cancel implements StreamHandler.
func (h *healthRPC) Cancel() {}

// Drained implements StreamHandler.
func (h *healthRPC) Drained() {}

// Drain implements Drainer.
func (h *healthRPC) Drain() {
	if h.last != 0 {
		h.tell()
	}
	h.rpc.Finish(codec.ErrStopped)
}

func (h *healthRPC) status(service string) uint64 {
	switch {
	case service != "":
		return healthUnknown
	case h.eng.draining.Load():
		return healthNotServing
	}
	return healthServing
}

func appendHealth(dst []byte, status uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(dst, 1, protowire.VarintType), status)
}

func (h *healthRPC) check(service string) {
	st := h.status(service)
	if st == healthUnknown {
		h.rpc.Finish(statusUnknownService)
		return
	}
	h.rpc.Send(appendHealth(nil, st))
	h.rpc.Finish(codec.Status{})
}

// list answers a map with the one service.
func (h *healthRPC) list(string) {
	entry, m := codec.BeginMessage(nil, 1)
	entry = protowire.AppendTag(entry, 1, protowire.BytesType)
	entry = protowire.AppendString(entry, "")
	entry, m2 := codec.BeginMessage(entry, 2)
	entry = appendHealth(entry, h.status(""))
	h.rpc.Send(codec.EndMessage(codec.EndMessage(entry, m2), m))
	h.rpc.Finish(codec.Status{})
}

// watch sends the status now and when it changes.
func (h *healthRPC) watch(service string) {
	h.watching = service
	h.tell()
}

func (h *healthRPC) tell() {
	if st := h.status(h.watching); st != h.last {
		h.last = st
		h.rpc.Send(appendHealth(nil, st))
	}
}
