// Proxy is a caching HTTP/1.1 forward proxy.
//
// Usage:
//
//	proxy [flags] [port | host:port]
//
// It listens on 127.0.0.1:8899 if not told otherwise; a bare port keeps to the loopback address,
// ":8899" opens it to the network. Flags may stand before or after:
//
//	-cache dir           where the files are ($CACHE_DIRECTORY, else "cache")
//	-size bytes          most that the cache holds ("1G")
//	-uses n              store a response from the nth GET for its URL within 10 minutes on (1)
//	-ttl duration        how long a response is fresh that says nothing about it (0: ask again)
//	-files dir           files for direct requests from this machine ("."; "" for none)
//	-block list          hosts, domains, addresses, CIDRs refused as destination and as client, or @file
//	-auth user:password  what clients must give, or @file
//
// Requests are logged to stdout in Squid's native format, what concerns the operator to stderr.
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

const (
	stopWait   = 10 * time.Second
	lingerWait = 2 * time.Second // for what a client still sends when it has been refused
	maxLinger  = 1 << 20
	smallBody  = 16 << 10
	sendStep   = 256 << 10 // bytes sent from a file before it counts as progress
)

// A Proxy is what all exchanges share.
type Proxy struct {
	cache   *Cache
	origins *Origins
	name    string         // our pseudonym in Via, drawn at the start
	files   *os.Root       // what direct requests may read, nil for nothing
	auth    string         // the credentials asked for, as Basic encodes them; "" for none
	domains []string       // blocked, with all below them
	nets    []netip.Prefix // blocked
	active  atomic.Int64   // exchanges under way
	closing atomic.Bool

	mu                    sync.Mutex // guards what follows
	out                   *bufio.Writer
	requests, hits, bytes int64
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("proxy: ")
	p, address, err := configure(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	} else if err != nil {
		log.Printf("%v (proxy -h tells more)", err)
		os.Exit(2)
	}
	if err = p.cache.openDir(); err != nil {
		log.Fatalf("cannot use the cache directory: %v", err)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		log.Fatal(err)
	}
	log.Printf("listening on %s, cache in %s", l.Addr(), p.cache.dir)
	go p.cache.tend()
	go p.origins.sweep()
	go p.serve(l)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, os.Interrupt, syscall.SIGTERM)
	<-stop
	p.closing.Store(true)
	l.Close()
	for end := time.Now().Add(stopWait); p.active.Load() > 0 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	p.mu.Lock()
	p.out.Flush()
	log.Printf("%d requests, %d from the cache, %d bytes", p.requests, p.hits, p.bytes)
}

// configure makes a Proxy of the command line, and the address to listen on.
func configure(args []string) (p *Proxy, address string, err error) {
	p = &Proxy{name: "proxy-" + strings.ToLower(rand.Text()[:6]), out: bufio.NewWriterSize(os.Stdout, 64<<10)}
	p.origins = &Origins{control: p.control, idle: map[string][]*Conn{}}
	flags := flag.NewFlagSet("proxy", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	dir := flags.String("cache", cmp.Or(os.Getenv("CACHE_DIRECTORY"), "cache"), "`directory` of the cache")
	size := flags.String("size", "1G", "most `bytes` that the cache holds, as 500M or 10G")
	uses := flags.Int("uses", 1, "store a response from the `n`th GET for its URL within 10 minutes on")
	ttl := flags.Duration("ttl", 0, "how long a response is fresh that says nothing about it")
	files := flags.String("files", ".", "`directory` of files for direct requests, empty for none")
	block := flags.String("block", "", "hosts, domains, addresses, CIDRs refused: a `list` or @file")
	auth := flags.String("auth", "", "`user:password` that clients must give, or @file")
	for err = flags.Parse(args); err == nil && flags.NArg() > 0 && address == ""; err = flags.Parse(args) {
		address, args = flags.Arg(0), flags.Args()[1:]
	}
	if errors.Is(err, flag.ErrHelp) {
		flags.SetOutput(os.Stderr)
		fmt.Fprintln(os.Stderr, "usage: proxy [flags] [port | host:port]")
		flags.PrintDefaults()
	}
	if err == nil && flags.NArg() > 0 {
		err = fmt.Errorf("more than one address: %s", flags.Args())
	}
	if err != nil {
		return nil, "", err
	}
	if address = cmp.Or(address, "8899"); strings.Trim(address, "0123456789") == "" {
		address = "127.0.0.1:" + address
	}
	_, port, err := net.SplitHostPort(address)
	if n, ok := digits(port); err != nil || !ok || n > 65535 {
		return nil, "", fmt.Errorf("%q is neither a port nor host:port", address)
	}
	number := strings.TrimRight(strings.ToUpper(*size), "KMGT")
	unit := int64(1) << (10 * (1 + strings.Index("KMGT", (strings.ToUpper(*size) + "-")[len(number):len(number)+1])))
	limit, ok := digits(number)
	if !ok || len(*size)-len(number) > 1 || limit > math.MaxInt64/unit || *uses < 1 || *ttl < 0 {
		return nil, "", fmt.Errorf("bad -size %s, -uses %d or -ttl %s", *size, *uses, *ttl)
	}
	p.cache = newCache(*dir, limit*unit, int64(ttl.Seconds()), *uses)
	for _, list := range []*string{block, auth} {
		if name, ok := strings.CutPrefix(*list, "@"); ok {
			b, err := os.ReadFile(name)
			if err != nil {
				return nil, "", err
			}
			*list = strings.TrimSpace(string(b))
		}
	}
	if *auth != "" {
		p.auth = base64.StdEncoding.EncodeToString([]byte(*auth))
	}
	for _, entry := range strings.FieldsFunc(*block, func(c rune) bool { return strings.ContainsRune(", \t\r\n", c) }) {
		prefix, err := netip.ParsePrefix(entry)
		ip, notIP := netip.ParseAddr(entry)
		switch {
		case err == nil:
			p.nets = append(p.nets, prefix.Masked())
		case notIP == nil:
			p.nets = append(p.nets, netip.PrefixFrom(ip.Unmap(), ip.Unmap().BitLen()))
		default:
			_, host, err := splitAuthority(strings.Trim(entry, "."))
			if err != nil || strings.Contains(entry, ":") {
				return nil, "", fmt.Errorf("-block: %q is no host, address or CIDR", entry)
			}
			p.domains = append(p.domains, host)
		}
	}
	if *files != "" {
		p.files, err = os.OpenRoot(*files)
	}
	return p, address, err
}

func (p *Proxy) serve(l net.Listener) {
	for {
		nc, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil { // e.g., too many open files
			log.Print(err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		go p.client(newConn(nc))
	}
}

// client answers the requests of one connection, one after another.
func (p *Proxy) client(c *Conn) {
	defer c.Close()
	for req := new(Head); !p.closing.Load(); {
		err := c.readHead(req, false)
		if e := (*Error)(nil); err != nil && !errors.As(err, &e) {
			return // e.g., client disconnected
		}
		p.active.Add(1)
		x := &exchange{p: p, c: c, req: req, start: now(), code: "NONE", peer: "HIER_NONE/-", upload: &body{}}
		x.run(err)
		p.active.Add(-1)
		if !x.keep {
			// To close at once with bytes unread would reset the connection, and the client might
			// lose the answer (RFC 9112 §9.6).
			c.Conn.(*net.TCPConn).CloseWrite()
			c.SetDeadline(time.Now().Add(lingerWait))
			io.Copy(io.Discard, io.LimitReader(c.Conn, maxLinger))
			return
		}
	}
}

// An exchange is one request and its answer.
type exchange struct {
	p      *Proxy
	c      *Conn // nil where nobody waits for the answer
	req    *Head
	upload *body // the request's
	start  time.Time
	host   string // what Host names
	origin string // the authority that is asked
	local  bool   // asked for as /host/path
	url    string // origin and path, the key in the cache
	path   string
	own    []Field // what only this client gets
	keep   bool    // the connection is good for another request
	code   string  // the outcome in the words of Squid's log
	peer   string  // who was asked, likewise
	why    string  // the outcome in those of Cache-Status, "" for none
	status int
	sent   int64
	kind   string // the answer's media type
}

func (x *exchange) run(err error) {
	var r *Response
	if err == nil {
		r, err = x.answer()
	}
	if e := (&Error{502, ""}); err != nil {
		if !errors.As(err, &e) {
			e.Text = err.Error()
		}
		x.why = ""
		x.keep = x.keep && !slices.Contains([]int{400, 408, 414, 431, 501, 505}, e.Status)
		r = page(e.Status, "text/plain; charset=utf-8", e.Text+"\n")
	}
	if r != nil {
		if err := x.send(r); err != nil {
			x.code, x.keep = x.code+"_ABORTED", false
		}
		r.Close()
	}
	x.log()
}

// page is a Response made here.
func page(status int, kind, text string) *Response {
	h := &Head{[3]string{"HTTP/1.1", strconv.Itoa(status), reasons[status]}, status, []Field{{"Content-Type", kind}}}
	switch status {
	case 401:
		h.Set("WWW-Authenticate", `Basic realm="proxy"`)
	case 407:
		h.Set("Proxy-Authenticate", `Basic realm="proxy"`)
	}
	return &Response{Head: h, size: int64(len(text)), mem: []byte(text)}
}

var reasons = map[int]string{200: "OK", 206: "Partial Content", 304: "Not Modified", 400: "Bad Request",
	401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 407: "Proxy Authentication Required",
	408: "Request Timeout", 414: "URI Too Long", 416: "Range Not Satisfiable", 417: "Expectation Failed",
	431: "Request Header Fields Too Large", 501: "Not Implemented", 502: "Bad Gateway",
	504: "Gateway Timeout", 505: "HTTP Version Not Supported", 508: "Loop Detected"}

// answer lives the life of a request:
//  1. where its body ends and what it asks for, refused where that can be read in two ways
//  2. who may ask, and what may be asked for
//  3. CONNECT is a tunnel; a loop ends
//  4. asked as a server: a page, a file, or /host/path
//  5. what is stored answers, or a download under way
//  6. else the origin does
func (x *exchange) answer() (*Response, error) {
	req, method := x.req, x.req.Line[0]
	kind, err := req.framing(false)
	if err != nil {
		return nil, err
	}
	x.upload = newBody(x.c, kind)
	x.keep = req.keepAlive()
	if err := x.target(); err != nil {
		return nil, err
	}
	if err := x.permit(); err != nil {
		return nil, err
	}
	if method == "CONNECT" {
		return nil, x.tunnel()
	}
	if slices.ContainsFunc(req.list("Via"), func(via string) bool { return strings.HasSuffix(via, " "+x.p.name) }) {
		return nil, refuse(508, "this request has been here before")
	}
	if e := req.Get("Expect"); e != "" && !strings.EqualFold(e, "100-continue") {
		return nil, refuse(417, "expectation %.200q is not supported", e)
	} else if e == "" && kind == chunked {
		if err := x.upload.nextChunk(); err != nil { // a bad one here, and nothing is sent on
			return nil, noEOF(err)
		}
	}
	req.endToEnd()
	if x.origin == "" {
		if r, err := x.direct(); r != nil || err != nil {
			return r, err
		}
	}
	if hops, ok := digits(req.Get("Max-Forwards")); ok && (method == "TRACE" || method == "OPTIONS") {
		if hops == 0 {
			return x.lastHop(), nil
		}
		req.Set("Max-Forwards", strconv.FormatInt(hops-1, 10))
	}
	x.code = "TCP_MISS"
	if method != "GET" && method != "HEAD" {
		return x.fetch(nil, nil, "method")
	}
	if kind != 0 || req.Get("If-Match") != "" || req.Get("If-Unmodified-Since") != "" {
		return x.fetch(nil, nil, "bypass")
	}
	return x.cached()
}

// lastHop answers a TRACE or OPTIONS that must not travel on (RFC 9110 §7.6.2).
func (x *exchange) lastHop() *Response {
	if x.req.Line[0] == "OPTIONS" {
		r := page(200, "text/plain", "")
		r.Set("Allow", "GET, HEAD, POST, PUT, DELETE, OPTIONS, TRACE, CONNECT")
		return r
	}
	x.req.Del("Authorization", "Cookie") // RFC 9110 §9.3.8
	return page(200, "message/http", string(x.req.appendTo(nil)))
}

// target reads what is asked for from the request target, in its four forms, and Host (RFC 9112 §3.2).
func (x *exchange) target() (err error) {
	hosts, target := x.req.values("Host"), x.req.Line[1]
	if len(hosts) > 1 || len(hosts) == 0 && !x.req.old() {
		return refuse(400, "%d Host fields, there must be one", len(hosts))
	}
	if len(hosts) == 1 {
		if x.host, _, err = splitAuthority(hosts[0]); err != nil {
			return err
		}
	}
	switch {
	case x.req.Line[0] == "CONNECT":
		x.origin, _, err = splitAuthority(target)
		if x.url = target; err == nil && strings.LastIndexByte(target, ':') <= strings.LastIndexByte(target, ']') {
			err = refuse(400, "CONNECT without a port: %.200q", target)
		}
	case target[0] == '/' || target == "*" && x.req.Line[0] == "OPTIONS":
		x.path = target
	case len(target) > 7 && strings.EqualFold(target[:7], "http://") && !strings.Contains(target, "#"):
		return x.setURL(target[7:])
	default:
		err = refuse(400, "%.200q is not a http:// URL", target)
	}
	return err
}

// setURL takes a URL without its scheme apart.
func (x *exchange) setURL(url string) (err error) {
	end := strings.IndexAny(url+"/", "/?")
	x.origin, _, err = splitAuthority(url[:end])
	if x.path = url[end:]; x.path == "" && x.req.Line[0] == "OPTIONS" {
		x.path = "*"
	} else if x.path == "" || x.path[0] == '?' {
		x.path = "/" + x.path
	}
	x.url = x.origin + x.path
	return err
}

// permit decides who may ask.
func (x *exchange) permit() error {
	p, client := x.p, hostOf(x.c.RemoteAddr())
	field, status := "Proxy-Authorization", 407
	if x.origin == "" {
		field, status = "Authorization", 401
	}
	x.code = "TCP_DENIED"
	if p.isBlocked(client) {
		return refuse(403, "clients at %s are refused", client)
	}
	if p.auth != "" && x.path != "/proxy.pac" {
		scheme, token, _ := strings.Cut(x.req.Get(field), " ")
		if !strings.EqualFold(scheme, "Basic") || subtle.ConstantTimeCompare([]byte(token), []byte(p.auth)) == 0 {
			return refuse(status, "credentials are needed")
		}
		x.req.Del(field) // they were for us
	}
	return x.permitOrigin()
}

// permitOrigin decides whether an origin may be asked. Where addresses are blocked names are looked up
// for it, so that this counts for what is stored too; control looks at what is dialed in the end.
func (x *exchange) permitOrigin() error {
	_, host, _ := splitAuthority(x.origin)
	allowed := !x.p.isBlocked(host)
	if allowed && host != "" && len(x.p.nets) > 0 {
		if addresses, err := net.LookupHost(host); err == nil {
			allowed = slices.ContainsFunc(addresses, func(a string) bool { return !x.p.isBlocked(a) })
		}
	}
	if x.code = "NONE"; !allowed {
		x.code = "TCP_DENIED"
		return refuse(403, "%s is blocked", host)
	}
	return nil
}

// control refuses to connect to blocked addresses, whatever name led there.
func (p *Proxy) control(_, address string, _ syscall.RawConn) error {
	if host, _, _ := net.SplitHostPort(address); p.isBlocked(host) {
		return refuse(403, "%s is blocked", host)
	}
	return nil
}

// isBlocked tells whether a host, a name or an address, is on the list.
func (p *Proxy) isBlocked(host string) bool {
	host = strings.TrimRight(host, ".")
	if ip, err := netip.ParseAddr(host); err == nil {
		ip = ip.Unmap().WithZone("")
		return slices.ContainsFunc(p.nets, func(n netip.Prefix) bool { return n.Contains(ip) })
	}
	return slices.ContainsFunc(p.domains, func(d string) bool { return ("." + host)[max(0, len(host)-len(d)):] == "."+d })
}

func hostOf(a net.Addr) string {
	host, _, _ := net.SplitHostPort(a.String())
	return host
}

// direct answers a request to the proxy itself, or makes of it one to the origin that the path names
// first. Only if Host names us: else a page elsewhere could read answers meant for this machine, with a
// name of its own that leads here (DNS rebinding).
func (x *exchange) direct() (*Response, error) {
	_, host, _ := splitAuthority(x.host)
	_, port, _ := net.SplitHostPort(x.c.LocalAddr().String())
	ip, _ := netip.ParseAddr(host)
	if _, asked, _ := net.SplitHostPort(x.host); port != cmp.Or(asked, "80") ||
		host != "localhost" && !ip.IsLoopback() && host != hostOf(x.c.LocalAddr()) {
		return nil, refuse(403, "%q is not this proxy", x.host)
	}
	name, _, _ := strings.Cut(x.path, "?")
	switch {
	case x.req.Line[0] == "OPTIONS" && name == "*":
		return x.lastHop(), nil
	case name == "/proxy.pac":
		return page(200, "application/x-ns-proxy-autoconfig",
			fmt.Sprintf("function FindProxyForURL(url, host) { return \"PROXY %s; DIRECT\"; }\n", x.host)), nil
	case name == "/":
		return page(200, "text/html; charset=utf-8", x.p.status()), nil
	}
	if r := x.file(name); r != nil {
		return r, nil
	}
	if err := x.setURL(x.path[1:]); err != nil {
		return nil, refuse(404, "no file and no host: %s", name)
	}
	x.local = true
	return nil, x.permitOrigin()
}

// file returns a regular file, to this machine only, and none that is hidden.
func (x *exchange) file(name string) *Response {
	client, _ := netip.ParseAddr(hostOf(x.c.RemoteAddr()))
	name, err := strconv.Unquote(`"` + strings.ReplaceAll(name, "%", `\x`) + `"`) // %20
	if err != nil || x.p.files == nil || !client.Unmap().IsLoopback() || strings.Contains(name, "/.") {
		return nil
	}
	f, err := x.p.files.Open(name[1:])
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
	r.file, r.size, r.total = f, info.Size(), info.Size()
	return r
}

// cached answers from the store where it may (RFC 9111 §4), and from a download under way; else it asks.
func (x *exchange) cached() (*Response, error) {
	cache := x.p.cache
	for {
		r, key := cache.lookup(x.url, x.req)
		why, refresh := "uri-miss", false
		if r != nil {
			why, refresh = r.judge(x.req)
		} else if key != x.url {
			why = "vary-miss"
		}
		if why == "" {
			if refresh {
				behind := &exchange{p: x.p, req: x.req.Clone(), upload: &body{}, origin: x.origin, url: x.url, path: x.path}
				behind.req.Del("If-None-Match", "If-Modified-Since", "Range", "If-Range")
				go behind.refresh(key)
			}
			return x.hit(r), nil
		}
		if x.req.is("only-if-cached") {
			return nil, refuse(504, "%s is not in the cache", x.url)
		}
		if x.req.Line[0] == "HEAD" || r == nil && !cache.due(x.url) {
			return x.fetch(r, nil, why)
		}
		t, leads := cache.join(key)
		if leads {
			return x.fetch(r, t, why)
		}
		<-t.d.ready
		joined := t.response()
		if t.d.shared && t.d.key != key { // it varies, as is known only now
			joined.Close()
			if r != nil {
				r.Close()
			}
			continue
		}
		if t.d.shared {
			if now, _ := joined.judge(x.req); now == "" {
				if r != nil {
					r.Close()
				}
				x.code, x.why = "TCP_HIT", "fwd="+why+"; collapsed"
				return joined, nil
			}
		}
		joined.Close()
		return x.fetch(r, nil, why)
	}
}

// hit takes note that a stored response answers.
func (x *exchange) hit(r *Response) *Response {
	x.code = "TCP_HIT"
	if r.file == nil {
		x.code = "TCP_MEM_HIT"
	}
	x.why = fmt.Sprintf("hit; ttl=%d", r.born+r.life-now().Unix())
	return r
}

// refresh revalidates behind its back what has just been served stale, once however many ask.
func (x *exchange) refresh(key string) {
	t, leads := x.p.cache.join(key)
	if !leads {
		t.leave()
		return
	}
	stale, _ := x.p.cache.lookup(x.url, x.req)
	if r, err := x.fetch(stale, t, "stale"); err == nil {
		io.Copy(io.Discard, r.reader(0, r.size))
		r.Close()
	}
}

// outgoing is the request as the origin gets it. With a stored response it asks whether that is still
// good, in the place of what the client asks (RFC 9111 §4.3.1), and conditional tells that it does.
func (x *exchange) outgoing(stored *Response) (h *Head, conditional bool) {
	h = &Head{[3]string{x.req.Line[0], x.path, "HTTP/1.1"}, 0, append([]Field{{"Host", x.origin}}, x.req.Fields...)}
	h.Fields = append(h.Fields[:1], slices.DeleteFunc(h.Fields[1:], func(f Field) bool {
		return isOneOf(f.Name, "Host", "Content-Length")
	})...)
	if x.upload.kind == chunked {
		h.Set("Transfer-Encoding", "chunked")
	} else if x.upload.kind > 0 || x.req.Get("Content-Length") != "" || x.upload.inside {
		h.Set("Content-Length", strconv.FormatInt(x.upload.kind, 10))
	}
	h.Fields = append(h.Fields, x.via(x.req))
	if stored == nil || stored.Status != 200 || h.Line[0] != "GET" {
		return h, false
	}
	etag, changed := stored.Get("ETag"), stored.Get("Last-Modified")
	if etag != "" || changed != "" {
		h.Del("If-None-Match", "If-Modified-Since")
	}
	if etag != "" {
		h.Set("If-None-Match", etag)
	}
	if changed != "" {
		h.Set("If-Modified-Since", changed)
	}
	return h, etag != "" || changed != ""
}

// fetch asks the origin. With t the answer is stored if it may be. What is stored already is validated
// where the origin can tell, and stands in where the origin fails.
func (x *exchange) fetch(stored *Response, t *tail, why string) (r *Response, err error) {
	cache, asked := x.p.cache, now()
	defer func() {
		if t != nil && (r == nil || r.tail != t) {
			cache.drop(t.d)
			t.leave()
		}
		if stored != nil && r != stored {
			stored.Close()
		}
	}()
	req, conditional := x.outgoing(stored)
	res, b, err := x.p.origins.ask(x.origin, req, x.upload, x.interim)
	x.why = "fwd=" + why
	if err != nil {
		x.keep = x.keep && x.upload.kind == 0
		if stored.standsIn(x.req, 0) {
			x.code, x.why = "TCP_REFRESH_FAIL_OLD", x.why+"; detail=origin-failed"
			return stored, nil
		}
		return nil, x.originError(err)
	}
	x.peer = "HIER_DIRECT/" + hostOf(b.c.RemoteAddr())
	x.why += fmt.Sprintf("; fwd-status=%d", res.Status)
	res.endToEnd()
	if httpDate(res.Get("Date")) == 0 {
		res.Set("Date", now().UTC().Format(dateFormat)) // RFC 9110 §6.6.1
	}
	size := max(b.kind, -1)
	switch {
	case stored.standsIn(x.req, res.Status):
		b.Close()
		x.code = "TCP_REFRESH_FAIL_OLD"
		return stored, nil
	case conditional && res.Status == 304:
		b.Close()
		x.code = "TCP_REFRESH_UNMODIFIED"
		fresh := *stored
		fresh.Head, stored = stored.update(res), nil
		fresh.assess(cache.ttl)
		if t != nil {
			if x.own, err = cache.store(t.d, x.url, x.req, fresh.Head, fresh.size, asked, again{fresh.reader(0, fresh.size), &fresh}); err == nil {
				return t.response(), nil
			}
		}
		return &fresh, nil
	case conditional:
		x.code = "TCP_REFRESH_MODIFIED"
	case why == "request":
		x.code = "TCP_CLIENT_REFRESH_MISS"
	}
	asks := x.req
	if !isOneOf(x.req.Line[0], "GET", "HEAD", "OPTIONS", "TRACE") && res.Status < 400 {
		x.invalidate(res)
		if _, explicit := res.lifetime(0, 0); x.req.Line[0] == "POST" && res.Status == 200 && explicit &&
			x.resolve(res.Get("Content-Location")) == x.url { // RFC 9110 §9.3.3: good for a GET
			asks = x.req.Clone()
			asks.Line[0] = "GET"
			var leads bool
			if t, leads = cache.join(x.url); !leads {
				t.leave()
				t = nil
			}
		}
	}
	if x.req.Line[0] != "HEAD" && res.Status != 304 {
		res.Del("Content-Length")
	}
	if t != nil {
		if x.own, err = cache.store(t.d, x.url, asks, res, size, asked, b); err == nil {
			x.why += "; stored"
			return t.response(), nil
		}
	}
	return &Response{Head: res, size: size, body: b}, nil
}

// unsafe forgets what an unsafe request has changed (RFC 9111 §4.4): its URL, and those that the answer
// names at the same origin.
func (x *exchange) invalidate(res *Head) {
	x.p.cache.invalidate(x.url)
	for _, name := range []string{"Location", "Content-Location"} {
		if url := x.resolve(res.Get(name)); strings.HasPrefix(url, x.origin+"/") {
			x.p.cache.invalidate(url)
		}
	}
}

// resolve makes a reference in an answer a URL without scheme.
func (x *exchange) resolve(reference string) string {
	here, _, _ := strings.Cut(x.path, "?")
	reference, _, _ = strings.Cut(reference, "#")
	switch {
	case len(reference) > 7 && strings.EqualFold(reference[:7], "http://"):
		there := &exchange{req: x.req}
		there.setURL(reference[7:])
		return there.url
	case strings.HasPrefix(reference, "/"):
		return x.origin + reference
	}
	return x.origin + path.Join(path.Dir(here), reference)
}

func (x *exchange) interim(h *Head) {
	if h.endToEnd(); x.c != nil && !x.req.old() {
		x.c.Write(h.appendTo(nil, x.via(h)))
	}
}

func (x *exchange) originError(err error) error {
	var e *Error
	var dns *net.DNSError
	var timeout net.Error
	errors.As(err, &e)
	switch {
	case errors.As(x.upload.err, &e):
		return e // the request's body is malformed
	case e != nil && e.Status == 403:
		x.code = "TCP_DENIED"
		return e
	case x.local && errors.As(err, &dns) && dns.IsNotFound:
		return refuse(404, "no file and no host: %s", x.origin)
	case e != nil && e.Status == 408 || errors.As(err, &timeout) && timeout.Timeout():
		return refuse(504, "%s: %v", x.origin, err)
	}
	return refuse(502, "%s: %v", x.origin, err)
}

// send writes an answer: as the request's conditions and range have it where the body can be read from
// anywhere, in one piece where it is small and there.
func (x *exchange) send(r *Response) error {
	head, off, n, status := r.Head, int64(0), r.size, r.Status
	if r.body == nil && (status == 200 || status == 206) {
		if status, off, n = r.span(x.req); r.condition(x.req) {
			status, x.code = 304, strings.Replace(strings.Replace(x.code, "MEM_HIT", "HIT", 1), "TCP_HIT", "TCP_IMS_HIT", 1)
		}
		if status != 200 {
			head = &Head{[3]string{"HTTP/1.1", strconv.Itoa(status), reasons[status]}, status, slices.Clone(head.Fields)}
		}
		if status == 206 && n >= 0 {
			head.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", r.first+off, r.first+off+n-1, r.total))
		} else if status == 416 {
			head.Set("Content-Range", fmt.Sprintf("bytes */%d", r.total))
		}
	}
	bodiless := x.req.Line[0] == "HEAD" || status == 204 || status == 304
	extra := append(make([]Field, 0, 8), x.own...)
	switch {
	case status == 204 || status == 304 || n < 0 && bodiless || x.req.Line[0] == "HEAD" && r.body != nil:
	case n >= 0:
		extra = append(extra, Field{"Content-Length", strconv.FormatInt(n, 10)})
	case x.req.old():
		x.keep = false
	default:
		extra = append(extra, Field{"Transfer-Encoding", "chunked"})
	}
	if r.req != nil {
		age := min(max(0, now().Unix()-r.born), math.MaxInt32)
		extra = append(extra, Field{"Age", strconv.FormatInt(age, 10)})
	}
	if x.why != "" {
		extra = append(extra, x.via(r.Head), Field{"Cache-Status", "proxy; " + x.why})
	}
	if x.keep = x.keep && x.upload.finished() && !x.p.closing.Load(); !x.keep {
		extra = append(extra, Field{"Connection", "close"})
	} else if x.req.old() {
		extra = append(extra, Field{"Connection", "keep-alive"})
	}
	c := x.c
	c.out = head.appendTo(c.out[:0], extra...)
	x.status, x.kind = status, head.Get("Content-Type")
	if bodiless {
		n = 0
	}
	var body io.Reader
	if n != 0 {
		body = r.reader(off, n)
	}
	heads := len(c.out)
	if n > 0 && n <= smallBody && (r.body == nil && r.tail == nil || r.body != nil && r.body.c.r.Buffered() >= int(n)) {
		c.out = append(c.out, make([]byte, n)...)
		if _, err := io.ReadFull(body, c.out[heads:]); err != nil {
			return err
		}
		n = 0
	}
	x.sent = int64(len(c.out))
	if _, err := c.Write(c.out); err != nil || n == 0 {
		return err
	}
	if n < 0 && !x.req.old() {
		m, err := io.Copy(chunkWriter{c}, body)
		if x.sent += m; err == nil {
			_, err = c.Write([]byte("0\r\n\r\n"))
		}
		return err
	}
	var m int64
	var err error
	for step := n; r.file != nil && m < n && err == nil && step > 0; m += step { // the kernel copies
		c.extend()
		step, err = io.Copy(c.Conn, &io.LimitedReader{R: r.file, N: min(n-m, sendStep)})
	}
	if r.file == nil {
		m, err = io.Copy(c, body)
	}
	if x.sent += m; err == nil && n > 0 && m < n {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// tunnel joins a client and an origin until both have had their say.
func (x *exchange) tunnel() error {
	x.code, x.keep = "TCP_TUNNEL", false
	o, err := x.p.origins.get(x.origin, false)
	if err != nil {
		return x.originError(err)
	}
	defer o.Close()
	x.peer, x.status = "HIER_DIRECT/"+hostOf(o.RemoteAddr()), 200
	x.c.wait, o.wait = tunnelWait, tunnelWait
	x.c.renew.Store(0)
	o.renew.Store(0)
	if _, err := io.WriteString(x.c, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return nil
	}
	done := make(chan bool)
	go func() {
		x.c.pour(o)
		close(done)
	}()
	x.sent = o.pour(x.c)
	<-done
	return nil
}

// pour copies all that comes from c to another connection, and then that nothing more will come.
func (c *Conn) pour(to *Conn) int64 {
	ahead, _ := c.r.Peek(c.r.Buffered())
	to.Write(ahead)
	n, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{c}, make([]byte, 16<<10))
	if to.Conn.(*net.TCPConn).CloseWrite(); err != nil {
		c.Conn.Close()
		to.Conn.Close()
	}
	return int64(len(ahead)) + n
}

// log writes a line in Squid's native format, and counts.
func (x *exchange) log() {
	p, t := x.p, now()
	url := "error:invalid-request"
	switch {
	case x.url != "" && x.req.Line[0] != "CONNECT":
		url = "http://" + x.url
	case x.path != "" || x.url != "":
		url = x.path + x.url
	}
	kind, _, _ := strings.Cut(x.kind, ";")
	method := x.req.Line[0]
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.out.Buffered() == 0 {
		time.AfterFunc(100*time.Millisecond, p.flush)
	}
	fmt.Fprintf(p.out, "%d.%03d %6d %s %s/%03d %d %s %s - %s %s\n", t.Unix(), t.UnixMilli()%1000,
		t.Sub(x.start).Milliseconds(), hostOf(x.c.RemoteAddr()), x.code, x.status, x.sent,
		printable(method), printable(url), x.peer, printable(kind))
	p.requests++
	p.bytes += x.sent
	if strings.Contains(x.code, "HIT") {
		p.hits++
	}
}

func (p *Proxy) flush() {
	p.mu.Lock()
	p.out.Flush()
	p.mu.Unlock()
}

// printable escapes what could look like something else in a log: a second field or line, a quote.
func printable(s string) string {
	var b strings.Builder
	for _, c := range []byte(cmp.Or(s, "-")) {
		if c <= ' ' || c > '~' || c == '"' {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// status is the page about what has been done.
func (p *Proxy) status() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Sprintf("<!DOCTYPE html><title>proxy</title><p>%d requests, %d hits, %d bytes", p.requests, p.hits, p.bytes)
}

// via is what RFC 9110 §7.6.3 has us say of a message.
func (x *exchange) via(h *Head) Field {
	if h.old() {
		return Field{"Via", "1.0 " + x.p.name}
	}
	return Field{"Via", "1.1 " + x.p.name}
}
