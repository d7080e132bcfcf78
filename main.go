// Proxy is a caching HTTP/1.1 forward proxy.
//
//	proxy [flags] [port | host:port]
//
// A bare port, 8899 if none is given, is open to this machine only; ":8899" is
// open to this machine and to private networks. HTTPS is tunnelled and never
// cached. proxy -h lists the flags.
//
// Each request is logged to stdout in Squid's native format: the time, how many
// milliseconds it took, the client, how it was answered with which status, the
// bytes sent, the method, the URL, the origin that was asked, and the type of
// what came:
//
//	1795817637.123     23 127.0.0.1 TCP_MISS/200 8924 GET http://a.example/x.png
//	- HIER_DIRECT/192.0.2.1 image/png
//
// What the operator should know goes to stderr. The exit status is 0 after a
// clean stop, 2 for a wrong command line, and 1 if the program can't start or
// is told a second time to stop.
//
// This file is the program: it listens, decides who may ask, lives the life of
// each request (answer), and keeps the log. Start there. Go on with request.go,
// HTTP on a connection, and then with cache.go, the store and its rules.
package main

import (
	"cmp"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
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
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// main reads the command line and runs the proxy. Its exit statuses are those
// of the package comment.
func main() {
	log.SetFlags(0)
	log.SetPrefix("proxy: ")
	config, err := parseFlags(os.Args[1:])
	if err != nil {
		log.Printf("%v (proxy -h lists the flags)", err)
		os.Exit(2)
	}
	// The garbage collector runs each time the heap has doubled. This ballast of
	// 12 MiB, which is never touched and so takes up no memory, makes it run less
	// often: a third more hits per second.
	defer runtime.KeepAlive(make([]byte, 12<<20))
	if err := run(config); err != nil {
		log.Fatal(err) // with status 1
	}
}

// run listens until a signal asks it to stop, and then gives the exchanges
// under way stopWait to finish. A second signal ends them at once.
func run(config config) error {
	listener, err := net.Listen("tcp", config.address)
	if err != nil {
		return err
	}
	p, err := newProxy(config, listener.Addr(), os.Stdout)
	if err != nil {
		return err
	}
	signal.Ignore(syscall.SIGPIPE) // the proxy goes on if whoever reads the log goes away
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) { // as it is under nohup
		signal.Notify(stop, syscall.SIGHUP)
	}
	go func() {
		<-stop
		p.closing.Store(true)
		listener.Close()
		<-stop
		log.Fatal("stopped at once")
	}()
	log.Printf("listening on %s, cache in %s", listener.Addr(), config.caching.dir)
	p.serve(listener)

	time.AfterFunc(stopWait+time.Second, func() { os.Exit(0) }) // if nobody reads stdout, flush hangs
	for end := time.Now().Add(stopWait); p.active.Load() > 0 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	p.journal.flush()
	p.journal.Lock() // for summary, as exchanges may still be counting
	defer p.journal.Unlock()
	log.Print(p.journal.summary())
	return nil
}

// A proxy is the parts of the program, wired together. What the parts have to
// know of each other is handed to them by newProxy: the cache has no log, and the
// pool of origins no flags.
type proxy struct {
	config
	cache   *Cache
	origins *originPool
	journal journal
	active  atomic.Int64 // exchanges under way
	closing atomic.Bool  // the program is to stop: connections end with their exchange
}

// newProxy makes a proxy for the address that it listens on; the access log goes
// to logTo. A proxy that others can reach keeps nothing from inner addresses:
// no responses that it could serve to them, and no idle connections. So every
// request for such an address has to dial, and checkAddress lets only clients on this
// machine do that.
func newProxy(config config, address net.Addr, logTo io.Writer) (*proxy, error) {
	local := address.(*net.TCPAddr).IP.IsLoopback()
	config.caching.shareInner = local
	config.caching.guard = guard
	config.caching.warn = func(err error) { log.Print(err) }
	cache, err := newCache(config.caching)
	if err != nil {
		return nil, err
	}
	pseudonym := "proxy-" + strings.ToLower(rand.Text()[:6])
	return &proxy{
		config:  config,
		cache:   cache,
		origins: newOriginPool(pseudonym, local, guard),
		journal: journal{begun: time.Now(), to: logTo},
	}, nil
}

// guard runs work. A panic in it is a bug: it is logged, the work ends there, and
// the program goes on.
func guard(work func()) {
	defer func() {
		if bug := recover(); bug != nil {
			log.Printf("a bug, please report it: %v\n%s", bug, debug.Stack())
		}
	}()
	work()
}

// serve accepts connections until the listener is closed. Ten times a second it
// writes the log out, closes connections that have been idle for too long, and
// looks whether another directory has taken the place of the cache's. The log has
// a goroutine of its own, as writing it takes as long as its reader likes.
func (p *proxy) serve(listener net.Listener) {
	go repeat(p.journal.flush)
	go repeat(func() {
		p.origins.closeIdle()
		p.cache.reopen()
	})
	for !p.closing.Load() {
		nc, err := listener.Accept()
		if err == nil {
			go guard(func() { p.serveClient(newConn(nc)) })
		} else if !p.closing.Load() { // e.g., too many open files
			log.Print(err)
			time.Sleep(100 * time.Millisecond)
		}
	}
}

// repeat does some work ten times a second, for as long as the program runs.
func repeat(work func()) {
	for {
		guard(work)
		time.Sleep(100 * time.Millisecond)
	}
}

// serveClient answers the requests of one connection, one after another. A
// client may send several before it reads the first response: they are
// answered in order.
func (p *proxy) serveClient(c *conn) {
	defer c.Close()
	for keep := true; keep && !p.closing.Load(); {
		req, err := readRequest(c)
		if err != nil && !isStatusError(err) {
			return // there is no request, e.g., as the client has closed the connection
		}
		x := &exchange{proxy: p, client: c, req: req, start: p.cache.now(), before: c.bytesSent()}
		keep = x.serve(err)
	}
	c.drain()
}

// An exchange is one request and what becomes of it. It lives until the request has
// been answered, on the goroutine of its connection. Only an upload, one
// direction of a tunnel, and a response on its way into the cache have goroutines
// of their own.
type exchange struct {
	*proxy
	client  *conn
	req     *Request
	start   time.Time
	before  int64 // bytes that had been sent on the connection by then
	status  CacheStatus
	origin  netip.Addr // where the response has come from, if an origin was asked
	res     *Response
	byPath  bool // it asks for /host/path
	aborted bool // the client did not get all of it
}

// serve answers the request, with an error page if readRequest has refused it, and
// reports whether another may follow on the connection.
func (x *exchange) serve(refused error) (keep bool) {
	x.active.Add(1)
	defer x.active.Add(-1)
	x.status.Outcome = none
	err := refused
	if err == nil {
		x.res, err = x.answer()
	}
	if err != nil {
		x.res = x.errorPage(err)
	}
	defer x.log()
	if x.status.Outcome == tunnelled {
		return false // both sides have ended; res is for the log only
	}
	defer x.res.Body.Close()
	keep = refused == nil && keepsAlive(x.req.Proto, x.req.Header) &&
		x.req.Body.consumed() && !x.closing.Load()
	keep, err = x.send(x.res, keep)
	x.aborted = err != nil
	return keep && err == nil
}

// answer lives the life of a request:
//  1. readRequest has read the head. What two programs could read in two ways
//     was refused.
//  2. May this client make it (admit)?
//  3. CONNECT becomes a tunnel.
//  4. Asked as a server, we answer with a page of our own, a file, or
//     /host/path.
//  5. The cache answers, if what it has is fresh.
//  6. Else it asks the origin, one request for all who want the same, and
//     stores what comes beside its way to the clients.
//
// Then serve sends the response and logs it.
func (x *exchange) answer() (*Response, error) {
	if err := x.admit(); err != nil {
		return nil, err
	}
	if x.req.Method == "CONNECT" {
		return x.tunnel()
	}
	if x.req.Direct {
		return x.answerAsServer()
	}
	return x.fetch(x.req)
}

// fetch answers a request from the cache, or with the help of its origin, and
// adds to the response by whom and how that was done.
func (x *exchange) fetch(req *Request) (*Response, error) {
	// Max-Forwards limits how far OPTIONS goes (RFC 9110 §7.6.2).
	if req.Method == "OPTIONS" {
		hops, err := strconv.ParseUint(req.Get("Max-Forwards"), 10, 62)
		switch {
		case err != nil: // it says nothing
		case hops == 0:
			return x.page(200, "text/plain", ""), nil
		default:
			hop := Field{"Max-Forwards", fmt.Sprint(hops - 1)}
			onward := *req
			onward.Header = append(req.Without("Max-Forwards"), hop)
			req = &onward
		}
	}
	res, status, err := x.cache.roundTrip(req, x.askOrigin)
	x.status = status
	if err != nil {
		return nil, err
	}
	res.Header = append(res.Header, x.origins.via(res.Proto), Field{"Cache-Status", status.String()})
	return res, nil
}

// askOrigin sends a request to its origin. A response without a valid date gets one
// (RFC 9110 §6.6.1).
func (x *exchange) askOrigin(req *Request) (*Response, error) {
	res, err := x.origins.roundTrip(req, x.checkAddress, x.passInterim)
	if err != nil {
		return nil, err
	}
	x.origin = res.Origin
	if httpDate(res.Get("Date")).IsZero() {
		res.Header = append(res.Without("Date"), dateField("Date", x.cache.now()))
	}
	return res, nil
}

// passInterim passes on what comes before the final response, such as Early
// Hints (103). Clients of HTTP/1.0 know no such thing.
func (x *exchange) passInterim(res *Response) {
	if x.req.Proto != "HTTP/1.0" {
		res.Header = append(res.Header, x.origins.via(res.Proto))
		x.send(res, true)
	}
}

// send sends the client a response, and reports whether another request may
// follow. To a browser an answer to /host/path belongs to the same origin as our
// own pages. So it is put into a sandbox, where its scripts can't read those, and
// it sets no cookies.
func (x *exchange) send(res *Response, keep bool) (bool, error) {
	if x.byPath {
		const sandbox = "sandbox allow-scripts allow-forms allow-popups allow-downloads"
		res.Header = append(res.Without("Set-Cookie", "Set-Cookie2", "Clear-Site-Data"),
			Field{"Content-Security-Policy", sandbox})
	}
	return writeResponse(x.client, x.req, res, keep)
}

// tunnel joins the client with the host that it names, until both have ended.
// What goes through it is not looked at; most of it is HTTPS.
func (x *exchange) tunnel() (*Response, error) {
	x.status.Outcome = miss // until it stands: Squid logs a tunnel that fails so
	origin, err := dial(x.req.URL.Authority, x.checkAddress)
	if err != nil {
		return nil, err
	}
	defer origin.Close()
	to := origin.RemoteAddr().(*net.TCPAddr)
	self := to.IP.IsLoopback() || to.IP.Equal(origin.LocalAddr().(*net.TCPAddr).IP)
	if self && to.Port == x.client.LocalAddr().(*net.TCPAddr).Port {
		return nil, errorf(508, "a tunnel to this proxy itself: %s", x.req.URL.Authority)
	}
	x.status.Outcome = tunnelled
	x.origin = origin.address()
	x.client.writeHead("HTTP/1.1 200 Connection established")
	x.client.Flush()
	join(x.client, origin, guard)
	return &Response{Status: 200}, nil // for the log
}

// Outcomes of requests that the cache has no part in.
const (
	none      outcome = "NONE"
	denied    outcome = "TCP_DENIED"
	tunnelled outcome = "TCP_TUNNEL"
)

// page makes a response of our own. Its Cross-Origin-Resource-Policy keeps
// pages elsewhere from using it as a script or an image.
func (x *exchange) page(status int, kind, text string) *Response {
	h := Header{dateField("Date", x.cache.now()), {"Content-Type", kind},
		{"Cross-Origin-Resource-Policy", "same-origin"}}
	return &Response{Status: status, Reason: statusText[status], Header: h,
		Length: int64(len(text)), Body: io.NopCloser(strings.NewReader(text))}
}

// errorPage tells a client why it gets nothing else. What is refused is logged as
// denied.
func (x *exchange) errorPage(err error) *Response {
	var told *statusError
	if !errors.As(err, &told) {
		told = x.originError(err)
	}
	res := x.page(told.code, "text/plain; charset=utf-8", told.text+"\n")
	challenge, asks := map[int]string{401: "WWW-Authenticate", 407: "Proxy-Authenticate"}[told.code]
	if asks {
		res.Header = append(res.Header, Field{challenge, `Basic realm="proxy"`})
	}
	if asks || told.code == 403 {
		x.status.Outcome = denied
	}
	return res
}

// originError says what is wrong with an origin: 504 if it took too long, and
// else 502. For a direct request a host that does not exist is a 404, as it may have
// meant a file.
func (x *exchange) originError(err error) *statusError {
	host := x.req.URL.Authority
	var lookup *net.DNSError
	noHost := errors.As(err, &lookup) && lookup.IsNotFound
	switch {
	case noHost && x.req.Direct:
		return &statusError{404, "there is neither a file nor a host for " + x.req.Target}
	case noHost:
		return &statusError{502, host + ": no such host"}
	case os.IsTimeout(err):
		return &statusError{504, fmt.Sprintf("%s: %v", host, err)}
	}
	return &statusError{502, fmt.Sprintf("%s: %v", host, err)}
}

// admit decides whether this client may make this request. /proxy.pac needs no
// password: a browser fetches it before it can ask the user for one.
func (x *exchange) admit() error {
	ip := x.client.address()
	allowed := ip.IsPrivate() || ip.IsLinkLocalUnicast() // unless -allow tells
	if x.allow.given {
		allowed = x.allow.hasAddress(ip)
	}
	field, refusal := "Proxy-Authorization", 407
	if x.req.Direct {
		field, refusal = "Authorization", 401
	}
	expect := cmp.Or(x.req.Get("Expect"), "100-continue") // no such field is fine, too
	switch {
	case x.deny.hasAddress(ip), !allowed && !ip.IsLoopback():
		return errorf(403, "clients at %s may not use this proxy", ip)
	case x.req.ownPath() != "/proxy.pac" && !x.isPassword(x.req.Get(field)):
		return errorf(refusal, "this proxy needs a user name and a password")
	case x.origins.hasSent(x.req):
		return errorf(508, "this request has been here before")
	case !equalFold(expect, "100-continue"):
		return errorf(417, "nothing is known of the expectation %+.200q", expect)
	case x.req.Method == "TRACE":
		return errorf(405, "TRACE is not supported")
	}
	return x.checkHost(x.req.URL)
}

// isPassword reports whether credentials are those of -auth. Without that flag
// all are good enough.
func (c *config) isPassword(credentials string) bool {
	if c.auth == "" {
		return true
	}
	scheme, given, _ := strings.Cut(credentials, " ")
	given = strings.TrimLeft(given, " ")
	right := subtle.ConstantTimeCompare([]byte(given), []byte(c.auth)) == 1
	return right && equalFold(scheme, "Basic")
}

// checkHost refuses a blocked host, and an address that checkAddress refuses, before
// anything is looked up. A direct request names none yet.
func (x *exchange) checkHost(u URL) error {
	host, _, _ := net.SplitHostPort(u.Authority)
	if ip, err := netip.ParseAddr(host); err == nil {
		return x.checkAddress(ip.Unmap())
	}
	if x.block.hasHost(host) {
		return errorf(403, "%s is blocked", host)
	}
	return nil
}

// checkAddress refuses addresses that are blocked, and inner ones unless the client
// is on this machine. It is asked again for every address that is dialed,
// whatever name leads there.
func (x *exchange) checkAddress(ip netip.Addr) error {
	addresses := []netip.Addr{ip}
	if ip.IsUnspecified() { // which leads to this machine
		addresses = append(addresses, netip.IPv6Loopback(), netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	}
	if slices.ContainsFunc(addresses, x.block.hasAddress) {
		return errorf(403, "%s is blocked", ip)
	}
	if isInner(ip) && !x.client.address().IsLoopback() {
		return errorf(403, "%s is for clients on this machine only", ip)
	}
	return nil
}

// answerAsServer answers a request to the proxy itself: the status page, the
// configuration of a browser, a file, or /host/path. Host has to be one of our
// names. Otherwise a foreign page could give its own name our address (DNS
// rebinding), and read what is for this machine.
func (x *exchange) answerAsServer() (*Response, error) {
	here := x.client.LocalAddr().(*net.TCPAddr).AddrPort()
	host, port, _ := net.SplitHostPort(x.req.Host)
	ip, _ := netip.ParseAddr(host)
	ours := host == "localhost" || ip.IsLoopback() || ip == here.Addr().Unmap()
	if !ours || port != strconv.Itoa(int(here.Port())) {
		return nil, errorf(403, "Host is not a name of this proxy: %q", x.req.Host)
	}

	name := x.req.ownPath()
	get := x.req.Method == "GET" || x.req.Method == "HEAD"
	switch {
	case name == "*":
		return x.page(200, "text/plain", ""), nil
	case name == "/" && get:
		if x.auth == "" && !x.client.address().IsLoopback() {
			return nil, errorf(403, "without -auth this page is for this machine only")
		}
		return x.page(200, "text/html; charset=utf-8", x.journal.statusPage(x.cache)), nil
	case name == "/proxy.pac":
		return x.page(200, "application/x-ns-proxy-autoconfig", fmt.Sprintf(pac, x.req.Host)), nil
	}
	if get {
		if res := x.localFile(name[1:]); res != nil {
			return res, nil
		}
	}
	return x.fetchByPath()
}

// pac tells a browser to ask this proxy, and to ask for its own pages directly.
const pac = `function FindProxyForURL(url, host) {
	return shExpMatch(url, "http://%[1]s/*") ? "DIRECT" : "PROXY %[1]s";
}
`

// fetchByPath answers /www.example.com/a/b with that page, as in the web proxy lab
// of Kurose and Ross, "Computer Networking". The cookies and passwords that a browser
// has for us are not for that host.
func (x *exchange) fetchByPath() (*Response, error) {
	req := *x.req
	var err error
	req.URL, err = parseURL(strings.TrimPrefix(x.req.Target, "/"))
	if err != nil {
		return nil, errorf(404, "there is neither a file nor a host for %s", x.req.Target)
	}
	if err := x.checkHost(req.URL); err != nil {
		return nil, err
	}
	req.Header = req.Without("Authorization", "Cookie")
	x.req = &req
	x.byPath = true
	return x.fetch(&req)
}

// Escapes in the path of a file, such as %20.
var escapes = regexp.MustCompile("%[0-9A-Fa-f]{2}")

// localFile answers with a file from -files, to this machine only: a regular
// file, not hidden, that every user of the machine may read. It returns nil if there
// is none.
func (x *exchange) localFile(escaped string) *Response {
	name := escapes.ReplaceAllStringFunc(escaped, func(s string) string {
		b, _ := hex.DecodeString(s[1:])
		return string(b)
	})
	hidden := strings.Contains("/"+name, "/.") || strings.Contains(name, `\`)
	if x.files == nil || hidden || !x.client.address().IsLoopback() {
		return nil
	}
	info, err := x.files.Stat(name)
	if err != nil || !info.Mode().IsRegular() || info.Mode().Perm()&0o004 == 0 {
		return nil
	}
	file, err := x.files.Open(name)
	if err != nil {
		return nil
	}
	res := x.page(200, cmp.Or(mime.TypeByExtension(path.Ext(name)), "application/octet-stream"), "")
	res.Header = append(res.Header, dateField("Last-Modified", info.ModTime()))
	res.Length = info.Size()
	res.Body = newFileBody(file, 0, info.Size())
	tailor(res, x.req)
	return res
}

// A config is the command line, read and checked. Nothing else in the program
// looks at flags or at the environment.
type config struct {
	address string // to listen on
	caching CacheConfig
	files   *os.Root // nil if no files are served
	auth    string   // user:password in Base64, as clients send it; empty if none is needed
	allow   hostList // clients
	deny    hostList // clients
	block   hostList // destinations
}

// parseFlags reads the command line. Flags may stand before and after the
// address. For -h and -version it prints what they ask for, and ends the
// program.
func parseFlags(args []string) (config, error) {
	c := config{caching: CacheConfig{limit: 1 << 30, now: time.Now}}
	c.block.names = map[string]bool{} // the other lists take no names
	flags := flag.NewFlagSet("proxy", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&c.caching.dir, "cache", cmp.Or(os.Getenv("CACHE_DIRECTORY"), "cache"),
		"`directory` of the cache")
	flags.Func("size", "most `bytes` that the cache holds, such as 500M or 10G (default 1G)", c.setSize)
	flags.IntVar(&c.caching.uses, "uses", 1, "store at the `n`th request for a URL within 10 minutes")
	flags.Func("ttl", "least `duration` of freshness, such as 10m, of what states none", c.setTTL)
	files := flags.String("files", ".", "`directory` of files for direct requests, empty for none")
	flags.Func("allow", "`list` of other machines that may ask: addresses, CIDRs, @file", c.allow.read)
	flags.Func("deny", "`list` of clients that may not ask: addresses, CIDRs, or @file", c.deny.read)
	flags.Func("block", "`list` of refused hosts and all below, addresses, CIDRs, @file", c.block.read)
	flags.Func("auth", "`user:password` that clients must give, or @file", c.setAuth)
	version := flags.Bool("version", false, "print the version")

	err := flags.Parse(args)
	for err == nil && flags.NArg() > 0 {
		if c.address != "" {
			return c, fmt.Errorf("two addresses: %s and %s", c.address, flags.Arg(0))
		}
		c.address = flags.Arg(0)
		err = flags.Parse(flags.Args()[1:])
	}
	switch {
	case err == flag.ErrHelp:
		fmt.Println("usage: proxy [flags] [port | host:port]")
		flags.SetOutput(os.Stdout)
		flags.PrintDefaults()
		os.Exit(0)
	case err != nil:
		return c, err
	case *version:
		info, _ := debug.ReadBuildInfo()
		fmt.Println("proxy", info.Main.Version, info.GoVersion)
		os.Exit(0)
	}
	err = c.complete(*files)
	return c, err
}

// complete fills in the address, checks the command line as a whole, and opens
// the directory of -files. A bare port is one of this machine only.
func (c *config) complete(files string) error {
	if strings.Trim(c.address, "0123456789") == "" {
		c.address = "127.0.0.1:" + cmp.Or(c.address, "8899")
	}
	_, port, err := net.SplitHostPort(c.address)
	_, portError := strconv.ParseUint(port, 10, 16)
	switch {
	case cmp.Or(err, portError) != nil:
		return fmt.Errorf("neither a port nor host:port: %q", c.address)
	case c.caching.dir == "":
		return errors.New("-cache must name a directory")
	case c.caching.uses < 1:
		return errors.New("-uses must be at least 1")
	case files == "":
		return nil
	}
	c.files, err = os.OpenRoot(files)
	if err != nil {
		return fmt.Errorf("-files: %w", err)
	}
	return nil
}

// setSize reads -size: bytes, or multiples of 1024 of them with K, M, G or T.
func (c *config) setSize(s string) error {
	number := strings.TrimRight(s, "KMGT")
	shift := 10 * slices.Index([]string{"", "K", "M", "G", "T"}, s[len(number):])
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || shift < 0 || n < 0 || n > maxLength>>shift {
		return errors.New("a size looks like 5000, 500M or 10G")
	}
	c.caching.limit = n << shift
	return nil
}

// setTTL reads -ttl. The flag package would only say "parse error".
func (c *config) setTTL(s string) (err error) {
	c.caching.ttl, err = time.ParseDuration(s)
	if err != nil || c.caching.ttl < 0 {
		return errors.New("a duration looks like 90s, 10m or 1h30m")
	}
	return nil
}

// setAuth reads -auth. An empty password looks like none at all, and several lines
// in a file look like several users, so both are refused.
func (c *config) setAuth(s string) error {
	text, err := textOf(s)
	if err != nil {
		return err
	}
	user, password, _ := strings.Cut(text, ":")
	if user == "" || password == "" || strings.Contains(text, "\n") {
		return errors.New("it must be one user:password")
	}
	c.auth = base64.StdEncoding.EncodeToString([]byte(text))
	return nil
}

// textOf returns the text of a flag or, if that is @file, that of the file
// without its comments.
func textOf(s string) (string, error) {
	file, isFile := strings.CutPrefix(s, "@")
	if !isFile {
		return s, nil
	}
	text, err := os.ReadFile(file)
	return strings.TrimSpace(comments.ReplaceAllString(string(text), "")), err
}

// Comments are lines whose first character, but for white space, is a "#".
var comments = regexp.MustCompile(`(?m)^\s*#.*$`)

// A hostList has addresses and networks, and names of hosts, which include all
// that is below them.
type hostList struct {
	given    bool // on the command line, though perhaps empty
	networks []netip.Prefix
	names    map[string]bool // nil where there may be none
}

// read adds what one use of a flag says: entries with commas or white space
// between them, or @file. A flag can be used several times.
func (l *hostList) read(s string) error {
	l.given = true
	text, err := textOf(s)
	if err != nil {
		return err
	}
	separates := func(c rune) bool { return c <= ' ' || c == ',' }
	for _, entry := range strings.FieldsFunc(text, separates) {
		if err := l.add(entry); err != nil {
			return err
		}
	}
	return nil
}

// add adds an entry, in the spelling in which requests are compared with it: IPv4
// addresses are unmapped, and names are in lower case.
func (l *hostList) add(entry string) error {
	if ip, err := netip.ParseAddr(strings.Trim(entry, "[]")); err == nil {
		ip = ip.Unmap().WithZone("")
		l.networks = append(l.networks, netip.PrefixFrom(ip, ip.BitLen()))
		return nil
	}
	if network, err := netip.ParsePrefix(entry); err == nil {
		if network.Addr().Is4In6() {
			network = netip.PrefixFrom(network.Addr().Unmap(), max(0, network.Bits()-96))
		}
		l.networks = append(l.networks, network)
		return nil
	}
	authority, err := parseAuthority(strings.Trim(entry, "."), "80")
	if err != nil || strings.Contains(entry, ":") || l.names == nil {
		return fmt.Errorf("%q is not an address, a CIDR or, for -block, a host", entry)
	}
	l.names[strings.TrimSuffix(authority, ":80")] = true
	return nil
}

// hasAddress reports whether an address is in one of the networks.
func (l *hostList) hasAddress(ip netip.Addr) bool {
	return slices.ContainsFunc(l.networks, func(n netip.Prefix) bool { return n.Contains(ip) })
}

// hasHost reports whether the list has the name of a host, or a domain above it.
func (l *hostList) hasHost(host string) bool {
	for name := strings.TrimRight(host, "."); name != ""; _, name, _ = strings.Cut(name, ".") {
		if l.names[name] {
			return true
		}
	}
	return false
}

// A journal is the access log, and what the status page tells of it. The page
// is made from the latest lines of the log itself, so both say the same.
type journal struct {
	begun time.Time
	to    io.Writer

	writing sync.Mutex // is held by flush, and guards
	written []byte     // lines that are; it takes turns with out, as growing anew costs 5 % of a hit

	sync.Mutex          // guards the rest
	out        []byte   // lines that are not written yet
	latest     []string // the last maxRecords lines, up to the URL, cut at maxShown or its query
	requests   int
	hits       int
	tunnels    int
	errors     int
	sent       int64 // bytes
	saved      int64 // those of hits
}

// log makes a line in Squid's native format.
func (x *exchange) log() {
	now := x.cache.now()
	sent := x.client.bytesSent() - x.before
	outcome := string(x.status.Outcome)
	kind, _, _ := strings.Cut(x.res.Get("Content-Type"), ";")
	asked := "HIER_NONE/-"
	if x.aborted {
		outcome += "_ABORTED"
	}
	if x.origin.IsValid() {
		asked = "HIER_DIRECT/" + x.origin.String()
	}
	took := strconv.FormatInt(now.Sub(x.start).Milliseconds(), 10)
	url := printable(cmp.Or(x.req.URL.String(), "error:invalid-request"))

	// Piece by piece: Appendf would take 2 % of a hit more.
	line := make([]byte, 0, 512)
	line = strconv.AppendInt(line, now.UnixMilli(), 10)
	line = slices.Insert(line, len(line)-3, '.')          // seconds.milliseconds
	line = append(line, "       "[min(len(took), 6):]...) // to the right in a column of six
	line = append(line, took+" "...)
	line = x.client.address().AppendTo(line)
	line = append(line, " "+outcome+"/"...)
	line = strconv.AppendInt(line, int64(x.res.Status), 10)
	line = append(line, ' ')
	line = strconv.AppendInt(line, sent, 10)
	line = append(line, " "+printable(x.req.Method)...)
	plain, _, _ := strings.Cut(url, "?")
	shown := string(line) + " " + plain[:min(len(plain), maxShown)]
	line = append(line, ' ')
	line = append(line, url...)
	line = append(line, " - "+asked+" "+printable(kind)+"\n"...)
	x.record(line, shown, sent)
}

// record keeps a line of the log until it is written, and counts it for the status
// page, which shows it without the query of its URL.
func (x *exchange) record(line []byte, shown string, sent int64) {
	j := &x.journal
	j.Lock()
	defer j.Unlock()
	if len(j.out) < maxUnwritten {
		j.out = append(j.out, line...)
	}
	if x.req.ownPath() == "/" {
		return // the status page does not count itself
	}
	j.requests++
	j.sent += sent
	switch {
	case x.status.Outcome.isHit():
		j.hits++
		j.saved += sent
	case x.status.Outcome == tunnelled:
		j.tunnels++
	case x.res.Status >= 400:
		j.errors++
	}
	j.latest = append(j.latest[max(0, len(j.latest)-maxRecords+1):], shown)
}

// printable turns what a client or an origin sent into one field of the log. It
// escapes what could be taken for another field or line.
func printable(s string) string {
	strange := func(c rune) bool { return c <= ' ' || c > '~' || c == '"' }
	if !strings.ContainsFunc(s, strange) {
		return cmp.Or(s, "-")
	}
	var b []byte
	for _, c := range []byte(s) {
		if strange(rune(c)) {
			b = fmt.Appendf(b, "%%%02X", c)
		} else {
			b = append(b, c)
		}
	}
	return string(b)
}

// flush writes the log out. Lines that can't be written, as on a full disk, are
// lost. While a reader takes none, as a terminal that is paused, exchanges go on, and
// lines beyond maxUnwritten are lost.
func (j *journal) flush() {
	j.writing.Lock()
	defer j.writing.Unlock()
	j.Lock()
	lines := j.out
	j.out = j.written[:0]
	j.Unlock()
	if len(lines) > 0 {
		j.to.Write(lines)
	}
	j.written = lines
}

// summary tells what has been counted. The caller holds the lock.
func (j *journal) summary() string {
	share := j.hits * 100 / max(1, j.requests)
	return fmt.Sprintf("%d requests, %d%% of them answered from the cache, %d tunnels, %d errors; "+
		"%.1f MiB sent, %.1f MiB of them from the cache",
		j.requests, share, j.tunnels, j.errors, mebibytes(j.sent), mebibytes(j.saved))
}

// mebibytes converts bytes to MiB.
func mebibytes(n int64) float64 { return float64(n) / (1 << 20) }

// statusHTML is the page: no script, nothing from elsewhere, and colours
// as the browser has them, light or dark. On a narrow screen cells flow.
const statusHTML = `<!DOCTYPE html><html lang=en><meta charset=utf-8><title>proxy on %[1]s</title>
<meta name=viewport content="width=device-width"><meta name=color-scheme content="light dark">
<meta http-equiv=refresh content=5><link rel=icon href=data:,><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:64em;margin:auto;padding:1em}
h1,h2{line-height:1.2}h2{font-size:1.2em;margin:1.5em 0 .3em}table{border-collapse:collapse;width:100%%}
tr{border-bottom:1px solid #8884}td{padding:.2em 1.2em .2em 0;vertical-align:top;white-space:nowrap}
td:last-child{width:99%%;padding-right:0;white-space:normal;overflow-wrap:anywhere}
@media(max-width:45em){tr{display:block;padding:.3em 0}td{display:inline-block;padding-block:0}
td:last-child{width:auto}}</style>
<h1>proxy on %[1]s</h1><p>Since %[2]s: %[3]s.
<p>The cache holds %[4]d files, %.1[5]f of at most %.1[6]f MiB.
<h2>Busiest hosts of the last %[7]d requests</h2><table>%[8]s</table>
<h2>Their outcomes</h2><table>%[9]s</table>
<h2>The latest</h2><table>%[10]s</table>`

// statusPage tells how the proxy is doing. It shows the latest lines of the log,
// and counts hosts and outcomes in all that are kept.
func (j *journal) statusPage(c *Cache) string {
	files, size := c.usage()
	name, _ := os.Hostname()
	outcomes, hosts, rows := map[string]int{}, map[string]int{}, ""
	j.Lock()
	defer j.Unlock()
	for i, line := range slices.Backward(j.latest) {
		f := strings.Fields(html.EscapeString(line)) // the columns of log; no URL becomes markup
		took, client, outcome, sent, method, url := f[1], f[2], f[3], f[4], f[5], f[6]
		outcomes[outcome]++
		host, isURL := strings.CutPrefix(url, "http://")
		if isURL || method == "CONNECT" {
			host, _, _ = strings.Cut(host, "/")
			hosts[host]++
		}
		if i >= len(j.latest)-maxRows {
			seconds, _ := strconv.ParseFloat(f[0], 64)
			ago := c.now().Sub(time.Unix(int64(seconds), 0)).Truncate(time.Second)
			rows += fmt.Sprintf("<tr><td>%v ago<td>%s<td>%s<td>%s ms<td>%s bytes<td>%s %s",
				ago, client, outcome, took, sent, method, url)
		}
	}
	return fmt.Sprintf(statusHTML, html.EscapeString(name), j.begun.Format(time.DateTime), j.summary(),
		files, mebibytes(size), mebibytes(c.limit),
		len(j.latest), ranking(hosts), ranking(outcomes), rows)
}

// ranking lists the ten largest counts. Equal ones stand in the order of their
// names, so that nothing moves when the page is loaded again.
func ranking(counts map[string]int) (rows string) {
	names := slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(counts[b]-counts[a], strings.Compare(a, b))
	})
	for _, name := range names[:min(10, len(names))] {
		rows += fmt.Sprintf("<tr><td>%d<td>%s", counts[name], name)
	}
	return rows
}

// Counts, sizes and waits.
const (
	maxUnwritten = 4 << 20          // bytes of the log that wait for its reader
	maxRecords   = 1000             // requests in whose hosts and outcomes the status page counts
	maxRows      = 30               // requests that it lists
	maxShown     = 300              // bytes of a URL there
	stopWait     = 10 * time.Second // for exchanges under way when the program is to stop
)
