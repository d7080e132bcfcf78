// Proxy is a caching HTTP/1.1 forward proxy. Usage: proxy [flags] [port | host:port]
//
// A bare port, 8899 if none is given, is open to this machine only, ":8899" to the network; proxy -h
// lists flags. Requests are logged to stdout in Squid's native format, trouble to stderr. This file is
// the life of a request, request.go HTTP on the wire, cache.go the store and its rules.
package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"html"
	"io"
	"log"
	"maps"
	"mime"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path"
	"runtime"
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
	nth   = flag.Int("uses", 1, "store a response from the `n`th GET for its URL within 10 minutes on")
	ttl   = flag.Duration("ttl", 0, "how long a response is fresh that says nothing about it, at least")
	files = flag.String("files", ".", "`directory` of files for direct requests, empty for none")
	block = flag.String("block", "", "hosts, domains, addresses and CIDRs refused: a `list` or @file")
	auth  = flag.String("auth", "", "`user:password` that clients must give, or @file")

	cache     = Cache{under: map[string]*Entry{}, memory: map[string]*Entry{}, seen: map[string][]time.Time{}}
	origins   = Origins{Dialer: net.Dialer{Timeout: 10 * time.Second, Control: control}}
	pseudonym = "proxy-" + strings.ToLower(rand.Text()[:6]) // in Via
	domains   = map[string]bool{}                           // blocked, with all below them
	networks  []netip.Prefix                                // blocked
	active    atomic.Int64                                  // exchanges under way
	closing   context.Context                               // done when a signal asks to stop
	journal   = struct {                                    // the access log
		sync.Mutex
		out                          *bufio.Writer
		latest                       []string
		requests, hits, bytes, saved int64
		begun                        time.Time
	}{out: bufio.NewWriterSize(os.Stdout, 64<<10), begun: time.Now()}
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("proxy: ")
	// It counts for the collector, which runs less often: a third more hits; untouched it takes no memory.
	defer runtime.KeepAlive(make([]byte, 12<<20))
	address := ""
	if err := attempt(func() { address = configure() }); err != nil {
		log.Printf("%v; proxy -h tells more", err)
		os.Exit(2)
	}
	l, err := net.Listen("tcp", address)
	f := *dir + "/" + temporary + rand.Text() // to try the directory, as others may at the same time
	if err = cmp.Or(err, os.MkdirAll(*dir, 0o700), os.WriteFile(f, nil, 0o600), os.Remove(f)); err != nil {
		log.Fatal(err) // with status 1
	}
	closing, _ = signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(closing, func() {
		l.Close()
		time.AfterFunc(11*time.Second, func() { os.Exit(0) }) // e.g., nobody reads the log any more
	})
	log.Printf("listening on %s, cache in %s", l.Addr(), *dir)
	go cache.trim()
	go func() {
		for ; ; time.Sleep(100 * time.Millisecond) {
			totals()
			origins.take("") // closes those that are too old
		}
	}()
	for closing.Err() == nil {
		if nc, err := l.Accept(); err == nil {
			go client(newConn(nc, ""))
		} else if closing.Err() == nil { // e.g., too many open files
			log.Print(err)
			time.Sleep(100 * time.Millisecond)
		}
	}
	for end := time.Now().Add(10 * time.Second); active.Load() > 0 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond) // exchanges under way have ten seconds more
	}
	log.Print(totals())
}

// totals writes the log out, and returns what it counts.
func totals() string {
	defer lock(&journal)()
	journal.out.Flush()
	journal.out.Reset(os.Stdout) // or an error would stay, e.g., of a full disk
	return fmt.Sprintf("%d requests, %d hits, %d MiB", journal.requests, journal.hits, journal.bytes>>20)
}

// configure reads the command line, and returns the address to listen on. Errors lose their status.
func configure() (address string) {
	flag.CommandLine.Init("", flag.ContinueOnError)
	flag.CommandLine.SetOutput(io.Discard)
	err := flag.CommandLine.Parse(os.Args[1:])
	for ; err == nil && flag.NArg() > 0; err = flag.CommandLine.Parse(flag.Args()[1:]) {
		must(address == "", "400 two addresses:", address, flag.Arg(0))
		address = flag.Arg(0)
	}
	if flag.CommandLine.SetOutput(os.Stderr); err == flag.ErrHelp {
		log.Print("usage: proxy [flags] [port | host:port]")
		flag.PrintDefaults()
		os.Exit(0)
	}
	fail(err)
	address = choose(strings.Trim(address, "0123456789") == "", "127.0.0.1:"+cmp.Or(address, "8899"), address)
	_, port, err := net.SplitHostPort(address)
	n, ok := digits(port)
	must(err == nil && ok && n < 65536, "400 neither a port nor host:port:", address)
	number := strings.TrimRight(*size, "KMGT")
	shift := 10 * slices.Index([]string{"", "K", "M", "G", "T"}, (*size)[len(number):])
	n, ok = digits(number)
	must(ok && shift >= 0 && n<<shift>>shift == n, "400 -size is no number like 5000 or 10G:", *size)
	must(*nth > 0, "400 -uses must be at least 1")
	must(*ttl >= 0, "400 -ttl must not be negative")
	must(*dir != "", "400 -cache must name a directory")
	cache.dir, cache.limit, cache.ttl, cache.uses = *dir, n<<shift, int64(ttl.Seconds()), *nth
	for _, text := range []*string{block, auth} {
		if file, ok := strings.CutPrefix(*text, "@"); ok {
			b, err := os.ReadFile(file)
			fail(err)
			*text = strings.TrimSpace(string(b))
			must(text == block || *text != "", "400 -auth names a file without credentials:", file)
		}
	}
	must(*auth == "" || strings.Contains(*auth, ":"), "400 -auth must be user:password")
	*auth = base64.StdEncoding.EncodeToString([]byte(*auth)) // as Basic has it
	for _, entry := range strings.FieldsFunc(*block, separates) {
		if ip, err := netip.ParseAddr(strings.Trim(entry, "[]")); err == nil {
			networks = append(networks, netip.PrefixFrom(ip.Unmap().WithZone(""), ip.Unmap().BitLen()))
		} else if n, err := netip.ParsePrefix(entry); err == nil {
			bits := choose(n.Addr().Is4In6(), max(0, n.Bits()-96), n.Bits())
			networks = append(networks, netip.PrefixFrom(n.Addr().Unmap(), bits))
		} else {
			host := strings.Trim(entry, ".")
			err := attempt(func() { domains[hostOf(authority(host))] = true })
			must(err == nil && !strings.Contains(host, ":"), "400 -block has what is no host or CIDR:", entry)
		}
	}
	return address
}

// client answers the requests of one connection, one after another.
func client(c *Conn) {
	defer c.Close()
	keep, reset := true, false
	for ; keep && closing.Err() == nil; active.Add(-1) {
		req, err := c.next(false)
		if _, told := err.(Error); err != nil && !told {
			return // e.g., it has been closed
		}
		active.Add(1)
		x := &exchange{c: c, req: req, res: req, start: now(), code: "NONE", peer: "HIER_NONE/-"}
		e := x.try(func() *Answer { fail(err); return x.answer() })
		if e != nil && attempt(func() { fail(x.send(e)) }) != nil {
			x.code, x.keep, reset = x.code+"_ABORTED", false, x.req.old()
		}
		x.log()
		keep, c.written = x.keep, 0
	}
	if reset { // as send has it
		return
	}
	c.Conn.(*net.TCPConn).SetLinger(-1)
	// Closed at once, with bytes unread, it would be reset, and the answer lost (RFC 9112 §9.6).
	c.Conn.(*net.TCPConn).CloseWrite()
	c.SetDeadline(time.Now().Add(2 * time.Second))
	io.Copy(io.Discard, io.LimitReader(c.Conn, 1<<20))
}

// An exchange is a request and its answer. address (host:port) is asked for path; url (host and path) is
// the key in the cache. code and peer are the outcome in the words of Squid's log, why in Cache-Status's.
type exchange struct {
	c                                   *Conn
	req, res                            *Head // as they came, and went
	start                               time.Time
	address, path, url, code, peer, why string
	direct, keep, behind                bool // asked as a server; connection is kept; a refresh for no client
}

// try makes an answer of what fails.
func (x *exchange) try(step func() *Answer) (e *Answer) {
	if err := attempt(func() { e = step() }); err != nil {
		told, ok := err.(Error)
		told = choose(ok, told, Error("502 "+err.Error()))
		if bug, is := err.(runtime.Error); is {
			log.Printf("a bug: %v", bug)
		}
		status, _ := strconv.Atoi(string(told[:3]))
		x.code = choose(slices.Contains([]int{401, 403, 407}, status), "TCP_DENIED", x.code)
		x.why, e = "", page(status, "text/plain; charset=utf-8", told.Error()+"\n")
		e.Set("WWW-Authenticate", choose(status == 401, `Basic realm="proxy"`, ""),
			"Proxy-Authenticate", choose(status == 407, `Basic realm="proxy"`, ""))
	}
	return e
}

var reasons = map[int]string{200: "OK", 206: "Partial Content", 304: "Not Modified", 400: "Bad Request",
	401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 407: "Proxy Authentication Required",
	408: "Request Timeout", 414: "URI Too Long", 416: "Range Not Satisfiable", 417: "Expectation Failed",
	431: "Request Header Fields Too Large", 501: "Not Implemented", 502: "Bad Gateway",
	504: "Gateway Timeout", 505: "HTTP Version Not Supported", 508: "Loop Detected"}

// page is an answer made here.
func page(status int, kind, text string) *Answer {
	line := [3]string{"HTTP/1.1", strconv.Itoa(status), reasons[status]}
	h := &Head{line, status, []Field{{"Content-Type", kind}, {"Date", now().UTC().Format(dateFormat)}}}
	h.Set("Cross-Origin-Resource-Policy", "same-origin") // no page elsewhere may take it for a script
	return &Answer{Entry: &Entry{Head: h, memory: []byte(text), size: int64(len(text)), err: io.EOF}}
}

// answer lives the life of a request:
//  1. where its body ends and what it asks for, refused where that can be read in two ways
//  2. who may ask, and for what
//  3. CONNECT is a tunnel; a request that has been here before ends
//  4. asked as a server: a page, a file, or /host/path
//  5. what is stored answers, or a download under way
//  6. else the origin does
func (x *exchange) answer() *Answer {
	req, method := x.req, x.req.Line[0]
	named := x.route() // 1
	x.admit()          // 2
	if method == "CONNECT" {
		return x.tunnel() // 3
	}
	again := func(via string) bool { return strings.HasSuffix(via, " "+pseudonym) }
	must(!slices.ContainsFunc(req.list("Via"), again), "508 this request has been here before")
	expect := req.Get("Expect")
	must(expect == "" || same(expect, "100-continue"), "417 no support of", expect)
	kind := x.c.kind
	if kind == chunked && expect == "" { // with a bad first chunk nothing at all is sent on
		if _, err := (body{x.c}).Read(nil); err != io.EOF {
			fail(err)
		}
	}
	if method == "TRACE" || method == "OPTIONS" { // RFC 9110 §7.6.2
		hops, limited := digits(req.Get("Max-Forwards"))
		req.Set("Max-Forwards", choose(limited, strconv.FormatInt(hops-1, 10), ""))
		if limited && hops == 0 {
			req.Del("Authorization", "Cookie", "Proxy-Authorization", "Max-Forwards")
			return page(200, "message/http", choose(method == "TRACE", string(req.text(nil)), ""))
		}
	}
	if req.endToEnd(); x.direct {
		if e := x.local(named); e != nil {
			return e // 4
		}
	}
	x.code = "TCP_MISS"
	known := method == "GET" || method == "HEAD"
	if !known || kind != 0 || cmp.Or(req.Get("If-Match"), req.Get("If-Unmodified-Since")) != "" {
		return x.fetch(nil, nil, choose(known, "bypass", "method")) // 6
	}
	return x.cached() // 5
}

// route reads the request target, in its four forms, and Host (RFC 9112 §3.2), and returns Host. keep is
// set last: after a failure nobody knows where the next request begins, after a CONNECT there is none.
func (x *exchange) route() (named string) {
	method, target, hosts := x.req.Line[0], x.req.Line[1], x.req.list("Host")
	kind := x.req.framing(false)
	one := len(hosts) == 1 && hosts[0] != "" || len(hosts) == 0 && x.req.old()
	must(one, "400 Host must name one host, not", strings.Join(hosts, ", "))
	named = x.c.authority(cmp.Or(strings.Join(hosts, ""), "localhost"))
	x.direct = target[0] == '/' || target == "*" && method == "OPTIONS"
	if x.path = target; method == "CONNECT" {
		x.address = authority(target)
		must(strings.HasSuffix(target, ":"+portOf(x.address)), "400 CONNECT without a port:", target)
	} else if !x.direct {
		ok := len(target) > 7 && strings.EqualFold(target[:7], "http://") && !strings.Contains(target, "#")
		must(ok, "400 not a http:// URL:", target)
		x.aim(target[7:])
	}
	x.c.expect(kind)
	x.keep = x.req.keepAlive() && method != "CONNECT"
	return named
}

// admit decides who may ask, and for what.
func (x *exchange) admit() {
	must(!blocked(x.c.peer), "403 refused are clients at", x.c.peer)
	field := choose(x.direct, "Authorization", "Proxy-Authorization")
	if *auth != "" && x.req.Line[1] != "/proxy.pac" { // a browser that needs it has no credentials yet
		scheme, token, _ := strings.Cut(x.req.Get(field), " ")
		ok := subtle.ConstantTimeCompare([]byte(strings.TrimLeft(token, " ")), []byte(*auth)) == 1
		must(ok && same(scheme, "Basic"), choose(x.direct, "401", "407")+" credentials are needed")
		x.req.Del(field) // it was for us
	}
	fail(control("", x.address, nil))
}

// aim takes a URL without its scheme apart.
func (x *exchange) aim(url string) {
	end := strings.IndexAny(url+"/", "/?")
	if x.address, x.path = x.c.authority(url[:end]), url[end:]; !strings.HasPrefix(x.path, "/") {
		x.path = choose(x.path == "" && x.req.Line[0] == "OPTIONS", "*", "/"+x.path)
	}
	x.url = x.host() + x.path
}

// host is the origin as Host and the cache have it.
func (x *exchange) host() string { return strings.TrimSuffix(x.address, ":80") }

// control refuses a blocked origin: before it is asked, and, as the Dialer's, by the IP that is dialed.
func control(_, address string, _ syscall.RawConn) error {
	return attempt(func() { must(!blocked(hostOf(address)), "403 blocked is", address) })
}

// blocked tells whether a host is on the list. If that has addresses, names are looked up here too, as a
// hit dials nobody. The unspecified address (0.0.0.0) would lead to this machine.
func blocked(host string) bool {
	host = strings.TrimRight(host, ".")
	for name := host; name != "" && len(domains) > 0; _, name, _ = strings.Cut(name, ".") {
		if domains[name] {
			return true
		}
	}
	if len(networks) == 0 {
		return false
	}
	ips, _ := net.LookupHost(host) // an address is its own
	return slices.ContainsFunc(ips, func(text string) bool {
		ip, _ := netip.ParseAddr(text)
		ip = ip.Unmap().WithZone("")
		within := func(n netip.Prefix) bool { return n.Contains(ip) }
		return ip.IsUnspecified() || slices.ContainsFunc(networks, within)
	})
}

// local answers a request to the proxy itself, or turns it into one to the origin that its path begins
// with. Only if Host names us: else a page elsewhere could read what is meant for this machine, by a name
// of its own that leads here (DNS rebinding).
func (x *exchange) local(named string) *Answer {
	ip, _ := netip.ParseAddr(hostOf(named))
	here := x.c.LocalAddr().String()
	ours := hostOf(named) == "localhost" || ip.IsLoopback() || hostOf(named) == hostOf(here)
	must(ours && portOf(named) == portOf(here), "403 another name than this proxy's:", named)
	name, _, _ := strings.Cut(x.path, "?")
	switch get := oneOf(x.req.Line[0], "GET", "HEAD"); {
	case name == "*":
		return page(200, "text/plain", "")
	case name == "/" && get:
		return page(200, "text/html; charset=utf-8", status())
	case name == "/proxy.pac":
		const pac = `function FindProxyForURL(url, host) {
	return shExpMatch(url, "http://%[1]s/*") ? "DIRECT" : "PROXY %[1]s" }`
		return page(200, "application/x-ns-proxy-autoconfig", fmt.Sprintf(pac, named))
	case get:
		if e := x.file(name[1:]); e != nil {
			return e
		}
	}
	must(attempt(func() { x.aim(x.path[1:]) }) == nil, "404 neither a file nor a host:", x.path)
	fail(control("", x.address, nil))
	x.req.Del("Cookie", "Authorization") // they may be for what else a browser knows by this name
	return nil
}

// file answers with a file, to this machine only, and with none that is hidden or the cache's.
func (x *exchange) file(name string) *Answer {
	name = strings.NewReplacer(`\`, `"`, "%", `\x`).Replace(name) // %20 becomes \x20, a backslash an error
	name, err := strconv.Unquote(`"` + name + `"`)
	ip, _ := netip.ParseAddr(x.c.peer)
	if *files == "" || err != nil || !ip.Unmap().IsLoopback() || strings.Contains("/"+name, "/.") {
		return nil
	}
	root, err := os.OpenRoot(*files)
	fail(err)
	defer root.Close()
	parent, _ := root.Stat(path.Dir(name))
	store, _ := os.Stat(*dir)
	info, err := root.Stat(name)
	if err != nil || !info.Mode().IsRegular() || os.SameFile(parent, store) { // a pipe would hold us up
		return nil
	}
	e := page(200, cmp.Or(mime.TypeByExtension(path.Ext(name)), "application/octet-stream"), "")
	e.Set("Last-Modified", info.ModTime().UTC().Format(dateFormat))
	e.file, err = root.Open(name)
	e.size, e.taken = info.Size(), info.Size()
	fail(err)
	return e
}

// cached answers from the store where it may (RFC 9111 §4), or from a download under way; else it asks. A
// refresh behind a client's back must not be content with the stale answer that it is to replace.
func (x *exchange) cached() *Answer {
	for {
		e, key, changes := cache.lookup(x.url, x.req)
		why, meanwhile := choose(key == x.url, "uri-miss", "vary-miss"), false
		if e != nil {
			why, meanwhile = e.judge(x.req, x.start.Unix())
		}
		if meanwhile && !x.behind && e.storable(x.req) {
			go x.refresh()
			why = ""
		}
		if why == "" {
			hit := "proxy; hit; ttl=" + strconv.FormatInt(e.born+e.life-x.start.Unix(), 10)
			x.code = choose(e.file == nil, "TCP_MEM_HIT", "TCP_HIT")
			x.why = choose(e.source == nil, hit, cmp.Or(x.why, "proxy; fwd=uri-miss; collapsed"))
			return e
		}
		if x.req.Line[0] != "GET" || x.req.is("only-if-cached") || e == nil && *nth > 1 && !cache.due(x.url) {
			return x.fetch(e, nil, why)
		}
		d, again := cache.claim(key, changes, !x.behind && !x.req.is("no-cache"))
		if d != nil || !again && !x.behind {
			return x.fetch(e, d, why)
		}
		e.Close()
		must(again, "504 another refreshes it")
		x.why = "proxy; fwd=" + why + "; collapsed"
	}
}

// refresh asks once more behind a client's back, so that the answer gets stored.
func (x *exchange) refresh() {
	y := &exchange{c: &Conn{Conn: x.c.Conn, peer: x.c.peer}, req: x.req.Clone(), start: now(), behind: true}
	y.address, y.path, y.url, y.req.Line[0] = x.address, x.path, x.url, "GET"
	y.req.Del("If-None-Match", "If-Modified-Since", "Range", "If-Range")
	e := y.try(y.cached)
	io.Copy(io.Discard, io.LimitReader(e, choose[int64](e.passing(), 0, endless))) // only what gets stored
	e.Close()
}

// outgoing is the request for the origin. validates tells that it asks whether the stored answer is still
// good, in the place of the client's own condition (RFC 9111 §4.3.1).
func (x *exchange) outgoing(stored *Answer) (h *Head, validates bool) {
	h = x.req.Clone()
	h.Line = [3]string{x.req.Line[0], x.path, "HTTP/1.1"}
	h.Del("Host")
	h.Fields = append(slices.Insert(h.Fields, 0, Field{"Host", x.host()}), Field{"Via", via(x.req)})
	length := choose(h.Get("Content-Length") != "" || x.c.begun, strconv.FormatInt(max(0, x.c.kind), 10), "")
	h.Set("Content-Length", choose(x.c.kind == chunked, "", length),
		"Transfer-Encoding", choose(x.c.kind == chunked, "chunked", ""))
	if validates = stored != nil && h.Line[0] == "GET" && stored.Status != 206 &&
		stored.Get("ETag")+stored.Get("Last-Modified") != ""; validates {
		h.Set("If-None-Match", stored.Get("ETag"), "If-Modified-Since", stored.Get("Last-Modified"))
	}
	return h, validates
}

// fetch asks the origin. The answer goes into d, the entry that has been claimed for it, if there is one
// and it may. What is stored, if anything, is validated, and stands in where the origin fails.
func (x *exchange) fetch(stored *Answer, d *Entry, why string) (e *Answer) {
	defer func() {
		if e == nil || e != stored && e.source != stored { // it is not used any more
			stored.Close()
		}
		if d != nil && !d.shared { // there is nothing for others
			defer lock(&cache)()
			d.leave()
		}
	}()
	must(!x.req.is("only-if-cached"), "504 not in the cache:", x.url)
	asked, method, status := now(), x.req.Line[0], 0
	req, validates := x.outgoing(stored)
	res, c, err := origins.ask(x.address, req, x.c, x.interim)
	if x.why = "proxy; fwd=" + why; err == nil {
		status, x.peer, x.why = res.Status, "HIER_DIRECT/"+c.peer, x.why+"; fwd-status="+res.Line[1]
	}
	if stored != nil && stored.standsIn(x.req, status) {
		if x.code = "TCP_REFRESH_FAIL_OLD"; err == nil {
			body{c}.Close()
		}
		return stored
	}
	x.reached(err)
	if res.endToEnd(); httpDate(res.Get("Date")) == 0 { // RFC 9110 §6.6.1
		res.Set("Date", now().UTC().Format(dateFormat))
	}
	if method != "HEAD" && status != 304 { // it says how much there would be
		res.Del("Content-Length")
	}
	if !oneOf(method, "GET", "HEAD", "OPTIONS", "TRACE") && status < 400 { // RFC 9111 §4.4
		for _, reference := range []string{x.path, res.Get("Location"), res.Get("Content-Location")} {
			if path := strings.TrimPrefix(reference, "http://"+x.host()); strings.HasPrefix(path, "/") {
				cache.invalidate(x.host() + path)
			}
		}
	}
	x.code = choose(why == "request", "TCP_CLIENT_REFRESH_MISS", x.code)
	x.code = choose(validates, "TCP_REFRESH_MODIFIED", x.code)
	e = &Answer{Entry: cmp.Or(d, &Entry{})}
	e.Head, e.source, e.size = res, body{c}, max(c.kind, -1)
	if validates && status == 304 {
		e.source.Close()
		had, has := strings.TrimPrefix(stored.Get("ETag"), "W/"), strings.TrimPrefix(res.Get("ETag"), "W/")
		if had != "" && has != "" && had != has { // it is of another (RFC 9111 §4.3.4)
			return x.fetch(nil, d, why)
		}
		x.code = "TCP_REFRESH_UNMODIFIED"
		e.Head, e.source, e.size = stored.updated(res), stored, stored.size
	}
	cache.store(e, stored, x.url, x.req, asked, x.person)
	x.why += choose(e.passing(), "", "; stored")
	forbidden := status == 304 && validates && (e.is("no-store", "private") || oneOf("*", e.list("Vary")...))
	if e.passing() && d != nil && stored != nil && (forbidden || slices.Contains(heuristic, status)) {
		cache.invalidate(d.key)
	}
	return e
}

// interim passes on an answer that comes before the final one, e.g., Early Hints (103).
func (x *exchange) interim(res *Head) {
	res.Del("Content-Length", choose(x.direct, "Set-Cookie", ""))
	if res.endToEnd(); !x.behind && !x.req.old() {
		x.c.Write(res.text(nil, "Via", via(res)))
	}
}

// person tells one from another, as a cookie goes from the cache only to whom it was set. Nobody who
// sends no User-Agent can be known again.
func (x *exchange) person() string {
	if x.req.Get("User-Agent") == "" {
		return rand.Text()
	}
	all := fmt.Sprintf("%q%q%q", x.c.peer, x.req.list("User-Agent"), x.req.list("Cookie"))
	return fmt.Sprintf("%.8x", sha256.Sum256([]byte(all)))
}

// reached ends the exchange where err says that the origin failed, or rather that the client did.
func (x *exchange) reached(err error) {
	if err == nil {
		return
	}
	told, dns := Error("502"), (*net.DNSError)(nil)
	errors.As(err, &told)
	if cut, broken := x.c.upload.unfinished().(Error); broken { // by what the client sends, or does not
		panic(cut)
	}
	must(!strings.HasPrefix(string(told), "403"), string(told))
	must(!x.direct || !errors.As(err, &dns) || !dns.IsNotFound, "404 neither a file nor a host:", x.address)
	late := strings.HasPrefix(string(told), "408") || os.IsTimeout(err)
	panic(Error(choose(late, "504 ", "502 ") + x.address + ": " + err.Error()))
}

// selected is the head of the answer as the request's conditions and range have it, and which n bytes of
// the body from off on go with it.
func (x *exchange) selected(e *Answer) (h *Head, off, n int64) {
	h, n = cmp.Or(e.own, e.Head), e.size
	status, extent := 0, ""
	if !e.passing() && (e.Status == 200 || e.Status == 206) {
		status, off, n = e.part(x.req)
	}
	if x.direct || e.req != nil && e.own == nil && e.Get("Set-Cookie") != "" &&
		e.req.Get("From") != x.person() {
		h = h.Clone()
		h.Del("Set-Cookie", "Set-Cookie2", "Clear-Site-Data")
	}
	switch {
	case status == 0, status == e.Status && n == e.size:
		return h, off, n
	case status == 206:
		extent = fmt.Sprintf("bytes %d-%d/%d", e.first+off, e.first+off+n-1, max(e.all, e.size))
	case status == 416:
		extent = fmt.Sprintf("bytes */%d", max(e.all, e.size))
	case strings.HasSuffix(x.code, "_HIT"):
		x.code = "TCP_IMS_HIT"
	}
	h = h.Clone()
	h.Line[1], h.Line[2], h.Status = strconv.Itoa(status), reasons[status], status
	h.Set("Content-Range", extent)
	return h, off, n
}

// A page asked for as /host/path would else be of one origin with all others, with our own and the files
// here: any page elsewhere could have them read by one of its own.
const sandbox = "sandbox allow-scripts allow-forms allow-popups allow-downloads"

// send writes an answer.
func (x *exchange) send(e *Answer) (err error) {
	defer e.Close()
	h, off, n := x.selected(e)
	e.at.Store(off)
	x.keep = x.keep && x.c.upload.unfinished() == nil // first, as it may read the body still
	none, head, old := h.Status == 204 || h.Status == 304, x.req.Line[0] == "HEAD", x.req.old()
	silent := none || head && (n < 0 || e.passing()) // of a length: HEAD repeats the origin's
	x.keep = x.keep && (n >= 0 || silent || !old) && x.c.whole() && closing.Err() == nil
	length := choose(!silent && n >= 0, strconv.FormatInt(n, 10), "")
	age := strconv.FormatInt(min(max(0, now().Unix()-e.born), maxSeconds-1), 10)
	chunks, body := !silent && n < 0 && !old, choose[io.Reader](e.passing(), e.source, e)
	x.c.out = h.text(x.c.out, "Content-Length", length, "Transfer-Encoding", choose(chunks, "chunked", ""),
		"Age", choose(e.req == nil || e.passing(), "", age), "Via", choose(x.why != "", via(h), ""),
		"Cache-Status", x.why, "Connection", choose(!x.keep, "close", choose(old, "keep-alive", "")),
		"Content-Security-Policy", choose(x.direct && x.why != "", sandbox, ""))
	if x.res = h; old && n < 0 && !silent { // if the program ends now that is not to look like the end
		x.c.Conn.(*net.TCPConn).SetLinger(0)
	}
	if n = choose(none || head, 0, n); e.file == nil && !e.passing() {
		_, err = x.c.Write(e.memory[off : off+n])
		return err
	} else if !ready(body) {
		x.c.Write(nil) // the head does not wait for the body
	}
	copied, err := x.c.send(io.LimitReader(body, choose(n < 0, endless, n)), chunks && !head)
	return choose(err == nil && copied < n, io.ErrUnexpectedEOF, err)
}

// tunnel joins a client and an origin until both have had their say.
func (x *exchange) tunnel() *Answer {
	x.code = "TCP_MISS"
	nc, err := origins.Dial("tcp", x.address)
	x.reached(err)
	o := newConn(nc, x.address)
	defer o.Close()
	ip, _ := netip.ParseAddr(o.peer) // back through it one would be 127.0.0.1, who may see files
	here := ip.IsLoopback() && portOf(x.address) == portOf(x.c.LocalAddr().String())
	must(!here, "508 a tunnel to this proxy itself:", x.address)
	x.code, x.peer, x.res = "TCP_TUNNEL", "HIER_DIRECT/"+o.peer, &Head{Status: 200}
	o.wait, x.c.wait = tunnelWait, tunnelWait
	x.c.renew.Store(0)
	o.expect(untilClose)
	x.c.expect(untilClose)
	x.c.Write([]byte("HTTP/1.1 200 Connection established\r\n\r\n"))
	up, down := o.carry(x.c), x.c.carry(o)
	<-up
	<-down
	return nil
}

// log writes a line in Squid's native format, and counts.
func (x *exchange) log() {
	url := choose(x.url == "", cmp.Or(x.path, x.address, "error:invalid-request"), "http://"+x.url)
	kind, _, _ := strings.Cut(x.res.Get("Content-Type"), ";")
	t := now().UnixMilli()
	stamp, took := strconv.FormatInt(t, 10), strconv.FormatInt(t-x.start.UnixMilli(), 10)
	line := stamp[:len(stamp)-3] + "." + stamp[len(stamp)-3:] + "       "[min(6, len(took)):] + took + " " +
		x.c.peer + " " + x.code + "/" + strconv.Itoa(1000 + x.res.Status)[1:] + " " +
		strconv.FormatInt(x.c.written, 10) + " " + printable(x.req.Line[0]) + " " + printable(url) + " - " +
		x.peer + " " + printable(kind) + "\n"
	defer lock(&journal)()
	journal.out.WriteString(line)
	if x.direct && x.path == "/" { // to look at the page is not to be seen on it
		return
	}
	line = line[:min(len(line), 4<<10)] + " - -" // cut, too, it has all fields that the page shows
	journal.latest = append(journal.latest[max(0, len(journal.latest)-999):], line)
	journal.requests++
	if journal.bytes += x.c.written; strings.Contains(x.code, "HIT") {
		journal.hits, journal.saved = journal.hits+1, journal.saved+x.c.written
	}
}

const statusPage = `<!DOCTYPE html><html lang=en><meta charset=utf-8><title>proxy</title>
<meta name=viewport content="width=device-width"><meta name=color-scheme content="light dark">
<meta http-equiv=refresh content=5><link rel=icon href=data:,><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:auto;padding:1em;overflow-wrap:anywhere}
table{width:100%%;border-collapse:collapse}div{max-height:6em;overflow:auto}i{display:block;height:1.2em;
min-width:3px;background:#38a169}td{padding:0 1em .3em 0;vertical-align:top;max-width:22em;white-space:nowrap;
overflow:hidden;text-overflow:ellipsis}td:last-child{width:60%%;max-width:none;white-space:normal}@media(
max-width:45em){td{display:inline-block;white-space:normal}tr,td:last-child{display:block;width:auto}}</style>
<h1>proxy</h1><p>%s since %s; %d MiB of them came from the cache:<i style="width:%d%%"></i>
<p>In the last five minutes %d%% of %d requests were hits (the latest are kept).
<p>The cache has %d files, %.1f of %d MiB:<i style="width:%d%%"></i>
<h2>Outcomes of the latest requests</h2><table>%s</table><h2>Busiest hosts</h2><table>%s</table>
<h2>Latest requests</h2><table>%s</table>`

// status is the page about all this: what has been counted, and what the end of the log tells.
func status() string {
	totals := totals()
	defer lock(&cache)()
	defer lock(&journal)()
	outcomes, hosts, rows, hits, recent := map[string]int{}, map[string]int{}, "", 0, 0
	for i, line := range slices.Backward(journal.latest) {
		f := strings.Fields(html.EscapeString(line)) // no URL can become markup
		seconds, _ := strconv.ParseInt(f[0][:len(f[0])-4], 10, 64)
		code, _, _ := strings.Cut(f[3], "/")
		outcomes[code]++
		if url := strings.Split(f[6], "/"); len(url) > 2 {
			hosts[url[2]]++
		}
		if now().Unix()-seconds < 300 {
			recent, hits = recent+1, hits+choose(strings.Contains(code, "HIT"), 1, 0)
		}
		if at := time.Unix(seconds, 0).Format(time.TimeOnly); i >= len(journal.latest)-30 {
			rows += fmt.Sprintf("<tr><td>%s<td>%s<td>%s ms<td><div>%s %s</div>", at, f[3], f[1], f[5], f[6])
		}
	}
	return fmt.Sprintf(statusPage, totals, journal.begun.Format(time.DateTime), journal.saved>>20,
		journal.saved*100/max(1, journal.bytes), hits*100/max(1, recent), recent, cache.files,
		float64(cache.size)/(1<<20), cache.limit>>20, cache.size*100/max(1, cache.limit),
		bars(outcomes), bars(hosts), rows)
}

// bars draws what there is most of.
func bars(counts map[string]int) (rows string) {
	names := slices.SortedFunc(maps.Keys(counts), func(a, b string) int { return counts[b] - counts[a] })
	for _, name := range names[:min(10, len(names))] {
		width := counts[name] * 100 / counts[names[0]]
		rows += fmt.Sprintf("<tr><td>%s<td>%d<td><i style=\"width:%d%%\"></i>", name, counts[name], width)
	}
	return rows
}

// printable escapes what could be taken for another field or line of the log.
func printable(s string) string {
	strange := func(c rune) bool { return c <= ' ' || c > '~' || c == '"' }
	if !strings.ContainsFunc(s, strange) {
		return cmp.Or(s, "-")
	}
	var b []byte
	for _, c := range []byte(s) {
		b = fmt.Appendf(b, choose(strange(rune(c)), "%%%02X", "%c"), c)
	}
	return string(b)
}
