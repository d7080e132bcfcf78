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
	"mime"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
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
	journal struct { // the access log, and what it counts
		sync.Mutex
		*bufio.Writer
		requests, hits, bytes int64
	}
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("proxy: ")
	journal.Writer = bufio.NewWriterSize(os.Stdout, 64<<10)
	address := configure()
	os.MkdirAll(*dir, 0o700)
	probe, err := os.CreateTemp(*dir, temporary)
	insist(err == nil, 1, "cannot use the cache directory: %v", err)
	probe.Close()
	os.Remove(probe.Name())
	l, err := net.Listen("tcp", address)
	insist(err == nil, 1, "%v", err)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, os.Interrupt, syscall.SIGTERM)
	log.Printf("listening on %s, cache in %s", l.Addr(), *dir)
	go cache.trim()
	go func() {
		for !closing.Load() {
			if nc, err := l.Accept(); err == nil {
				go client(newConn(nc))
			} else if !closing.Load() { // e.g., too many open files
				log.Print(err)
				time.Sleep(100 * time.Millisecond)
			}
		}
	}()
	for end := time.Now(); !closing.Load() || active.Load() > 0 && time.Now().Before(end); totals() {
		select {
		case <-stop: // exchanges under way have ten seconds more
			closing.Store(true)
			end = time.Now().Add(10 * time.Second)
			l.Close()
		case <-time.After(100 * time.Millisecond):
		}
	}
	log.Print(totals())
}

// totals writes the log out, and returns what it counts.
func totals() string {
	journal.Lock()
	defer journal.Unlock()
	journal.Flush()
	return fmt.Sprintf("%d requests, %d hits, %d bytes", journal.requests, journal.hits, journal.bytes)
}

// insist ends the program where something is not ok, with status 2 if the command line is to blame.
func insist(ok bool, status int, format string, args ...any) {
	if !ok {
		log.Printf(format+choose(status == 2, "; proxy -h tells more", ""), args...)
		os.Exit(status)
	}
}

// configure reads the command line, and returns the address to listen on.
func configure() (address string) {
	help := new(strings.Builder)
	flag.CommandLine.Init("proxy", flag.ContinueOnError)
	flag.CommandLine.SetOutput(help)
	flag.Usage = flag.PrintDefaults
	err := flag.CommandLine.Parse(os.Args[1:])
	for ; err == nil && flag.NArg() > 0; err = flag.CommandLine.Parse(flag.Args()[1:]) {
		insist(address == "", 2, "two addresses, %s and %s", address, flag.Arg(0))
		address = flag.Arg(0)
	}
	insist(!errors.Is(err, flag.ErrHelp), 0, "usage: proxy [flags] [port | host:port]\n%s", help)
	insist(err == nil, 2, "%v", err)
	address = cmp.Or(address, "8899")
	address = choose(strings.Trim(address, "0123456789") == "", "127.0.0.1:", "") + address
	_, port, err := net.SplitHostPort(address)
	n, ok := digits(port)
	insist(err == nil && ok && n < 65536, 2, "%q is neither a port nor host:port", address)
	number := strings.TrimRight(strings.ToUpper(*size), "KMGT")
	shift := 10 * strings.Index(" KMGT", strings.ToUpper(*size)[len(number):])
	n, ok = digits(number)
	insist(ok && shift >= 0 && n<<shift>>shift == n, 2, "-size %s is no number of bytes", *size)
	insist(*uses > 0 && *ttl >= 0, 2, "-uses %d or -ttl %v makes no sense", *uses, *ttl)
	cache.dir, cache.limit, cache.ttl, cache.uses = *dir, n<<shift, int64(ttl.Seconds()), *uses
	for _, text := range []*string{block, auth} {
		if file, ok := strings.CutPrefix(*text, "@"); ok {
			b, err := os.ReadFile(file)
			insist(err == nil, 2, "%v", err)
			*text = strings.TrimSpace(string(b))
		}
	}
	*auth = base64.StdEncoding.EncodeToString([]byte(*auth)) // as Basic has it
	for _, entry := range strings.FieldsFunc(*block, func(c rune) bool { return c <= ' ' || c == ',' }) {
		prefix, err := netip.ParsePrefix(entry)
		ip, err2 := netip.ParseAddr(strings.Trim(entry, "[]"))
		host, err3 := authority(strings.Trim(entry, "."))
		if err == nil && prefix.Addr().Is4In6() && prefix.Bits() >= 96 {
			prefix = netip.PrefixFrom(prefix.Addr().Unmap(), prefix.Bits()-96)
		}
		if err == nil || err2 == nil {
			nets = append(nets, choose(err == nil, prefix, netip.PrefixFrom(ip.Unmap(), ip.Unmap().BitLen())))
			continue
		}
		insist(err3 == nil && !strings.Contains(entry, ":"), 2, "-block: %q is no host or CIDR", entry)
		domains = append(domains, strings.TrimSuffix(host, ":80"))
	}
	return address
}

// client answers the requests of one connection, one after another.
func client(c *Conn) {
	defer c.Close()
	for req, keep := new(Head), true; keep && !closing.Load(); {
		err := c.readHead(req, false)
		if e := (*Error)(nil); err != nil && !errors.As(err, &e) {
			return // e.g., it has been closed
		}
		active.Add(1)
		x := &exchange{c: c, req: req, upload: &body{}, start: now(), code: "NONE", peer: "HIER_NONE/-"}
		if r := x.try(func() *Response { orFail(err); return x.answer() }); r != nil {
			if x.send(r) != nil {
				x.code, x.keep = x.code+"_ABORTED", false
			}
			r.Close()
		}
		x.log()
		keep = x.keep
		active.Add(-1)
	}
	// Closed at once, with bytes unread, it would be reset, and the answer lost (RFC 9112 §9.6).
	c.Conn.(*net.TCPConn).CloseWrite()
	c.SetDeadline(time.Now().Add(2 * time.Second))
	io.Copy(io.Discard, io.LimitReader(c.Conn, 1<<20))
}

// An exchange is a request and its answer. It asks origin, host:port, for path; url, both without a scheme,
// is the key in the cache, generation that of what is stored there. The outcome is code and peer in the words
// of Squid's log, why in those of Cache-Status; the answer was sent bytes of a kind.
type exchange struct {
	c                                                    *Conn // nil where nobody waits for the answer
	req                                                  *Head
	upload                                               *body // the request's
	start                                                time.Time
	origin, path, url, generation, code, peer, why, kind string
	keep                                                 bool // the connection is good for another request
	status                                               int
	sent                                                 int64
}

// A failure ends an exchange: must and orFail panic with it, try makes an answer of it.
type failure struct{ error }

func orFail(err error) {
	if err != nil {
		panic(failure{err})
	}
}
func must(ok bool, status int, format string, args ...any) {
	if !ok {
		orFail(refuse(status, format, args...))
	}
}

func (x *exchange) try(step func() *Response) (r *Response) {
	defer func() {
		switch f := recover().(type) {
		case nil:
		case failure:
			e := &Error{502, f.Error()}
			errors.As(f.error, &e)
			x.code = choose(slices.Contains([]int{401, 403, 407}, e.Status), "TCP_DENIED", x.code)
			x.why, r = "", page(e.Status, "text/plain; charset=utf-8", e.Text+"\n")
		default:
			panic(f)
		}
	}()
	return step()
}

// page is an answer made here.
func page(status int, kind, text string) *Response {
	line := [3]string{"HTTP/1.1", strconv.Itoa(status), reasons[status]}
	h := &Head{line, status, []Field{{"Content-Type", kind}}}
	h.setIf(status == 401, "WWW-Authenticate", `Basic realm="proxy"`)
	h.setIf(status == 407, "Proxy-Authenticate", `Basic realm="proxy"`)
	return &Response{Head: h, ReadCloser: io.NopCloser(strings.NewReader(text)), size: int64(len(text))}
}

func (h *Head) setIf(ok bool, name, value string) {
	if ok {
		h.Set(name, value)
	}
}

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
func (x *exchange) answer() *Response {
	req, method, expect := x.req, x.req.Line[0], x.req.Get("Expect")
	kind, err := req.framing(false)
	orFail(err)
	x.target()
	// The connection is closed after what fails above, and after a CONNECT whatever comes of it.
	x.upload, x.keep = newBody(x.c, kind), req.keepAlive() && method != "CONNECT"
	x.permit()
	orFail(control("", x.origin, nil))
	if method == "CONNECT" {
		return x.tunnel()
	}
	again := func(via string) bool { return strings.HasSuffix(via, " "+name) }
	must(!slices.ContainsFunc(req.list("Via"), again), 508, "this request has been here before")
	must(expect == "" || strings.EqualFold(expect, "100-continue"), 417, "no support of %.200q", expect)
	if kind == chunked && expect == "" { // with a bad first chunk nothing at all is sent on
		orFail(x.upload.nextChunk())
	}
	switch hops, limited := digits(req.Get("Max-Forwards")); { // RFC 9110 §7.6.2
	case !limited || method != "TRACE" && method != "OPTIONS":
	case hops > 0:
		req.Set("Max-Forwards", strconv.FormatInt(hops-1, 10))
	case method == "TRACE":
		req.Del("Authorization", "Cookie", "Proxy-Authorization")
		return page(200, "message/http", string(req.appendTo(nil)))
	default:
		return page(200, "text/plain", "")
	}
	req.endToEnd()
	if r := x.local(); r != nil {
		return r
	}
	x.code = "TCP_MISS"
	known := method == "GET" || method == "HEAD"
	if !known || kind != 0 || cmp.Or(req.Get("If-Match"), req.Get("If-Unmodified-Since")) != "" {
		return x.fetch(nil, nil, choose(known, "bypass", "method"))
	}
	return x.cached()
}

// target reads what is asked for from the request target, in its four forms, and Host (RFC 9112 §3.2).
func (x *exchange) target() {
	host, target := strings.Join(x.req.list("Host"), ", "), x.req.Line[1]
	_, err := authority(host)
	must(err == nil || host == "" && x.req.old(), 400, "Host must name one host, not %.200q", host)
	switch {
	case x.req.Line[0] == "CONNECT":
		x.origin, err = authority(target)
		must(err == nil && strings.HasSuffix(target, ":"+portOf(x.origin)), 400, "%.200q has no port", target)
	case target[0] == '/' || target == "*" && x.req.Line[0] == "OPTIONS":
		x.path = target
	default:
		ok := len(target) > 7 && strings.EqualFold(target[:7], "http://") && !strings.Contains(target, "#")
		must(ok && x.setURL(target[7:]) == nil, 400, "%.200q is not a http:// URL", target)
	}
}

// setURL takes a URL without its scheme apart.
func (x *exchange) setURL(url string) (err error) {
	end := strings.IndexAny(url+"/", "/?")
	x.origin, err = authority(url[:end])
	if x.path = url[end:]; !strings.HasPrefix(x.path, "/") {
		x.path = choose(x.path == "" && x.req.Line[0] == "OPTIONS", "*", "/"+x.path)
	}
	x.url = x.host() + x.path
	return err
}

// host is the origin as Host and the cache have it; direct tells whether we are asked as a server.
func (x *exchange) host() string   { return strings.TrimSuffix(x.origin, ":80") }
func (x *exchange) direct() bool   { return strings.IndexAny(x.req.Line[1], "/*") == 0 }
func portOf(address string) string { return address[strings.LastIndexByte(address, ':')+1:] }
func hostOf(address string) string { host, _, _ := net.SplitHostPort(address); return host }

// permit decides who may ask.
func (x *exchange) permit() {
	field, client := choose(x.direct(), "Authorization", "Proxy-Authorization"), x.c.RemoteAddr().String()
	must(!blocked(client), 403, "clients at %s are refused", client)
	if *auth != "" && x.req.Line[1] != "/proxy.pac" {
		scheme, token, _ := strings.Cut(x.req.Get(field), " ")
		same := subtle.ConstantTimeCompare([]byte(token), []byte(*auth)) == 1
		status := choose(x.direct(), 401, 407)
		must(same && strings.EqualFold(scheme, "Basic"), status, "credentials are needed")
		x.req.Del(field) // it was for us
	}
}

// control refuses a blocked origin: before anything is asked, and by the address that is dialed in the end,
// whatever name led there.
func control(_, address string, _ syscall.RawConn) error {
	return choose[error](blocked(address), &Error{403, address + " is blocked"}, nil)
}

// blocked tells whether a host:port is on the list. Where that has addresses names are looked up, so that it
// counts for what is stored too. The unspecified address would lead to this machine.
func blocked(address string) bool {
	host := strings.TrimRight(hostOf(address), ".")
	if ip, err := netip.ParseAddr(host); err == nil {
		ip = ip.Unmap().WithZone("")
		within := func(n netip.Prefix) bool { return n.Contains(ip) }
		return ip.IsUnspecified() || slices.ContainsFunc(nets, within)
	}
	listed := slices.ContainsFunc(domains, func(d string) bool { return strings.HasSuffix("."+host, "."+d) })
	if listed || len(nets) == 0 {
		return listed
	}
	ips, err := net.LookupHost(hostOf(address))
	return err == nil && !slices.ContainsFunc(ips, func(ip string) bool { return !blocked("[" + ip + "]:0") })
}

// local answers a request to the proxy itself, or turns it into one to the origin that its path begins with.
// Only if Host names us: else a page elsewhere could read answers that are meant for this machine, under a
// name of its own that leads here (DNS rebinding).
func (x *exchange) local() *Response {
	if !x.direct() {
		return nil
	}
	ours, hosts := x.c.LocalAddr().String(), strings.Join(x.req.list("Host"), ", ")
	us, _ := authority(hosts)
	ip, _ := netip.ParseAddr(hostOf(us))
	named := hostOf(us) == "localhost" || ip.IsLoopback() || hostOf(us) == hostOf(ours)
	must(named && portOf(us) == portOf(ours), 403, "%q is not this proxy", us)
	name, _, _ := strings.Cut(x.path, "?")
	if name == "*" {
		return page(200, "text/plain", "")
	}
	name = choose(isOneOf(x.req.Line[0], "GET", "HEAD"), name, "") // nothing here can be changed
	switch name {
	case "/":
		return page(200, "text/html", "<!DOCTYPE html><title>proxy</title><p>"+totals())
	case "/proxy.pac":
		return page(200, "application/x-ns-proxy-autoconfig",
			fmt.Sprintf("function FindProxyForURL(url, host) { return \"PROXY %s\"; }\n", us))
	}
	r := (*Response)(nil)
	if name != "" {
		r = x.file(name)
	}
	must(r != nil || x.setURL(x.path[1:]) == nil, 404, "neither a file nor a host: %s", x.path)
	orFail(control("", x.origin, nil))
	return r
}

// file answers with a file, to this machine only, and with none that is hidden.
func (x *exchange) file(name string) *Response {
	escaped := strings.NewReplacer(`\`, `"`, "%", `\x`).Replace(name) // %20 as \x20; a backslash is no escape
	name, err := strconv.Unquote(`"` + escaped + `"`)
	client := netip.MustParseAddrPort(x.c.RemoteAddr().String()).Addr()
	local, path := client.Unmap().IsLoopback() && *files != "", filepath.Join(*files, name)
	inCache := strings.HasPrefix(path, filepath.Clean(*dir)+"/")
	hidden := inCache || strings.Contains(name, "/.")
	info, err2 := os.Stat(path)
	if err == nil && local && !hidden && err2 == nil && info.Mode().IsRegular() { // a pipe would hold us up
		f, _ := os.OpenInRoot(*files, name[1:])
		if info, err := f.Stat(); err == nil {
			kind := mime.TypeByExtension("." + name[strings.LastIndexByte(name, '.')+1:])
			r := page(200, cmp.Or(kind, "application/octet-stream"), "")
			r.Set("Last-Modified", info.ModTime().UTC().Format(dateFormat))
			r.ReadCloser, r.size = f, info.Size()
			return r
		}
		f.Close()
	}
	return nil
}

// cached answers from the store where it may (RFC 9111 §4) or from a download under way; else it asks.
func (x *exchange) cached() *Response {
	r, key, generation := cache.lookup(x.url, x.req)
	why, behind := choose(key == x.url, "uri-miss", "vary-miss"), false
	if r != nil {
		why, behind = r.judge(x.req)
	}
	if behind {
		y := &exchange{req: x.req.Clone(), upload: &body{}, origin: x.origin, path: x.path, url: x.url}
		go y.refresh(key)
	}
	if why == "" {
		return x.hit(r)
	}
	release := func() {
		if r != nil {
			r.Close()
		}
	}
	if x.req.is("only-if-cached") {
		release()
		must(false, 504, "%s is not in the cache", x.url)
	}
	if x.generation = generation; x.req.Line[0] == "HEAD" || r == nil && !cache.due(x.url) {
		return x.fetch(r, nil, why)
	}
	for {
		d, leads := cache.join(key)
		if leads {
			latest, at, _ := cache.lookup(x.url, x.req) // it may have been stored since
			if latest != nil && at == key && why != "request" {
				if not, _ := latest.judge(x.req); not == "" {
					cache.drop(d)
					release()
					return x.hit(latest)
				}
				latest.Close()
			}
			return x.fetch(r, d, why)
		}
		joined, not := d.answer(), "not shared"
		varies := d.shared && !joined.selectedBy(x.req) // as is known only now
		if varies {
			key, x.generation = joined.variant(x.url, x.req), joined.generation()
			why = choose(r == nil, "vary-miss", why)
		} else if d.shared {
			not, _ = joined.judge(x.req)
		}
		if not == "" {
			x.code, x.why = "TCP_HIT", "fwd="+why+"; collapsed"
			release()
			return joined
		} else if joined.Close(); !varies {
			return x.fetch(r, nil, why)
		}
	}
}

func (x *exchange) hit(r *Response) *Response {
	x.code, x.why = "TCP_HIT", fmt.Sprintf("hit; ttl=%d", r.born+r.life-now().Unix())
	return r
}

// refresh validates behind its back what has just been served stale, once however many ask.
func (x *exchange) refresh(key string) {
	d, leads := cache.join(key)
	if !leads {
		d.answer().Close()
		return
	}
	x.req.Line[0] = "GET" // though it was HEAD
	x.req.Del("If-None-Match", "If-Modified-Since", "Range", "If-Range")
	stored, _, generation := cache.lookup(x.url, x.req)
	x.generation = generation
	if stored != nil && stored.born+stored.life > now().Unix() { // another has just done it
		stored.Close()
		cache.drop(d)
		return
	}
	r := x.try(func() *Response { return x.fetch(stored, d, "stale") })
	io.Copy(io.Discard, r)
	r.Close()
}

// outgoing is the request as the origin gets it. It asks whether what is stored is still good, in the place
// of what the client asks (RFC 9111 §4.3.1); validates tells that it does.
func (x *exchange) outgoing(stored *Response) (h *Head, validates bool) {
	h = x.req.Clone()
	h.Line = [3]string{x.req.Line[0], x.path, "HTTP/1.1"}
	h.Del("Host")
	h.Fields = append(slices.Insert(h.Fields, 0, Field{"Host", x.host()}), via(x.req))
	sized := x.upload.kind >= 0 && (h.Get("Content-Length") != "" || x.upload.begun)
	h.setIf(x.upload.kind == chunked, "Transfer-Encoding", "chunked")
	h.setIf(sized, "Content-Length", strconv.FormatInt(x.upload.kind, 10))
	if stored == nil || h.Line[0] != "GET" || cmp.Or(stored.Get("ETag"), stored.Get("Last-Modified")) == "" {
		return h, false
	}
	h.Del("If-None-Match", "If-Modified-Since")
	h.setIf(stored.Get("ETag") != "", "If-None-Match", stored.Get("ETag"))
	h.setIf(stored.Get("Last-Modified") != "", "If-Modified-Since", stored.Get("Last-Modified"))
	return h, true
}

// via is what RFC 9110 §7.6.3 has us say of a message.
func via(h *Head) Field { return Field{"Via", choose(h.old(), "1.0 ", "1.1 ") + name} }

// fetch asks the origin. With d the answer is stored if it may be. What is stored already is validated, and
// stands in where the origin fails.
func (x *exchange) fetch(stored *Response, d *download, why string) (r *Response) {
	defer func() {
		if d != nil && !d.shared {
			cache.drop(d)
		}
		if stored != nil && r != stored {
			stored.Close()
		}
	}()
	asked, status, method := now(), 0, x.req.Line[0]
	req, validates := x.outgoing(stored)
	res, b, err := origins.ask(x.origin, req, x.upload, func(interim *Head) {
		interim.Del("Content-Length")
		if interim.endToEnd(); x.c != nil && !x.req.old() {
			x.c.Write(interim.appendTo(nil, via(interim)))
		}
	})
	if x.why = "fwd=" + why; err == nil {
		status, x.peer = res.Status, "HIER_DIRECT/"+hostOf(b.c.RemoteAddr().String())
		x.why += fmt.Sprintf("; fwd-status=%d", status)
	}
	if stored.standsIn(x.req, status) {
		if x.code = "TCP_REFRESH_FAIL_OLD"; err == nil {
			b.Close()
		}
		return stored
	}
	x.reached(err)
	res.endToEnd()
	res.setIf(httpDate(res.Get("Date")) == 0, "Date", now().UTC().Format(dateFormat)) // RFC 9110 §6.6.1
	r = &Response{Head: res, ReadCloser: b, size: max(b.kind, -1)}
	if x.code = choose(why == "request", "TCP_CLIENT_REFRESH_MISS", x.code); validates && status == 304 {
		b.Close()
		r, stored, x.code = stored, nil, "TCP_REFRESH_UNMODIFIED"
		r.update(res)
	} else if validates {
		x.code = "TCP_REFRESH_MODIFIED"
	}
	if method != "HEAD" && status != 304 {
		res.Del("Content-Length")
	}
	if !isOneOf(method, "GET", "HEAD", "OPTIONS", "TRACE") && status < 400 { // RFC 9111 §4.4
		for _, reference := range []string{x.path, res.Get("Location"), res.Get("Content-Location")} {
			if path := strings.TrimPrefix(reference, "http://"+x.host()); strings.HasPrefix(path, "/") {
				cache.invalidate(x.host() + path)
			}
		}
	}
	if d != nil {
		if r = cache.store(d, x.url, x.req, r, asked, x.generation); d.shared {
			x.why += "; stored"
		}
	}
	return r
}

// reached ends the exchange where err says that the origin failed.
func (x *exchange) reached(err error) {
	e, dns, timeout := (*Error)(nil), (*net.DNSError)(nil), net.Error(nil)
	sent := err == nil || x.upload.finished() || x.upload.sending.Load()
	malformed := !sent && errors.As(x.upload.err, &e)
	if malformed || errors.As(err, &e) && e.Status == 403 {
		orFail(e) // the request's body was malformed, or control refused
	}
	unknown := x.direct() && errors.As(err, &dns) && dns.IsNotFound
	late := e != nil && e.Status == 408 || errors.As(err, &timeout) && timeout.Timeout()
	must(!unknown, 404, "neither a file nor a host: %s", x.origin)
	must(err == nil, choose(late, 504, 502), "%s: %v", x.origin, err)
}

// send writes an answer, as the request's conditions and range have it where that can be.
func (x *exchange) send(r *Response) error {
	h, status, off, n := r.Head, r.Status, int64(0), r.size
	file, seeks := r.ReadCloser.(io.Seeker)
	b, live := r.ReadCloser.(*body)
	_, growing := r.ReadCloser.(*tail)
	if seeks && status == 200 {
		if status, off, n = r.span(x.req); r.unchanged(x.req) {
			status, x.code = 304, strings.Replace(x.code, "TCP_HIT", "TCP_IMS_HIT", 1)
		}
		if status != 200 {
			h = page(status, "", "").Head
			h.Fields = slices.Clone(r.Fields)
			h.setIf(status == 206, "Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, off+n-1, r.size))
			h.setIf(status == 416, "Content-Range", fmt.Sprintf("bytes */%d", r.size))
		}
	}
	bodiless, head := status == 204 || status == 304, x.req.Line[0] == "HEAD"
	silent := bodiless || head && (n < 0 || live) // of a length, but for what the origin said
	x.keep = x.keep && (n >= 0 || silent || !x.req.old()) && x.upload.finished() && !closing.Load()
	extra := Head{Fields: make([]Field, 0, 8)}
	extra.setIf(!silent && n >= 0, "Content-Length", strconv.FormatInt(n, 10))
	extra.setIf(!silent && n < 0 && !x.req.old(), "Transfer-Encoding", "chunked")
	extra.setIf(r.req != nil, "Age", strconv.FormatInt(min(max(0, now().Unix()-r.born), 1<<31-1), 10))
	extra.setIf(x.why != "", "Via", via(r.Head).Value)
	extra.setIf(x.why != "", "Cache-Status", "proxy; "+x.why)
	extra.setIf(!x.keep || x.req.old(), "Connection", choose(x.keep, "keep-alive", "close"))
	x.c.out = h.appendTo(x.c.out[:0], extra.Fields...)
	x.status, x.kind, x.sent = status, h.Get("Content-Type"), int64(len(x.c.out))
	if n = choose(bodiless || head, 0, n); seeks && n != 0 {
		file.Seek(r.off+off, io.SeekStart)
	}
	if 0 < n && n <= 16<<10 && !growing && (!live || int64(b.c.r.Buffered()) >= n) { // in one piece
		x.c.out = append(x.c.out, make([]byte, n)...)
		if _, err := io.ReadFull(r, x.c.out[x.sent:]); err != nil {
			return err
		}
		x.sent, n = x.sent+n, 0
	}
	if _, err := x.c.Write(x.c.out); err != nil || n == 0 {
		return err
	}
	return x.sendBody(r, n)
}

// sendBody sends n bytes or, where that is negative, all, in chunks to those who know them.
func (x *exchange) sendBody(r *Response, n int64) (err error) {
	to, end, all := io.Writer(x.c), "", n < 0
	if _, ok := r.ReadCloser.(*os.File); ok {
		to = x.c.Conn // from the kernel to the kernel
	} else if all && !x.req.old() {
		to, end = chunkWriter{x.c}, "0\r\n\r\n"
	}
	for n, step := choose(all, 1<<62, n), int64(0); n > 0 && err == nil; n -= step {
		x.c.extend()
		step, err = io.CopyN(to, r.ReadCloser, min(n, 256<<10))
		x.sent += step
	}
	if all && err == io.EOF {
		_, err = io.WriteString(x.c, end)
	}
	return noEOF(err)
}

// tunnel joins a client and an origin until both have had their say.
func (x *exchange) tunnel() *Response {
	x.code, x.keep = "TCP_TUNNEL", false
	nc, err := origins.Dial("tcp", x.origin)
	x.reached(err)
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
	n, err := io.Copy(to, newBody(from, untilClose))
	if to.Conn.(*net.TCPConn).CloseWrite(); err != nil {
		to.Conn.Close()
		from.Conn.Close()
	}
	return n
}

// log writes a line in Squid's native format, and counts.
func (x *exchange) log() {
	url, t := cmp.Or(choose(x.url == "", x.path, "http://"+x.url), x.origin, "error:invalid-request"), now()
	kind, _, _ := strings.Cut(x.kind, ";")
	journal.Lock()
	defer journal.Unlock()
	fmt.Fprintf(journal.Writer, "%d.%03d %6d %s %s/%03d %d %s %s - %s %s\n", t.Unix(), t.UnixMilli()%1000,
		t.Sub(x.start).Milliseconds(), hostOf(x.c.RemoteAddr().String()), x.code, x.status, x.sent,
		printable(x.req.Line[0]), printable(url), x.peer, printable(kind))
	journal.requests, journal.bytes = journal.requests+1, journal.bytes+x.sent
	journal.hits += choose[int64](strings.Contains(x.code, "HIT"), 1, 0)
}

// printable escapes what could be taken for another field or line of the log.
func printable(s string) (b []byte) {
	for _, c := range []byte(cmp.Or(s, "-")) {
		if b = append(b, c); c <= ' ' || c > '~' || c == '"' {
			b = fmt.Appendf(b[:len(b)-1], "%%%02X", c)
		}
	}
	return b
}
