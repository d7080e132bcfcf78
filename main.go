// Proxy is a caching HTTP/1.1 forward proxy. Usage: proxy [flags] [port | host:port]
//
// A bare port, 8899 if none is given, is opened to this machine only, ":8899" to the network; proxy -h lists
// the flags. Requests are logged to stdout in Squid's native format, what concerns the operator to stderr.
// Here is the life of a request; request.go is HTTP on the wire, cache.go the store and its rules.
package main

import (
	"bufio"
	"cmp"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math"
	"mime"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

var (
	dir   = flag.String("cache", cmp.Or(os.Getenv("CACHE_DIRECTORY"), "cache"), "`directory` of the cache")
	size  = flag.String("size", "1G", "most `bytes` that it holds, as 500M or 10G")
	uses  = flag.Int("uses", 1, "store a response from the `n`th GET for its URL within 10 minutes on")
	ttl   = flag.Duration("ttl", 0, "how long a response is fresh that says nothing about it")
	files = flag.String("files", ".", "`directory` of files for direct requests, empty for none")
	block = flag.String("block", "", "hosts, domains, addresses and CIDRs refused: a `list` or @file")
	auth  = flag.String("auth", "", "`user:password` that clients must give, or @file")

	cache   = Cache{under: map[string]*download{}, seen: map[string][]time.Time{}}
	origins = Origins{Dialer: net.Dialer{Timeout: 10 * time.Second, Control: control}}
	name    = "proxy-" + strings.ToLower(rand.Text()[:6]) // our pseudonym in Via
	domains []string                                      // blocked, with all below them
	nets    []netip.Prefix                                // blocked
	active  atomic.Int64                                  // exchanges under way
	closing atomic.Bool
	journal = struct { // the access log, and what it counts
		sync.Mutex
		*bufio.Writer
		requests, hits, bytes int64
	}{Writer: bufio.NewWriterSize(os.Stdout, 64<<10)}
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("proxy: ")
	address := configure()
	err := os.MkdirAll(*dir, 0o700)
	if probe, err2 := os.CreateTemp(*dir, temporary); err2 == nil {
		os.Remove(probe.Name())
	} else if err = err2; err != nil {
		log.Fatalf("cannot use the cache directory: %v", err)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		log.Fatal(err)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, os.Interrupt, syscall.SIGTERM)
	log.Printf("listening on %s, cache in %s", l.Addr(), *dir)
	go accept(l)
	go cache.trim()
	for end := time.Now().Add(math.MaxInt64); !closing.Load() || active.Load() > 0 && time.Now().Before(end); {
		select {
		case <-stop: // exchanges under way have ten seconds more
			closing.Store(true)
			end = time.Now().Add(10 * time.Second)
			l.Close()
		case <-time.After(100 * time.Millisecond):
			journal.Lock()
			journal.Flush()
			journal.Unlock()
		}
	}
	journal.Flush()
	log.Printf("%d requests, %d from the cache, %d bytes", journal.requests, journal.hits, journal.bytes)
}

// configure reads the command line, and returns the address to listen on.
func configure() (address string) {
	usage := func(ok bool, format string, args ...any) {
		if !ok {
			log.Printf(format+"; proxy -h tells more", args...)
			os.Exit(2)
		}
	}
	flag.CommandLine.Init("proxy", flag.ContinueOnError)
	flag.CommandLine.SetOutput(io.Discard)
	err := flag.CommandLine.Parse(os.Args[1:])
	for ; err == nil && flag.NArg() > 0; err = flag.CommandLine.Parse(flag.Args()[1:]) {
		usage(address == "", "two addresses, %s and %s", address, flag.Arg(0))
		address = flag.Arg(0)
	}
	if errors.Is(err, flag.ErrHelp) {
		flag.CommandLine.SetOutput(os.Stderr)
		fmt.Fprintln(os.Stderr, "usage: proxy [flags] [port | host:port]")
		flag.PrintDefaults()
		os.Exit(0)
	}
	usage(err == nil, "%v", err)
	if address = cmp.Or(address, "8899"); strings.Trim(address, "0123456789") == "" {
		address = "127.0.0.1:" + address
	}
	_, port, err := net.SplitHostPort(address)
	n, ok := digits(port)
	usage(err == nil && ok && n < 65536, "%q is neither a port nor host:port", address)
	number := strings.TrimRight(strings.ToUpper(*size), "KMGT")
	power := strings.Index(" KMGT", strings.ToUpper(*size)[len(number):])
	limit, ok := digits(number)
	usage(ok && power >= 0 && limit <= math.MaxInt64>>(10*power), "-size %s is no number of bytes", *size)
	usage(*uses > 0 && *ttl >= 0, "-uses %d or -ttl %v makes no sense", *uses, *ttl)
	cache.dir, cache.limit, cache.ttl, cache.uses = *dir, limit<<(10*power), int64(ttl.Seconds()), *uses
	for _, text := range []*string{block, auth} {
		if file, ok := strings.CutPrefix(*text, "@"); ok {
			b, err := os.ReadFile(file)
			usage(err == nil, "%v", err)
			*text = strings.TrimSpace(string(b))
		}
	}
	for _, entry := range strings.FieldsFunc(*block, func(c rune) bool { return c <= ' ' || c == ',' }) {
		ip, err := netip.ParseAddr(strings.Trim(entry, "[]"))
		prefix, err2 := netip.ParsePrefix(entry)
		host, err3 := authority(strings.Trim(entry, "."))
		if err == nil {
			prefix, err2 = netip.PrefixFrom(ip.Unmap(), ip.Unmap().BitLen()), nil
		}
		if err2 == nil {
			nets = append(nets, prefix)
			continue
		}
		usage(err3 == nil && !strings.Contains(entry, ":"), "-block: %q is no host, address or CIDR", entry)
		domains = append(domains, strings.TrimSuffix(host, ":80"))
	}
	return address
}

func accept(l net.Listener) {
	for !closing.Load() {
		nc, err := l.Accept()
		if err != nil { // e.g., too many open files
			log.Print(err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		go client(newConn(nc))
	}
}

// client answers the requests of one connection, one after another.
func client(c *Conn) {
	defer c.Close()
	for req := new(Head); !closing.Load(); {
		err := c.readHead(req, false)
		if e := (*Error)(nil); err != nil && !errors.As(err, &e) {
			return // e.g., it has been closed
		}
		active.Add(1)
		x := &exchange{c: c, req: req, upload: &body{}, start: now(), code: "NONE", peer: "HIER_NONE/-"}
		x.run(err)
		if active.Add(-1); !x.keep {
			// Closed at once, with bytes unread, it would be reset, and the answer lost (RFC 9112 §9.6).
			c.Conn.(*net.TCPConn).CloseWrite()
			c.SetDeadline(time.Now().Add(2 * time.Second))
			io.Copy(io.Discard, io.LimitReader(c.Conn, 1<<20))
			return
		}
	}
}

// An exchange is a request and its answer.
type exchange struct {
	c          *Conn // nil where nobody waits for the answer
	req        *Head
	upload     *body // the request's
	start      time.Time
	us, origin string // host:port in Host, and that is asked
	path, url  string // what is asked for; url, without its scheme, is the key in the cache
	generation string // of what is stored for the URL
	direct     bool   // we are asked as a server
	keep       bool   // the connection is good for another request
	code, peer string // the outcome and who was asked, in the words of Squid's log
	why        string // the outcome in those of Cache-Status
	status     int    // of the answer, and how many bytes of what type were sent
	sent       int64
	kind       string
}

// run makes the answer, be it what went wrong on the way, sends and logs it.
func (x *exchange) run(err error) {
	r := (*Response)(nil)
	if err == nil {
		r, err = x.answer()
	}
	if e := (&Error{Status: 502}); err != nil {
		if !errors.As(err, &e) {
			e.Text = err.Error()
		}
		x.why, x.keep = "", x.keep && !slices.Contains([]int{400, 408, 414, 431, 501, 505}, e.Status)
		r = page(e.Status, "text/plain; charset=utf-8", e.Text+"\n")
	}
	if r != nil {
		if x.send(r) != nil {
			x.code, x.keep = x.code+"_ABORTED", false
		}
		r.Close()
	}
	x.log()
}

// page is an answer made here.
func page(status int, kind, text string) *Response {
	h := &Head{[3]string{"HTTP/1.1", strconv.Itoa(status), reasons[status]}, status, []Field{{"Content-Type", kind}}}
	if challenge := map[int]string{401: "WWW-Authenticate", 407: "Proxy-Authenticate"}[status]; challenge != "" {
		h.Set(challenge, `Basic realm="proxy"`)
	}
	return &Response{Head: h, ReadCloser: content{strings.NewReader(text)}, size: int64(len(text))}
}

type content struct{ *strings.Reader }

func (content) Close() error { return nil }

var reasons = map[int]string{200: "OK", 206: "Partial Content", 304: "Not Modified", 400: "Bad Request",
	401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 407: "Proxy Authentication Required",
	408: "Request Timeout", 414: "URI Too Long", 416: "Range Not Satisfiable", 417: "Expectation Failed",
	431: "Request Header Fields Too Large", 501: "Not Implemented", 502: "Bad Gateway",
	504: "Gateway Timeout", 505: "HTTP Version Not Supported", 508: "Loop Detected"}

// answer lives the life of a request:
//  1. where its body ends and what it asks for, refused where that can be read in two ways
//  2. who may ask, and for what
//  3. CONNECT is a tunnel; a request that has been here before ends
//  4. asked as a server: a page, a file, or /host/path
//  5. what is stored answers, or a download under way
//  6. else the origin does
func (x *exchange) answer() (*Response, error) {
	req, method := x.req, x.req.Line[0]
	kind, err := req.framing(false)
	x.upload, x.keep = newBody(x.c, kind), req.keepAlive()
	for _, step := range []func() error{x.target, x.permit, x.permitOrigin} {
		if err == nil {
			err = step()
		}
	}
	if err != nil {
		return nil, err
	}
	if method == "CONNECT" {
		return nil, x.tunnel()
	}
	hops, limited := digits(req.Get("Max-Forwards"))
	limited = limited && (method == "TRACE" || method == "OPTIONS") // RFC 9110 §7.6.2
	expect := req.Get("Expect")
	switch {
	case slices.ContainsFunc(req.list("Via"), func(via string) bool { return strings.HasSuffix(via, " "+name) }):
		return nil, refuse(508, "this request has been here before")
	case expect != "" && !strings.EqualFold(expect, "100-continue"):
		return nil, refuse(417, "expectation %.200q is not supported", expect)
	case kind == chunked && expect == "": // with a bad first chunk nothing at all is sent on
		if err := x.upload.nextChunk(); err != nil {
			return nil, err
		}
	case limited && hops == 0 && method == "OPTIONS":
		return page(200, "text/plain", ""), nil
	case limited && hops == 0:
		req.Del("Authorization", "Cookie", "Proxy-Authorization")
		return page(200, "message/http", string(req.appendTo(nil))), nil
	case limited:
		req.Set("Max-Forwards", strconv.FormatInt(hops-1, 10))
	}
	if req.endToEnd(); x.direct {
		if r, err := x.local(); r != nil || err != nil {
			return r, err
		}
	}
	x.code = "TCP_MISS"
	if method != "GET" && method != "HEAD" {
		return x.fetch(nil, nil, "method")
	} else if kind != 0 || req.Get("If-Match") != "" || req.Get("If-Unmodified-Since") != "" {
		return x.fetch(nil, nil, "bypass")
	}
	return x.cached()
}

// target reads what is asked for from the request target, in its four forms, and Host (RFC 9112 §3.2).
func (x *exchange) target() (err error) {
	hosts, target := x.req.list("Host"), x.req.Line[1]
	if len(hosts) > 1 || len(hosts) == 0 && !x.req.old() {
		return refuse(400, "%d hosts in Host, there must be one", len(hosts))
	} else if len(hosts) == 1 {
		x.us, err = authority(hosts[0])
	}
	switch {
	case err != nil:
		return err
	case x.req.Line[0] == "CONNECT":
		if x.origin, err = authority(target); err == nil && !strings.HasSuffix(target, ":"+portOf(x.origin)) {
			err = refuse(400, "%.200q has no port", target)
		}
		return err
	case target[0] == '/' || target == "*" && x.req.Line[0] == "OPTIONS":
		x.path, x.direct = target, true
		return nil
	case len(target) > 7 && strings.EqualFold(target[:7], "http://") && !strings.Contains(target, "#"):
		return x.setURL(target[7:])
	}
	return refuse(400, "%.200q is not a http:// URL", target)
}

// setURL takes a URL without its scheme apart.
func (x *exchange) setURL(url string) (err error) {
	end := min(len(url), strings.IndexAny(url+"/", "/?"))
	x.origin, err = authority(url[:end])
	if x.path = url[end:]; x.path == "" && x.req.Line[0] == "OPTIONS" {
		x.path = "*"
	} else if !strings.HasPrefix(x.path, "/") {
		x.path = "/" + x.path
	}
	x.url = strings.TrimSuffix(x.origin, ":80") + x.path
	return err
}

// permit decides who may ask.
func (x *exchange) permit() error {
	field, status, client := "Proxy-Authorization", 407, x.c.RemoteAddr().String()
	if x.direct {
		field, status = "Authorization", 401
	}
	scheme, token, _ := strings.Cut(x.req.Get(field), " ")
	want := base64.StdEncoding.EncodeToString([]byte(*auth))
	known := strings.EqualFold(scheme, "Basic") && subtle.ConstantTimeCompare([]byte(token), []byte(want)) == 1
	switch x.code = "TCP_DENIED"; {
	case blocked(client):
		return refuse(403, "clients at %s are refused", client)
	case *auth != "" && !known && x.path != "/proxy.pac":
		return refuse(status, "credentials are needed")
	case *auth != "":
		x.req.Del(field) // it was for us
	}
	x.code = "NONE"
	return nil
}

// permitOrigin decides whether an origin may be asked for. Where addresses are blocked its name is looked up,
// so that this counts for what is stored too; what is dialed in the end goes past control.
func (x *exchange) permitOrigin() error {
	refused := blocked(x.origin)
	if host := hostOf(x.origin); !refused && len(nets) > 0 && host != "" {
		addresses, err := net.LookupHost(host)
		refused = err == nil && !slices.ContainsFunc(addresses, func(a string) bool { return !blocked(a) })
	}
	if refused {
		x.code = "TCP_DENIED"
		return refuse(403, "%s is blocked", x.origin)
	}
	return nil
}

// control refuses to connect to a blocked address, whatever name led there.
func control(_, address string, _ syscall.RawConn) error {
	if blocked(address) {
		return refuse(403, "%s is blocked", address)
	}
	return nil
}

// blocked tells whether a host, a name or an address, with a port or without, is on the list.
func blocked(host string) bool {
	host = strings.TrimRight(hostOf(host), ".")
	if ip, err := netip.ParseAddr(host); err == nil {
		return slices.ContainsFunc(nets, func(n netip.Prefix) bool { return n.Contains(ip.Unmap().WithZone("")) })
	}
	return slices.ContainsFunc(domains, func(d string) bool { return strings.HasSuffix("."+host, "."+d) })
}

func hostOf(address string) string {
	if host, _, err := net.SplitHostPort(address); err == nil {
		return host
	}
	return address
}

func portOf(address string) string { return address[strings.LastIndexByte(address, ':')+1:] }

// local answers a request to the proxy itself, or turns it into one to the origin that its path begins with.
// Only if Host names us: else a page elsewhere could read answers that are meant for this machine, under a
// name of its own that leads here (DNS rebinding).
func (x *exchange) local() (*Response, error) {
	host, ours := hostOf(x.us), x.c.LocalAddr().String()
	ip, _ := netip.ParseAddr(host)
	if portOf(x.us) != portOf(ours) || host != "localhost" && !ip.IsLoopback() && host != hostOf(ours) {
		return nil, refuse(403, "%q is not this proxy", x.us)
	}
	switch name, _, _ := strings.Cut(x.path, "?"); name {
	case "*":
		return page(200, "text/plain", ""), nil
	case "/":
		return page(200, "text/html", fmt.Sprintf("<!DOCTYPE html><title>proxy</title><p>%d requests, %d hits, %d bytes",
			journal.requests, journal.hits, journal.bytes)), nil
	case "/proxy.pac":
		return page(200, "application/x-ns-proxy-autoconfig",
			fmt.Sprintf("function FindProxyForURL(url, host) { return \"PROXY %s\"; }\n", x.us)), nil
	default:
		if r := x.file(name); r != nil {
			return r, nil
		}
	}
	if x.setURL(x.path[1:]) != nil {
		return nil, refuse(404, "neither a file nor a host: %s", x.path)
	}
	return nil, x.permitOrigin()
}

// file answers with a file, to this machine only, and with none that is hidden.
func (x *exchange) file(name string) *Response {
	name, err := strconv.Unquote(`"` + strings.ReplaceAll(name, "%", `\x`) + `"`)
	client := netip.MustParseAddrPort(x.c.RemoteAddr().String()).Addr()
	if err != nil || *files == "" || !client.Unmap().IsLoopback() || strings.Contains(name, "/.") {
		return nil
	}
	root, err := os.OpenRoot(*files)
	if err != nil {
		return nil
	}
	defer root.Close()
	f, err := root.Open(name[1:])
	if err != nil {
		return nil
	}
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil
	}
	r := page(200, cmp.Or(mime.TypeByExtension(path.Ext(name)), "application/octet-stream"), "")
	r.Set("Last-Modified", info.ModTime().UTC().Format(dateFormat))
	r.ReadCloser, r.size = f, info.Size()
	return r
}

// cached answers from the store where it may (RFC 9111 §4) or from a download under way; else it asks.
func (x *exchange) cached() (*Response, error) {
	r, key, generation := cache.lookup(x.url, x.req)
	x.generation = generation
	for {
		why, behind := "uri-miss", false
		if r != nil {
			why, behind = r.judge(x.req)
		} else if key != x.url {
			why = "vary-miss"
		}
		if behind {
			go (&exchange{req: x.req.Clone(), upload: &body{}, origin: x.origin, path: x.path, url: x.url}).refresh(key)
		}
		switch {
		case why == "":
			x.code, x.why = "TCP_HIT", fmt.Sprintf("hit; ttl=%d", r.born+r.life-now().Unix())
			return r, nil
		case x.req.is("only-if-cached"):
			return nil, refuse(504, "%s is not in the cache", x.url)
		case x.req.Line[0] == "HEAD" || r == nil && !cache.due(x.url):
			return x.fetch(r, nil, why)
		}
		d, leads := cache.join(key)
		if leads {
			return x.fetch(r, d, why)
		}
		<-d.ready
		joined := d.answer()
		same := d.shared && joined.selectedBy(x.req)
		if d.shared && !same { // it varies, as is known only now
			key, x.generation = joined.variant(x.url, x.req), joined.generation()
			joined.Close()
			continue
		}
		if same {
			if not, _ := joined.judge(x.req); not == "" {
				x.code, x.why = "TCP_HIT", "fwd="+why+"; collapsed"
				return joined, nil
			}
		}
		joined.Close()
		return x.fetch(r, nil, why)
	}
}

// refresh validates behind its back what has just been served stale, once however many ask.
func (x *exchange) refresh(key string) {
	d, leads := cache.join(key)
	if !leads {
		d.answer().Close()
		return
	}
	x.req.Del("If-None-Match", "If-Modified-Since", "Range", "If-Range")
	stored, _, generation := cache.lookup(x.url, x.req)
	x.generation = generation
	if r, err := x.fetch(stored, d, "stale"); err == nil {
		io.Copy(io.Discard, r)
		r.Close()
	}
}

// outgoing is the request as the origin gets it. It asks whether what is stored is still good, in the place
// of what the client asks (RFC 9111 §4.3.1); validates tells that it does.
func (x *exchange) outgoing(stored *Response) (h *Head, validates bool) {
	h = x.req.Clone()
	h.Line = [3]string{x.req.Line[0], x.path, "HTTP/1.1"}
	h.Del("Host", "Content-Length")
	h.Fields = append(slices.Insert(h.Fields, 0, Field{"Host", strings.TrimSuffix(x.origin, ":80")}), via(x.req))
	if x.upload.kind == chunked {
		h.Set("Transfer-Encoding", "chunked")
	} else if x.upload.kind > 0 || x.req.Get("Content-Length") != "" || x.upload.begun {
		h.Set("Content-Length", strconv.FormatInt(x.upload.kind, 10))
	}
	if stored == nil || h.Line[0] != "GET" || cmp.Or(stored.Get("ETag"), stored.Get("Last-Modified")) == "" {
		return h, false
	}
	h.Del("If-None-Match", "If-Modified-Since")
	for _, f := range []Field{{"If-None-Match", stored.Get("ETag")}, {"If-Modified-Since", stored.Get("Last-Modified")}} {
		if f.Value != "" {
			h.Fields = append(h.Fields, f)
		}
	}
	return h, true
}

// via is what RFC 9110 §7.6.3 has us say of a message.
func via(h *Head) Field {
	if h.old() {
		return Field{"Via", "1.0 " + name}
	}
	return Field{"Via", "1.1 " + name}
}

// fetch asks the origin. With d the answer is stored if it may be. What is stored already is validated, and
// stands in where the origin fails.
func (x *exchange) fetch(stored *Response, d *download, why string) (r *Response, err error) {
	defer func() {
		if d != nil && !d.shared {
			cache.drop(d)
			d.answer().Close()
		}
		if stored != nil && r != stored {
			stored.Close()
		}
	}()
	asked, status := now(), 0
	req, validates := x.outgoing(stored)
	res, b, err := origins.ask(x.origin, req, x.upload, x.interim)
	x.why = "fwd=" + why
	if err == nil {
		status = res.Status
		x.peer = "HIER_DIRECT/" + hostOf(b.c.RemoteAddr().String())
		x.why += fmt.Sprintf("; fwd-status=%d", status)
	}
	if (err != nil || status >= 500) && stored.standsIn(x.req, status) {
		if err == nil {
			b.Close()
		}
		x.code = "TCP_REFRESH_FAIL_OLD"
		return stored, nil
	} else if err != nil {
		return nil, x.originError(err)
	}
	if res.endToEnd(); httpDate(res.Get("Date")) == 0 {
		res.Set("Date", now().UTC().Format(dateFormat)) // RFC 9110 §6.6.1
	}
	r = &Response{Head: res, ReadCloser: b, size: max(b.kind, -1)}
	switch {
	case validates && status == 304:
		b.Close()
		r, stored = stored, nil
		r.update(res)
		x.code = "TCP_REFRESH_UNMODIFIED"
	case validates:
		x.code = "TCP_REFRESH_MODIFIED"
	case why == "request":
		x.code = "TCP_CLIENT_REFRESH_MISS"
	}
	if x.req.Line[0] != "HEAD" && status != 304 {
		res.Del("Content-Length")
	}
	if !isOneOf(x.req.Line[0], "GET", "HEAD", "OPTIONS", "TRACE") && status < 400 { // RFC 9111 §4.4
		cache.invalidate(x.url)
		for _, name := range []string{"Location", "Content-Location"} {
			if reference := strings.TrimPrefix(res.Get(name), "http://"+strings.TrimSuffix(x.origin, ":80")); strings.HasPrefix(reference, "/") {
				cache.invalidate(strings.TrimSuffix(x.origin, ":80") + reference)
			}
		}
	}
	if d != nil {
		if r = cache.store(d, x.url, x.req, r, asked, x.generation); d.shared {
			x.why += "; stored"
		}
	}
	return r, nil
}

func (x *exchange) interim(h *Head) {
	if h.endToEnd(); x.c != nil && !x.req.old() {
		x.c.Write(h.appendTo(nil, via(h)))
	}
}

// originError is what a client is told of an origin that failed.
func (x *exchange) originError(err error) error {
	e, dns, timeout := (*Error)(nil), (*net.DNSError)(nil), net.Error(nil)
	switch {
	case errors.As(x.upload.err, &e): // the request's body was malformed
		return e
	case errors.As(err, &e) && e.Status == 403:
		x.code = "TCP_DENIED"
		return e
	case x.direct && errors.As(err, &dns) && dns.IsNotFound:
		return refuse(404, "neither a file nor a host: %s", x.origin)
	case e != nil && e.Status == 408, errors.As(err, &timeout) && timeout.Timeout():
		return refuse(504, "%s: %v", x.origin, err)
	}
	return refuse(502, "%s: %v", x.origin, err)
}

// send writes an answer, as the request's conditions and range have it where that can be.
func (x *exchange) send(r *Response) error {
	h, status, off, n := r.Head, r.Status, int64(0), r.size
	seeker, seeks := r.ReadCloser.(io.Seeker)
	if seeks && status == 200 {
		if status, off, n = r.span(x.req); r.unchanged(x.req) {
			status, x.code = 304, strings.Replace(x.code, "TCP_HIT", "TCP_IMS_HIT", 1)
		}
		if status != 200 {
			h = &Head{[3]string{"HTTP/1.1", strconv.Itoa(status), reasons[status]}, status, slices.Clone(h.Fields)}
		}
		if status == 206 {
			h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, off+n-1, r.size))
		} else if status == 416 {
			h.Set("Content-Range", fmt.Sprintf("bytes */%d", r.size))
		}
	}
	extra := make([]Field, 0, 8)
	head := x.req.Line[0] == "HEAD"
	switch {
	case status == 204 || status == 304 || head && (n < 0 || !seeks): // nothing, or what the origin said
	case n >= 0:
		extra = append(extra, Field{"Content-Length", strconv.FormatInt(n, 10)})
	case x.req.old():
		x.keep = false
	default:
		extra = append(extra, Field{"Transfer-Encoding", "chunked"})
	}
	if r.req != nil {
		extra = append(extra, Field{"Age", strconv.FormatInt(min(max(0, now().Unix()-r.born), math.MaxInt32), 10)})
	}
	if x.why != "" {
		extra = append(extra, via(r.Head), Field{"Cache-Status", "proxy; " + x.why})
	}
	if x.keep = x.keep && x.upload.finished() && !closing.Load(); !x.keep {
		extra = append(extra, Field{"Connection", "close"})
	} else if x.req.old() {
		extra = append(extra, Field{"Connection", "keep-alive"})
	}
	x.c.out = h.appendTo(x.c.out[:0], extra...)
	x.status, x.kind, x.sent = status, h.Get("Content-Type"), int64(len(x.c.out))
	if head || status == 204 || status == 304 {
		n = 0
	}
	if seeks && n != 0 {
		seeker.Seek(r.off+off, io.SeekStart)
	}
	b, fromOrigin := r.ReadCloser.(*body)
	_, growing := r.ReadCloser.(*tail)
	if 0 < n && n <= 16<<10 && !growing && (!fromOrigin || int64(b.c.r.Buffered()) >= n) { // in one piece
		i := len(x.c.out)
		x.c.out = append(x.c.out, make([]byte, n)...)
		if _, err := io.ReadFull(r, x.c.out[i:]); err != nil {
			return err
		}
		x.sent, n = x.sent+n, 0
	}
	if _, err := x.c.Write(x.c.out); err != nil || n == 0 {
		return err
	}
	if n < 0 && !x.req.old() {
		m, err := io.Copy(chunkWriter{x.c}, r)
		if x.sent += m; err == nil {
			_, err = io.WriteString(x.c, "0\r\n\r\n")
		}
		return err
	}
	if n < 0 {
		n = math.MaxInt64
	}
	for step := int64(1); n > 0 && step > 0; n -= step { // a file goes from the kernel to the kernel
		var err error
		x.c.extend()
		step, err = io.CopyN(x.c.Conn, r.ReadCloser, min(n, 256<<10))
		if x.sent += step; err != nil && (err != io.EOF || n < 1<<62) {
			return noEOF(err)
		}
	}
	return nil
}

// tunnel joins a client and an origin until both have had their say.
func (x *exchange) tunnel() error {
	x.code, x.keep = "TCP_TUNNEL", false
	nc, err := origins.Dial("tcp", x.origin)
	if err != nil {
		return x.originError(err)
	}
	o := newConn(nc)
	defer o.Close()
	x.peer, x.status = "HIER_DIRECT/"+hostOf(o.RemoteAddr().String()), 200
	o.wait, x.c.wait = tunnelWait, tunnelWait
	x.c.renew.Store(0)
	io.WriteString(x.c, "HTTP/1.1 200 Connection established\r\n\r\n")
	done := make(chan int64)
	go func() { done <- pour(o, x.c) }()
	x.sent = pour(x.c, o)
	<-done
	return nil
}

// pour copies what comes on one connection to another, and then that nothing more comes.
func pour(to, from *Conn) int64 {
	ahead, _ := from.r.Peek(from.r.Buffered())
	to.Write(ahead)
	n, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, 16<<10))
	if to.Conn.(*net.TCPConn).CloseWrite(); err != nil {
		to.Conn.Close()
		from.Conn.Close()
	}
	return int64(len(ahead)) + n
}

// log writes a line in Squid's native format, and counts.
func (x *exchange) log() {
	url, t := "error:invalid-request", now()
	if x.req.Line[0] == "CONNECT" {
		url = x.origin
	} else if x.url != "" {
		url = "http://" + x.url
	} else if x.path != "" {
		url = x.path
	}
	kind, _, _ := strings.Cut(x.kind, ";")
	journal.Lock()
	defer journal.Unlock()
	fmt.Fprintf(journal.Writer, "%d.%03d %6d %s %s/%03d %d %s %s - %s %s\n", t.Unix(), t.UnixMilli()%1000,
		t.Sub(x.start).Milliseconds(), hostOf(x.c.RemoteAddr().String()), x.code, x.status, x.sent,
		printable(x.req.Line[0]), printable(url), x.peer, printable(kind))
	journal.requests++
	journal.bytes += x.sent
	if strings.Contains(x.code, "HIT") {
		journal.hits++
	}
}

// printable escapes what could be taken for another field or line of the log.
func printable(s string) string {
	b := []byte(nil)
	for _, c := range []byte(cmp.Or(s, "-")) {
		if c <= ' ' || c > '~' || c == '"' {
			b = fmt.Appendf(b, "%%%02X", c)
		} else {
			b = append(b, c)
		}
	}
	return string(b)
}
