package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/yaml"
)

// envPrefix is what the name of an option in the environment begins with: --data-dir is
// SPINDLE_DATA_DIR.
const envPrefix = "SPINDLE_"

// option is one thing that can be set. The table below is the only place that knows of it: flags,
// environment, configuration file, defaults and --help all come from there.
type option struct {
	group string
	name  string // of the flag, and of the key in the file
	arg   string // what stands for the value in --help
	def   string
	help  string // one or two sentences
	// repeat says that the option may be given several times (in the environment: separated by spaces).
	repeat bool
	set    func(c *Config, v string) error
}

// argBool is the arg of an option whose flag alone means true.
const argBool = "BOOL"

const (
	groupClients = "Clients"
	groupTLS     = "TLS"
	groupMembers = "Member clusters"
	groupLocal   = "Embedded members (when no --shard is given)"
	groupTuning  = "Tuning"
	groupRest    = "Operation"
)

var options = []option{
	{groupClients, "listen-client-urls", "URL[,URL...]", "http://127.0.0.1:2379",
		"Where the etcd API is served.", false, urlList(func(c *Config) *[]string { return &c.ListenClientURLs })},
	{groupClients, "advertise-client-urls", "URL[,URL...]", "",
		"What clients are told to use. Default: what --listen-client-urls says.", false,
		urlList(func(c *Config) *[]string { return &c.AdvertiseClientURLs })},

	{groupTLS, "cert-file", "FILE", "",
		"Certificate for https:// and unixs:// listen URLs, clients' and metrics', PEM. Read again when it changes.", false,
		func(c *Config, v string) error { c.TLS.CertFile = v; return nil }},
	{groupTLS, "key-file", "FILE", "",
		"Its key.", false, func(c *Config, v string) error { c.TLS.KeyFile = v; return nil }},
	{groupTLS, "trusted-ca-file", "FILE", "",
		"CAs of clients' certificates. As in etcd, naming it demands a certificate of every client.", false,
		func(c *Config, v string) error { c.TLS.TrustedCAFile = v; return nil }},
	{groupTLS, "client-cert-auth", argBool, "false",
		"Demand a certificate of every client, signed by --trusted-ca-file or, without that, by one of the system's CAs.", false,
		boolean(func(c *Config) *bool { return &c.TLS.ClientCertAuth })},
	{groupTLS, "client-crl-file", "FILE", "",
		"Revoked clients' certificates, a DER list.", false,
		func(c *Config, v string) error { c.TLS.CRLFile = v; return nil }},
	{groupTLS, "client-cert-allowed-hostname", "NAME[,NAME...]", "",
		"Names one of which a client's certificate must be for. Default: any.", false,
		wordList(func(c *Config) *[]string { return &c.TLS.AllowedHostnames })},
	{groupTLS, "cipher-suites", "NAME[,NAME...]", "",
		"Suites for TLS 1.2. Default: all that HTTP/2 permits.", false,
		wordList(func(c *Config) *[]string { return &c.TLS.CipherSuites })},
	{groupTLS, "tls-min-version", "VERSION", "TLS1.2",
		"TLS1.2 or TLS1.3.", false, func(c *Config, v string) error { c.TLS.MinVersion = v; return nil }},
	{groupTLS, "tls-max-version", "VERSION", "",
		"TLS1.2 or TLS1.3. Default: the newest.", false, func(c *Config, v string) error { c.TLS.MaxVersion = v; return nil }},
	{groupClients, "max-request-bytes", "BYTES", "1572864",
		"As etcd's: the largest request of a client.", false, integer(func(c *Config) *int { return &c.MaxRequestBytes })},
	{groupClients, "max-concurrent-streams", "N", "10000",
		"As etcd's: how many streams one client connection may have open at a time.", false,
		integer(func(c *Config) *int { return &c.MaxConcurrentStreams })},
	{groupClients, "max-client-memory", "BYTES", "536870912",
		"What answers, requests and messages of all clients may take together, before large lists wait and clients that do not read are dropped. 0: no limit.", false,
		integer(func(c *Config) *int { return &c.MaxClientMemory })},
	{groupClients, "grpc-keepalive-min-time", "DURATION", "5s",
		"As etcd's: how long a client has to wait between its pings.", false,
		duration(func(c *Config) *time.Duration { return &c.GRPCKeepaliveMinTime })},
	{groupClients, "grpc-keepalive-interval", "DURATION", "2h",
		"As etcd's: how long a client may be silent before it is pinged. 0: it is not.", false,
		duration(func(c *Config) *time.Duration { return &c.GRPCKeepaliveInterval })},
	{groupClients, "grpc-keepalive-timeout", "DURATION", "20s",
		"As etcd's: how long the answer to that may take before the connection is closed. 0: no pings.", false,
		duration(func(c *Config) *time.Duration { return &c.GRPCKeepaliveTimeout })},

	{groupMembers, "shard", "NAME=URL[,URL...]", "",
		"A member cluster: its name and the client URLs of its nodes.", true, setShard},
	{groupMembers, "coordinator", "URL[,URL...]", "",
		"The small etcd cluster that hands out revisions.", false,
		urlList(func(c *Config) *[]string { return &c.Coordinator })},
	{groupMembers, "replace-coordinator", argBool, "false",
		"Let an empty coordinator take the place of the one that the member clusters name, although its cluster ID is another one. Stop the old one first.", false,
		boolean(func(c *Config) *bool { return &c.ReplaceCoordinator })},
	{groupMembers, "accept-data-loss", "NAME[,NAME...]", "",
		"Member clusters that were restored from an older backup, or emptied: start although what they have lost is lost for good. Stop every other proxy first.", false,
		wordList(func(c *Config) *[]string { return &c.AcceptDataLoss })},
	{groupMembers, "shard-cacert", "FILE", "",
		"CAs of the certificates of https:// endpoints, members' and coordinator's. Default: the system's. Read again when it changes.", false,
		func(c *Config, v string) error { c.MemberTLS.CAFile = v; return nil }},
	{groupMembers, "shard-cert", "FILE", "",
		"Certificate to show to https:// endpoints, PEM. Read again when it changes.", false,
		func(c *Config, v string) error { c.MemberTLS.CertFile = v; return nil }},
	{groupMembers, "shard-key", "FILE", "",
		"Its key.", false, func(c *Config, v string) error { c.MemberTLS.KeyFile = v; return nil }},
	{groupMembers, "partitioner", "KIND", "",
		"How keys are spread over shards: hash, or range with start and end of each shard in the file. Fixed by the first start, which takes hash; later ones take what is recorded.", false,
		func(c *Config, v string) error { c.Partitioner = v; return nil }},
	{groupMembers, "shard-max-txn-ops", "N", "128",
		"What the members were started with as --max-txn-ops. 1024 is recommended.", false,
		integer(func(c *Config) *int { return &c.ShardMaxTxnOps })},
	{groupMembers, "shard-max-request-bytes", "BYTES", "1572864",
		"What the members were started with as --max-request-bytes. 1638400 is recommended.", false,
		integer(func(c *Config) *int { return &c.ShardMaxRequestBytes })},
	{groupMembers, "shard-quota-backend-bytes", "BYTES", "0",
		"What members older than etcd 3.6 were started with as --quota-backend-bytes; newer ones tell. 0: not known, and Spindle does not keep them from running full.", false,
		integer(func(c *Config) *int { return &c.ShardQuotaBackendBytes })},

	{groupLocal, "data-dir", "DIR", "./spindle.data",
		"Where they keep their data.", false, func(c *Config, v string) error { c.DataDir = v; return nil }},
	{groupLocal, "embedded-shards", "N", "3",
		"How many single-node member clusters to run in this process. Fixed by the first start.", false,
		integer(func(c *Config) *int { return &c.EmbeddedShards })},

	{groupTuning, "reorder-window", "DURATION", "250ms",
		"How long another proxy's revisions may stay open before this one closes them.", false,
		duration(func(c *Config) *time.Duration { return &c.ReorderWindow })},
	{groupTuning, "shard-timeout", "DURATION", "5s",
		"How long a request waits for a member cluster before the client is told that it timed out.", false,
		duration(func(c *Config) *time.Duration { return &c.ShardTimeout })},
	{groupTuning, "watch-progress-notify-interval", "DURATION", "10m",
		"How often an idle watch that asked for it is told how far it has got.", false,
		duration(func(c *Config) *time.Duration { return &c.WatchProgressNotifyInterval })},
	{groupTuning, "ring-size", "N", "65536",
		"How many revisions are kept in memory for watches.", false,
		integer(func(c *Config) *int { return &c.RingSize })},
	{groupTuning, "loops", "N", "0",
		"Event loops that serve clients. 0: half the cores, at least one.", false,
		integer(func(c *Config) *int { return &c.Loops })},
	{groupTuning, "busy-poll", "DURATION", "200us",
		"How long an event loop with few requests under way looks for its next event before it sleeps. Lone requests take less time, and the proxy more of the CPU's while it is lightly loaded. 0s: never; nor with one CPU, nor with embedded members. Give 0s in a container that may use less than two CPUs.", false,
		duration(func(c *Config) *time.Duration { return &c.BusyPoll })},

	{groupRest, "auto-compaction-mode", "MODE", "periodic",
		"What --auto-compaction-retention counts: periodic (time) or revision.", false,
		func(c *Config, v string) error { c.AutoCompactionMode = v; return nil }},
	{groupRest, "auto-compaction-retention", "TIME|N", "0",
		"How much history to keep: a duration such as 30m (a plain number means hours), or a number of revisions. 0: never compact.", false,
		func(c *Config, v string) error { c.AutoCompactionRetention = v; return nil }},
	{groupRest, "listen-metrics-urls", "URL[,URL...]", "http://127.0.0.1:2381",
		"Where /metrics, /health, /livez, /readyz and /version are served. Empty: nowhere.", false,
		urlList(func(c *Config) *[]string { return &c.ListenMetricsURLs })},
	{groupRest, "enable-pprof", "", "false",
		"Serve Go's profiles under /debug/pprof/ on --listen-metrics-urls.", false,
		boolean(func(c *Config) *bool { return &c.EnablePprof })},
	{groupRest, "log-level", "LEVEL", "info",
		"debug, info, warn or error.", false, setLogLevel},
}

func findOption(name string) *option {
	for i := range options {
		if options[i].name == name {
			return &options[i]
		}
	}
	return nil
}

// errHelp and errVersion are what parse returns when only that was asked for.
var (
	errHelp    = errors.New("help")
	errVersion = errors.New("version")
)

// parse makes the Config: flags win over the environment, that over the file, that over defaults.
func parse(args []string, environ []string) (*Config, error) {
	flags, err := parseFlags(args)
	if err != nil {
		return nil, err
	}
	env := parseEnv(environ)
	file := map[string][]string{}
	var ranges []RangeConfig
	fileName := last(flags["config"])
	if fileName == "" {
		fileName = last(env["config"])
	}
	if fileName != "" {
		if file, ranges, err = readFile(fileName); err != nil {
			return nil, err
		}
	}
	c := &Config{given: map[string]string{}, values: map[string][]string{}, file: fileName, Ranges: ranges}
	for _, o := range options {
		var values []string
		from := ""
		switch {
		case flags[o.name] != nil:
			values, from = flags[o.name], "flag"
		case env[o.name] != nil:
			values, from = env[o.name], envName(o.name)
		case file[o.name] != nil:
			values, from = file[o.name], fileName
		case o.def != "":
			values = []string{o.def}
		}
		if from != "" {
			c.given[o.name] = from
		}
		c.values[o.name] = values
		if !o.repeat && len(values) > 1 {
			return nil, fmt.Errorf("--%s is given twice: give it once", o.name)
		}
		for _, v := range values {
			if err := o.set(c, v); err != nil {
				where := "--" + o.name
				if from != "" && from != "flag" {
					where = o.name + " in " + from
				}
				return nil, fmt.Errorf("%s: %w", where, err)
			}
		}
	}
	return c, c.Validate()
}

func last(v []string) string {
	if len(v) == 0 {
		return ""
	}
	return v[len(v)-1]
}

// parseFlags understands --name value, --name=value and both with one dash, as etcd does.
func parseFlags(args []string) (map[string][]string, error) {
	out := map[string][]string{}
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		name, ok := strings.CutPrefix(arg, "-")
		if !ok || name == "" || name == "-" {
			return nil, fmt.Errorf("%q is not a flag: Spindle takes flags only, see --help", arg)
		}
		name, _ = strings.CutPrefix(name, "-")
		name, value, hasValue := strings.Cut(name, "=")
		switch name {
		case "help", "h":
			return nil, errHelp
		case "version":
			return nil, errVersion
		}
		o := findOption(name)
		if name != "config" && o == nil {
			if near := nearest(name); near != "" {
				return nil, fmt.Errorf("there is no flag --%s: did you mean --%s? (--help lists all)", name, near)
			}
			return nil, fmt.Errorf("there is no flag --%s: --help lists all", name)
		}
		if !hasValue && o != nil && o.arg == argBool {
			value, hasValue = "true", true // as with Go's flags, a value needs the =
		}
		if !hasValue {
			if len(args) == 0 {
				return nil, fmt.Errorf("--%s needs a value: --help says which", name)
			}
			value, args = args[0], args[1:]
		}
		out[name] = append(out[name], value)
	}
	return out, nil
}

func envName(name string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
}

// parseEnv takes the variables that are options. Others that begin with SPINDLE_ are left alone: for a
// Service named spindle, Kubernetes sets a dozen of them (SPINDLE_SERVICE_HOST, ...). An empty variable
// counts as not set.
func parseEnv(environ []string) map[string][]string {
	vars := map[string]string{}
	for _, kv := range environ {
		if k, v, ok := strings.Cut(kv, "="); ok && v != "" && strings.HasPrefix(k, envPrefix) {
			vars[k] = v
		}
	}
	out := map[string][]string{}
	if v := vars[envName("config")]; v != "" {
		out["config"] = []string{v}
	}
	for _, o := range options {
		switch v := vars[envName(o.name)]; {
		case v == "":
		case o.repeat:
			out[o.name] = strings.Fields(v)
		default:
			out[o.name] = []string{v}
		}
	}
	return out
}

// readFile reads a YAML file with the flags' names as keys. A list may stand for several URLs, and for
// an option that may be repeated; a shard may also say its range of keys.
func readFile(name string) (map[string][]string, []RangeConfig, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil, fmt.Errorf("--config: there is no file %s", name)
		}
		return nil, nil, fmt.Errorf("--config: %w", err)
	}
	js, err := yaml.YAMLToJSONStrict(b)
	if err != nil {
		return nil, nil, fmt.Errorf("--config: %s is not good YAML: %s", name, oneLine(err))
	}
	var m map[string]any
	dec := json.NewDecoder(strings.NewReader(string(js)))
	dec.UseNumber()
	if err := dec.Decode(&m); err != nil {
		return nil, nil, fmt.Errorf("--config: %s must be lines of \"name: value\", with the flags' names", name)
	}
	out := map[string][]string{}
	var ranges []RangeConfig
	for _, key := range sortedKeys(m) {
		o := findOption(key)
		if o == nil {
			if near := nearest(key); near != "" {
				return nil, nil, fmt.Errorf("--config: %s: there is no option %q: did you mean %q?", name, key, near)
			}
			return nil, nil, fmt.Errorf("--config: %s: there is no option %q: the names are the flags', see --help", name, key)
		}
		values, r, err := fileOption(key, m[key])
		if err != nil {
			return nil, nil, fmt.Errorf("--config: %s: %s: %w", name, key, err)
		}
		ranges = append(ranges, r...)
		if len(values) == 0 {
			continue // ranges of embedded members
		}
		if !o.repeat && len(values) > 1 {
			values = []string{strings.Join(values, ",")}
		}
		out[key] = values
	}
	return out, ranges, nil
}

// fileOption reads the value of one key. The shard list may have elements with a range of keys.
func fileOption(key string, v any) (values []string, ranges []RangeConfig, err error) {
	list, ok := v.([]any)
	if key != "shard" || !ok {
		values, err = fileValues(v)
		return values, nil, err
	}
	for _, e := range list {
		m, ok := e.(map[string]any)
		if !ok {
			one, err := fileValues([]any{e})
			if err != nil {
				return nil, nil, err
			}
			values = append(values, one...)
			continue
		}
		one, r, err := fileShard(m)
		if err != nil {
			return nil, nil, err
		}
		values, ranges = append(values, one...), append(ranges, r...)
	}
	if !slices.ContainsFunc(ranges, func(r RangeConfig) bool { return r.Start != nil || r.End != nil }) {
		ranges = nil
	}
	return values, ranges, nil
}

func fileValues(v any) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, errors.New("it has no value: give one, or leave the line out")
	case string:
		return []string{v}, nil
	case bool:
		return []string{strconv.FormatBool(v)}, nil
	case json.Number:
		return []string{v.String()}, nil
	case []any:
		var out []string
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, errors.New("a list here holds strings only")
			}
			out = append(out, s)
		}
		return out, nil
	default:
		return nil, errors.New("give a string, a number, true, false or a list of strings")
	}
}

func sortedKeys(m map[string]any) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

func urlList(field func(*Config) *[]string) func(*Config, string) error {
	return func(c *Config, v string) error {
		for u := range strings.SplitSeq(v, ",") {
			if u = strings.TrimSuffix(strings.TrimSpace(u), "/"); u != "" {
				*field(c) = append(*field(c), u)
			}
		}
		return nil
	}
}

// wordList is for names that are separated by commas.
func wordList(field func(*Config) *[]string) func(*Config, string) error {
	return func(c *Config, v string) error {
		for w := range strings.SplitSeq(v, ",") {
			if w = strings.TrimSpace(w); w != "" {
				*field(c) = append(*field(c), w)
			}
		}
		return nil
	}
}

func boolean(field func(*Config) *bool) func(*Config, string) error {
	return func(c *Config, v string) error {
		b, err := strconv.ParseBool(v)
		if err != nil {
			return fmt.Errorf("%q: say true or false", v)
		}
		*field(c) = b
		return nil
	}
}

func setShard(c *Config, v string) error {
	name, urls, ok := strings.Cut(v, "=")
	s := ShardConfig{Name: strings.TrimSpace(name)}
	for u := range strings.SplitSeq(urls, ",") {
		if u = strings.TrimSuffix(strings.TrimSpace(u), "/"); u != "" {
			s.URLs = append(s.URLs, u)
		}
	}
	if !ok || len(s.URLs) == 0 {
		return fmt.Errorf("%q: write NAME=URL[,URL...], as in a=http://10.0.0.1:2379,http://10.0.0.2:2379", v)
	}
	c.Shards = append(c.Shards, s)
	return nil
}

func setLogLevel(c *Config, v string) error {
	switch strings.ToLower(v) {
	case "debug":
		c.LogLevel = slog.LevelDebug
	case "info":
		c.LogLevel = slog.LevelInfo
	case "warn", "warning":
		c.LogLevel = slog.LevelWarn
	case "error":
		c.LogLevel = slog.LevelError
	default:
		return fmt.Errorf("%q: say debug, info, warn or error", v)
	}
	return nil
}

func integer(field func(*Config) *int) func(*Config, string) error {
	return func(c *Config, v string) error {
		n, err := strconv.Atoi(v)
		if err != nil {
			return fmt.Errorf("%q is not a whole number", v)
		}
		*field(c) = n
		return nil
	}
}

func duration(field func(*Config) *time.Duration) func(*Config, string) error {
	return func(c *Config, v string) error {
		d, err := time.ParseDuration(v)
		if err != nil {
			return fmt.Errorf("%q is not a duration: write a number with a unit, as in 250ms, 5s or 10m", v)
		}
		*field(c) = d
		return nil
	}
}

// nearest returns the option whose name is at most a third of its letters away from name, or "".
func nearest(name string) string {
	best, dist := "", 0
	for _, o := range options {
		d := editDistance(name, o.name)
		if d <= len(o.name)/3 && (best == "" || d < dist) {
			best, dist = o.name, d
		}
	}
	return best
}

func editDistance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		prev := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := prev
			if a[i] != b[j] {
				cost = 1 + min(prev, row[j], row[j+1])
			}
			prev, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
