package codec

// Code is a gRPC status code (google.golang.org/grpc/codes has the same numbers).
type Code uint32

// The gRPC status codes.
const (
	OK                 Code = 0
	Canceled           Code = 1
	Unknown            Code = 2
	InvalidArgument    Code = 3
	DeadlineExceeded   Code = 4
	NotFound           Code = 5
	AlreadyExists      Code = 6
	PermissionDenied   Code = 7
	ResourceExhausted  Code = 8
	FailedPrecondition Code = 9
	Aborted            Code = 10
	OutOfRange         Code = 11
	Unimplemented      Code = 12
	Internal           Code = 13
	Unavailable        Code = 14
	DataLoss           Code = 15
	Unauthenticated    Code = 16
)

// Status is how an RPC ended. The zero value is OK. Clients of etcd match on Msg, so texts are etcd's
// own (go.etcd.io/etcd/api/v3/v3rpc/rpctypes); a test compares them.
type Status struct {
	Code Code
	Msg  string
}

// Error makes a Status an error, for the places that are not on the road of a request.
func (s Status) Error() string { return s.Msg }

// etcd's own errors, as they go over the wire.
var (
	ErrEmptyKey        = Status{InvalidArgument, "etcdserver: key is not provided"}
	ErrKeyNotFound     = Status{InvalidArgument, "etcdserver: key not found"}
	ErrValueProvided   = Status{InvalidArgument, "etcdserver: value is provided"}
	ErrLeaseProvided   = Status{InvalidArgument, "etcdserver: lease is provided"}
	ErrTooManyOps      = Status{InvalidArgument, "etcdserver: too many operations in txn request"}
	ErrDuplicateKey    = Status{InvalidArgument, "etcdserver: duplicate key given in txn request"}
	ErrInvalidSort     = Status{InvalidArgument, "etcdserver: invalid sort option"}
	ErrCompacted       = Status{OutOfRange, "etcdserver: mvcc: required revision has been compacted"}
	ErrFutureRev       = Status{OutOfRange, "etcdserver: mvcc: required revision is a future revision"}
	ErrNoSpace         = Status{ResourceExhausted, "etcdserver: mvcc: database space exceeded"}
	ErrLeaseNotFound   = Status{NotFound, "etcdserver: requested lease not found"}
	ErrLeaseExist      = Status{FailedPrecondition, "etcdserver: lease already exists"}
	ErrLeaseTTL        = Status{OutOfRange, "etcdserver: too large lease TTL"}
	ErrRequestTooLarge = Status{InvalidArgument, "etcdserver: request is too large"}
	ErrTooManyRequests = Status{ResourceExhausted, "etcdserver: too many requests"}
	ErrTimeout         = Status{Unavailable, "etcdserver: request timed out"}
	ErrNoLeader        = Status{Unavailable, "etcdserver: no leader"}
	ErrStopped         = Status{Unavailable, "etcdserver: server stopped"}
	ErrAuthNotEnabled  = Status{FailedPrecondition, "etcdserver: authentication is not enabled"}
	ErrNotCapable      = Status{FailedPrecondition, "etcdserver: not capable"}
)
