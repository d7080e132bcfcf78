package main

// The tests, in the order of the code and of the RFCs. A rule is a table on
// plain values; behaviour is a short script over sockets, with net/http as the
// independent oracle on both sides; every row names its section. To find the
// test of a rule, search for "RFC 9111 §4.2" and the like.
//
// start starts a proxy in this process, with a clock that the test moves, and
// newOrigin an origin that counts what it is asked. A response is printed as
// `200 "body" hit`, so that expectations read like a transcript.

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/textproto"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"time"
)

// patience is for what takes milliseconds, on a busy machine too.
const patience = 10 * time.Second

// TestMain runs the program itself where a test has started this binary again
// as one, see command.
func TestMain(m *testing.M) {
	if os.Getenv("PROXY_TEST_RUNS_MAIN") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// A testProxy is a proxy under test.
type testProxy struct {
	*proxy
	t      testing.TB
	addr   string // host:port
	dir    string // of the cache
	log    *buffer
	ahead  *atomic.Int64 // by how much its clock is ahead of ours
	client *http.Transport
}

// start starts a proxy on a free port of 127.0.0.1, with flags as on the
// command line. It ends with the test, and has to end in time.
func start(t testing.TB, flags ...string) *testProxy {
	t.Helper()
	return startOn(t, "127.0.0.1:0", t.TempDir(), flags...)
}

// startOn does so on an address, with a cache directory.
func startOn(t testing.TB, address, dir string, flags ...string) *testProxy {
	t.Helper()
	config, err := parseFlags(append([]string{"-cache", dir, "-files", ""}, append(flags, address)...))
	if err != nil {
		t.Fatal(err)
	}
	p := &testProxy{t: t, dir: dir, log: new(buffer), ahead: new(atomic.Int64)}
	config.caching.now = func() time.Time { return time.Now().Add(time.Duration(p.ahead.Load())) }
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	p.proxy, err = newProxy(config, listener.Addr(), p.log)
	if err != nil {
		t.Fatal(err)
	}
	p.addr = listener.Addr().String()
	go p.serve(listener)
	p.client = &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 100,
		Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: p.addr})}
	t.Cleanup(func() {
		p.client.CloseIdleConnections()
		p.closing.Store(true)
		listener.Close()
		eventually(t, "no exchange is under way", func() bool { return p.active.Load() == 0 })
	})
	return p
}

// move turns the proxy's clock on.
func (p *testProxy) move(d time.Duration) { p.ahead.Add(int64(d)) }

// lines returns the log, once it has n lines.
func (p *testProxy) lines(n int) []string {
	p.t.Helper()
	eventually(p.t, fmt.Sprintf("%d lines in the log", n), func() bool {
		p.journal.flush()
		return strings.Count(p.log.String(), "\n") >= n
	})
	return strings.Split(strings.TrimSuffix(p.log.String(), "\n"), "\n")
}

// A reply is what a client got.
type reply struct {
	status int
	http.Header
	body string
	err  error // how it ended too early
}

// String prints a reply: its status, the body if that is short, the range, the
// outcome by Cache-Status, and that it was cut.
func (r reply) String() string {
	if r.status == 0 {
		return "no answer"
	}
	text := strconv.Itoa(r.status)
	if len(r.body) > 100 {
		text += fmt.Sprintf(" %d bytes", len(r.body))
	} else if r.body != "" {
		text += fmt.Sprintf(" %q", r.body)
	}
	if extent := r.Get("Content-Range"); extent != "" {
		text += " " + extent
	}
	if r.err != nil {
		text += " cut"
	}
	status := r.Get("Cache-Status")
	switch {
	case strings.Contains(status, "; hit"):
		text += ", hit"
	case strings.Contains(status, "collapsed"):
		text += ", collapsed"
	case strings.Contains(status, "fwd-status=304"):
		text += ", renewed"
	case strings.Contains(status, "; fwd="):
		text += ", miss"
	}
	return text
}

// do sends a request through the proxy. Fields are written "A: b | C: d".
func (p *testProxy) do(method, url, fields, body string) reply {
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return reply{err: err}
	}
	for _, f := range splitFields(fields) {
		req.Header.Add(f.Name, f.Value)
	}
	res, err := p.client.RoundTrip(req)
	if err != nil {
		return reply{err: err}
	}
	return readReply(res)
}

func (p *testProxy) get(url, fields string) reply { return p.do("GET", url, fields, "") }

func readReply(res *http.Response) reply {
	b, err := io.ReadAll(res.Body)
	res.Body.Close()
	return reply{res.StatusCode, res.Header, string(b), err}
}

// splitFields makes a header of "A: b | C: d".
func splitFields(fields string) (h Header) {
	for field := range strings.SplitSeq(fields, " | ") {
		if name, value, ok := strings.Cut(field, ":"); ok {
			h = append(h, Field{name, strings.TrimSpace(value)})
		}
	}
	return h
}

// A wire is a connection to the proxy on which the test speaks bytes.
type wire struct {
	net.Conn
	in *bufio.Reader
	t  testing.TB
}

func (p *testProxy) dial() *wire {
	p.t.Helper()
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(2 * patience))
	return &wire{c, bufio.NewReader(c), p.t}
}

func (w *wire) say(text string) { io.WriteString(w, text) }

// reply reads one reply to a request of a method.
func (w *wire) reply(method string) reply {
	res, err := http.ReadResponse(w.in, &http.Request{Method: method})
	if err != nil {
		return reply{err: err}
	}
	return readReply(res)
}

// rest reads all that comes until the connection is closed.
func (w *wire) rest() string {
	b, _ := io.ReadAll(w.in)
	return string(b)
}

// say sends text on a new connection, and returns all that comes back.
func (p *testProxy) say(text string) string {
	p.t.Helper()
	w := p.dial()
	defer w.Close()
	go w.say(text) // what is refused may not be read to its end
	return w.rest()
}

// request is the head of a GET that ends its connection, with more lines.
func request(url, lines string) string {
	host, _, _ := strings.Cut(strings.TrimPrefix(url, "http://"), "/")
	return "GET " + url + " HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n" + lines + "\r\n"
}

// An origin is a web server that counts what it is asked. It answers from its
// pages: with 304 where a page has the validator that is asked about.
type origin struct {
	*httptest.Server
	host  string
	clock func() time.Time
	mu    sync.Mutex
	pages map[string]originPage
	asked map[string][]*http.Request
}

// A originPage is what an origin answers for a path: do, or a status, fields and a
// body. In fields @-60 is the date of a minute ago.
type originPage struct {
	status int
	fields string
	body   string
	do     http.HandlerFunc
}

func newOrigin(p *testProxy) *origin {
	o := &origin{clock: p.cache.now, pages: map[string]originPage{}, asked: map[string][]*http.Request{}}
	o.Server = httptest.NewServer(o)
	o.host = o.Listener.Addr().String()
	p.t.Cleanup(o.CloseClientConnections)
	return o
}

// put sets a page with status 200, and set any.
func (o *origin) put(path, fields, body string) { o.set(path, originPage{200, fields, body, nil}) }

func (o *origin) set(path string, p originPage) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p.fields = o.at(p.fields)
	o.pages[path] = p
}

// at puts dates in the place of @60 and the like.
func (o *origin) at(text string) string {
	return regexp.MustCompile(`@-?\d+`).ReplaceAllStringFunc(text, func(s string) string {
		seconds, _ := strconv.Atoi(s[1:])
		return o.clock().Add(time.Duration(seconds) * time.Second).UTC().Format(http.TimeFormat)
	})
}

func (o *origin) url(path string) string { return "http://" + o.host + path }

// requests returns those for a path so far, their bodies read.
func (o *origin) requests(path string) []*http.Request {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.asked[path])
}

func (o *origin) count(path string) int { return len(o.requests(path)) }

func (o *origin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, _ := io.ReadAll(r.Body)
	r.Body = io.NopCloser(bytes.NewReader(b))
	o.mu.Lock()
	page := o.pages[r.URL.Path]
	o.asked[r.URL.Path] = append(o.asked[r.URL.Path], r)
	o.mu.Unlock()
	if page.do != nil {
		page.do(w, r)
		return
	}
	h := w.Header()
	h.Set("Date", o.at("@0"))
	h.Set("Content-Type", "text/plain")
	for _, f := range splitFields(page.fields) {
		if equalFold(f.Name, "Date") {
			h.Set(f.Name, f.Value)
		} else {
			h.Add(f.Name, f.Value)
		}
	}
	etag, changed := h.Get("ETag"), h.Get("Last-Modified")
	status := cmp.Or(page.status, 404)
	tags := r.Header.Get("If-None-Match")
	if tags != "" && tags == etag || tags == "" && changed != "" && r.Header.Get("If-Modified-Since") == changed {
		status = 304
	}
	w.WriteHeader(status)
	if status != 304 {
		io.WriteString(w, page.body)
	}
}

// A rawOrigin is an origin that speaks bytes.
type rawOrigin struct {
	host  string
	got   buffer // all that came
	conns atomic.Int64
}

// listen starts an origin that calls talk for each connection.
func listen(t testing.TB, address string, talk func(c net.Conn, in *bufio.Reader)) *rawOrigin {
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { l.Close() })
	o := &rawOrigin{host: l.Addr().String()}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			o.conns.Add(1)
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(3 * patience))
				talk(c, bufio.NewReader(io.TeeReader(c, &o.got)))
			}()
		}
	}()
	return o
}

// script starts an origin that answers one head after the other, of all
// connections, with one text after the other, and the last for good. After one
// that ends in "\x00" it closes the connection.
func script(t testing.TB, texts ...string) *rawOrigin {
	var n atomic.Int64
	return listen(t, "127.0.0.1:0", func(c net.Conn, in *bufio.Reader) {
		for readHead(in) != "" {
			text, closes := strings.CutSuffix(texts[min(int(n.Add(1)), len(texts))-1], "\x00")
			io.WriteString(c, text)
			if closes {
				return
			}
		}
	})
}

// readHead reads up to an empty line.
func readHead(in *bufio.Reader) (text string) {
	for !strings.HasSuffix(text, "\r\n\r\n") {
		line, err := in.ReadString('\n')
		if err != nil {
			return ""
		}
		text += line
	}
	return text
}

// A buffer is written to and read at the same time.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * patience); !done(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("not in time: %s", what)
			return
		}
	}
}

// eq compares what is printed.
func eq(t testing.TB, what string, got, want any) {
	t.Helper()
	if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
		t.Errorf("%s: got %.500s, want %.500s", what, g, w)
	}
}

// match checks a text against an expression that has to fit all of it.
func match(t testing.TB, what, text, expr string) {
	t.Helper()
	if !regexp.MustCompile(`^(?s:` + expr + `)$`).MatchString(text) {
		t.Errorf("%s: %.1000q does not match %s", what, text, expr)
	}
}

// together runs f n times at once, and waits for all.
func together(n int, f func(i int)) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { f(i) })
	}
	all.Wait()
}

// bytesOf makes n bytes of all values, the same for the same n.
func bytesOf(n int) string {
	b := make([]byte, n)
	source := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)})
	source.Read(b)
	return string(b)
}

// files returns the names in a directory.
func files(dir string) (names []string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// entry is the file of a URL, which has to come.
func (p *testProxy) entry(url string) string {
	p.t.Helper()
	name := filepath.Join(p.dir, fileName(strings.TrimPrefix(url, "http://")))
	eventually(p.t, name, func() bool { _, err := os.Stat(name); return err == nil })
	return name
}

// The tests of request.go: what is read and what is refused, where bodies end,
// what arrives on the other side, and which connections are kept.

// A wireStub is a connection that has bytes to read, and notes its deadline.
type wireStub struct {
	net.Conn
	from     io.Reader
	deadline time.Time
}

func (s *wireStub) Read(p []byte) (int, error)    { return s.from.Read(p) }
func (s *wireStub) SetDeadline(d time.Time) error { s.deadline = d; return nil }
func (s *wireStub) RemoteAddr() net.Addr          { return &net.TCPAddr{} }
func (s *wireStub) Close() error                  { return nil }

// wireConn is a connection on which text comes, and wireSlow one on which its
// bytes come one by one.
func wireConn(text string) *conn { return newConn(&wireStub{from: strings.NewReader(text)}) }
func wireSlow(text string) *conn {
	return newConn(&wireStub{from: iotest.OneByteReader(strings.NewReader(text))})
}

// wireHead is the head of a request with more lines, and wireOK a response.
func wireHead(line, lines string) string { return line + " HTTP/1.1\r\nHost: x\r\n" + lines + "\r\n" }
func wireOK(lines, body string) string   { return "HTTP/1.1 200 OK\r\n" + lines + "\r\n" + body }

// wireAsk sends a request and reads the reply.
func wireAsk(w *wire, text string) reply {
	go w.say(text)
	method, _, _ := strings.Cut(text, " ")
	return w.reply(method)
}

// wireBody prints the body of a message, that it was cut, and what follows it.
func wireBody(c *conn) string {
	var b io.Reader
	if first, _ := c.in.Peek(5); string(first) == "HTTP/" {
		res, _ := readResponse(c, "GET")
		b = res.Body
	} else {
		req, _ := readRequest(c)
		b = req.Body
	}
	text, err := io.ReadAll(b)
	if err != nil {
		return fmt.Sprintf("%q cut", text)
	}
	rest, _ := io.ReadAll(c.in)
	return fmt.Sprintf("%q then %q", text, rest)
}

const (
	wireCoding = "Transfer-Encoding: chunked\r\n"
	wireHidden = "GET http://ORIGIN/hidden HTTP/1.1\r\nHost: ORIGIN\r\n\r\n"
	wirePage   = `([\w-]+: [ -~]+\r\n)+\r\n[ -~]{10,}\n` // one sentence
)

// RFC 9112 §11.2: what two programs could read in two ways is refused with one
// sentence, the connection ends, and the origin hears nothing of it, nor of a
// hidden request behind it.
func TestWireRefused(t *testing.T) {
	t.Parallel()
	const line, get = "CASE\r\nHost: ORIGIN\r\n\r\n", "GET http://ORIGIN/ HTTP/1.1\r\n"
	const post = "POST http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\n"
	long := strings.Repeat("a", 66<<10)
	p := start(t)
	o := listen(t, "127.0.0.1:0", func(c net.Conn, in *bufio.Reader) { readHead(in) })
	for _, test := range []struct{ rule, status, where, cases string }{
		{"RFC 9112 §2.2: a control character", "400", post + "CASE\r\n\r\n",
			"X: b\rContent-Length: 5|X: b\r|X\x00A: b|X: b\x00c|X: \x1b[31m|X: \x7f"},
		{"RFC 9112 §2.2: one in the first line", "400", line,
			"GET /\ra HTTP/1.1|GET /\x00 HTTP/1.1|\x16\x03\x01"},
		{"RFC 9112 §2.3: not HTTP", "400", "GET http://ORIGIN/CASE\r\n\r\n", "| http/1.1| HTTPS/1.1"},
		{"RFC 9112 §2.3: a version", "505", "GET / HTTP/CASE\r\n\r\n", "0.9|2.0|1.10|1|1.x|1.1 "},
		{"RFC 9112 §3: not three parts, one space apart", "400", "CASE HTTP/1.1\r\nHost: ORIGIN\r\n\r\n",
			"GET|GET |GET  /| GET /|GET / b|GET\t/|GET /\tb|GET: /"},
		{"RFC 9112 §3: a long line", "414", line, long + "|GET /" + long},
		{"RFC 9112 §3.2: a target", "400", "CASE HTTP/1.1\r\nHost: ORIGIN\r\n\r\n", `GET http://a\@b/|` +
			`GET http://a\b|GET http://a@b@c/|GET http:///|GET http:/a/|GET https://a/|GET a/|GET *|` +
			`CONNECT http://a/|CONNECT a@b|CONNECT a|CONNECT a:`},
		{"RFC 9112 §3.2: not one Host", "400", get + "CASE\r\n\r\n",
			"X: y|Host:|Host: a, b|Host: a\r\nHost: a|Host: a\r\nHost: b"},
		{"RFC 9110 §4.2.3: no host", "400", get + "Host: CASE\r\n\r\n", "a/b|:80|" +
			"a:0|a:65536|a:+80|a:http|a:1:2|user@a|a b|a%2eb|b\xfccher|\u212aelvin|" +
			"::1|[::1|[::1]a:80|[fe80::1%25lo]|[127.0.0.1]|[zz]"},
		{"RFC 9112 §5.1: no name, or a space behind it", "400", post + "CASE\r\n\r\n",
			"X : b|X\t: b|Transfer-Encoding : chunked|: b|X|X A: b|X\xe4: b"},
		{"RFC 9112 §5.2: a folded line", "400", get + "CASE\r\nHost: a\r\n\r\n",
			" X: b|X: b\r\n c|X: b\r\n\tc"},
		{"RFC 6585 §5: a large head", "431", post + "CASE\r\n\r\n",
			"X: " + long + "|" + long + "|" + strings.Repeat("a:\r\n", 260)},
		{"RFC 9112 §6.1: not chunked, once", "501", post + "Transfer-Encoding: CASE\r\n\r\n",
			"|,chunked|chunked, x|chunked, chunked|chunked\r\nTransfer-Encoding: chunked|" +
				"identity\r\nTransfer-Encoding: chunked|gzip, chunked|identity|xchunked|" +
				"\"chunked\"|chunked;q=1|\u00a0chunked|chun\u212aed"},
		{"RFC 9112 §6.1: HTTP/1.0", "501", "POST http://ORIGIN/ HTTP/1.0\r\nCASE\r\n", wireCoding},
		{"RFC 9112 §6.2: not one length of digits", "400", post + "Content-Length: CASE\r\n\r\nhello",
			"5\r\nContent-Length: 6|5\r\nContent-Length: 5|5, 6|+5|-5|0x5|5 5|5.|1_0||" +
				"99999999999999999999|18446744073709551621"},
		{"RFC 9112 §6.3: a length beside a coding", "400", post + "CASE\r\n0\r\n\r\n",
			"Content-Length: 5\r\n" + wireCoding + "|" + wireCoding + "Content-Length: 5\r\n"},
		{"RFC 9112 §7.1: a malformed first chunk", "400", post + wireCoding + "\r\nCASE",
			"5\nhello\r\n0\r\n\r\n|0\r\nX: y\n\r\n|0\r\nGET http://ORIGIN/ HTTP/1.1\r\n\r\n"},
		{"RFC 9112 §7.1.2: trailers", "431", post + wireCoding + "\r\n0\r\nCASE",
			strings.Repeat("a: b\r\n", 260)},
	} {
		for text := range strings.SplitSeq(test.cases, "|") {
			t.Run(fmt.Sprintf("%s/%.50q", test.rule, text), func(t *testing.T) {
				text = strings.Replace(test.where, "CASE", text, 1) + wireHidden
				got := p.say(strings.ReplaceAll(text, "ORIGIN", o.host))
				match(t, "answer", got, `HTTP/1\.1 `+test.status+` [ \w]+\r\n`+wirePage)
				eq(t, "at the origin", fmt.Sprintf("%d %q", o.conns.Load(), o.got.String()), `0 ""`)
			})
		}
	}
}

// RFC 9112 §3.2: whom a target asks for what. A host and port have one spelling.
func TestWireTarget(t *testing.T) {
	for _, test := range []struct{ rule, want, lines string }{
		{"RFC 9110 §4.2.3: names", "a_b:80 / ", "GET http://a_b|GET HTTP://A_b:/|GET http://a_b:0080"},
		{"IPv6", "[2001:db8::1]:80 / ", "GET http://[2001:DB8::0:1]|GET http://[2001:db8::1]:"},
		{"IPv4 in IPv6", "[::ffff:127.0.0.1]:1 / ", "GET http://[::FFFF:127.0.0.1]:1"},
		{"a query", "a:80 /?x=http://b@c/ ", "GET http://a/?x=http://b@c/|GET http://a?x=http://b@c/"},
		{"RFC 9110 §7.1: a fragment is dropped", "a:80 / ", "GET http://a/#d?e|GET http://a#/b@c"},
		{"RFC 9110 §4.2.4: userinfo is dropped", "[::1]:81 /b ", "GET http://user:pw@[::1]:81/b"},
		{"no path is repaired", `a:80 /b/../%2e%2E//c\d `, `GET http://a/b/../%2e%2E//c\d`},
		{"§3.2.1: a path asks us", " /a/b?c direct", "GET /a/b?c"},
		{"§3.2.3: CONNECT", "[::1]:80  ", "CONNECT [::1]:80"},
		{"§3.2.4: OPTIONS of a server", "a:80 * ", "OPTIONS http://a"},
		{"§3.2.4: OPTIONS of us", " * direct", "OPTIONS *"},
		{"OPTIONS with a path", "a:80 / ", "OPTIONS http://a/"},
	} {
		for line := range strings.SplitSeq(test.lines, "|") {
			t.Run(test.rule+"/"+line, func(t *testing.T) {
				req, err := readRequest(wireConn(wireHead(line, "")))
				direct := map[bool]string{true: "direct"}[req.Direct]
				got := fmt.Sprintf("%s %s %s%v", req.URL.Authority, req.URL.Path, direct, err)
				eq(t, "target", got, test.want+"<nil>")
			})
		}
	}
}

// RFC 9112 §6.3, §7.1: where a body ends, and what follows it. More is forgiven
// in a response. Chunk extensions and trailers are dropped.
func TestWireBodies(t *testing.T) {
	chunks, long := wireOK(wireCoding, ""), strings.Repeat("a", 66<<10)
	for _, test := range []struct{ rule, where, want, cases string }{
		{"a request", "CASE", `"a" then "b"`, "PUT / HTTP/1.0\r\nContent-Length: 1\r\n\r\nab|" +
			"PUT / HTTP/1.7\nHost: a\nContent-Length: 1\n\nab|" + // §2.2: LF for CR LF; §2.3: later
			"\r\nPUT / HTTP/1.1\r\nHost: a\r\ncontent-length:01\r\n\r\nab"}, // §2.2: an empty line
		{"CONNECT", "CONNECT a:1 HTTP/1.1\r\nHost: a\r\nCASE\r\n\r\nab", `"ab" then ""`,
			"Content-Length: 1"},
		{"a response", "HTTP/1.1 CASE\r\n\r\nab", `"a" then "b"`, "205 R\r\nContent-Length: 1|" +
			"200 OK\r\nContent-Length: 1\r\nContent-Length: 1, 1|" +
			"200 OK\r\nContent-Length \t: 1|200\nContent-Length: 1"}, // §5.1: a space; §4: no reason
		{"§7.1: chunks", chunks + "CASE\r\n\r\nX", `"ab" then "X"`, "2\r\nab\r\n0|002 \t\r\nab\r\n000|" +
			"1\r\na\r\n01\r\nb\r\n0|2;a=\"b\";c\r\nab\r\n0;d\r\nX-A: b\r\nY:"},
		{"§7.1: a malformed size", chunks + "CASEhello\r\n0\r\n\r\n", `"" cut`,
			"|5|5\n|+5\r\n|-5\r\n|0x5\r\n|0_5\r\n| 5\r\n|\r\n|;a\r\n|" +
				"10000000000000005\r\n|ffffffffffffffff\r\n|5;a\rb\r\n|5;\x00\r\n|" +
				strings.Repeat("0", 9000) + "\r\n"},
		{"§7.1: a malformed end", chunks + "2\r\nabCASE", `"ab" cut`,
			"|\r\n|\r\n0|\r\n0\r\n|\n0\r\n\r\n|\r0\r\n\r\n|X\r\n0\r\n\r\n|\r\n0\n\r\n|" +
				"\r\n0\r\n\n|\r\n0\r\nX: y\n\r\n|\r\n0\r\nX: y\r\n z\r\n\r\n|" +
				"\r\n0\r\nX : y\r\n\r\n|\r\n0\r\nX\r\n\r\n"},
		{"§7.1.1: a long extension", chunks + "CASE", `"" cut`,
			"5;" + long + "\r\nhello|0;" + long + "\r\n\r\n"},
		{"§7.1.1: extensions", chunks + "CASE", `"xxx" cut`,
			strings.Repeat("1;"+long[:20<<10]+"\r\nx\r\n", 9)},
		{"§7.1.2: trailers", chunks + "0\r\nCASE", `"" cut`, strings.Repeat("a: b\r\n", 20<<10)},
	} {
		for text := range strings.SplitSeq(test.cases, "|") {
			t.Run(fmt.Sprintf("%s/%.50q", test.rule, text), func(t *testing.T) {
				text = strings.Replace(test.where, "CASE", text, 1)
				eq(t, "body", wireBody(wireConn(text)), test.want)
				eq(t, "byte by byte", wireBody(wireSlow(text)), test.want)
			})
		}
	}
}

// RFC 9112 §6: a body in any framing arrives in one that its client knows,
// stored or not, and each piece of it before the next is sent.
func TestWireFramings(t *testing.T) {
	t.Parallel()
	p := start(t)
	pieces := []string{"data: 1\n", bytesOf(50 << 10), "data: 3\n"}
	length := fmt.Sprintf("Content-Length: %d\r\n", len(strings.Join(pieces, "")))
	for _, from := range []struct{ name, head, piece, end string }{
		{"a length", "HTTP/1.1 200 OK\r\n" + length, "%[2]s", ""},
		{"chunks", "HTTP/1.1 200 OK\r\n" + wireCoding, "%X;a=b \r\n%s\r\n", "0;c\r\nX-T: z\r\n\r\n"},
		{"until close", "HTTP/1.1 200 OK\r\n", "%[2]s", ""},
		{"§6.1: an unknown coding", "HTTP/1.1 200 OK\r\nTransfer-Encoding: foo\r\n", "%[2]s", ""},
		{"HTTP/1.0, a length", "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n" + length, "%[2]s", ""},
		{"HTTP/1.0, until close", "HTTP/1.0 200 OK\r\n", "%[2]s", ""},
	} {
		for i := range 6 {
			to := []string{"HTTP/1.1", "HTTP/1.0", "HTTP/1.0\r\nConnection: keep-alive"}[i/2]
			caching := []string{"no-store", "max-age=60"}[i%2]
			t.Run(fmt.Sprintf("%s to %q, %s", from.name, to, caching), func(t *testing.T) {
				next := make(chan string)
				o := listen(t, "127.0.0.1:0", func(c net.Conn, in *bufio.Reader) {
					readHead(in)
					io.WriteString(c, from.head+"Cache-Control: "+caching+"\r\n\r\n")
					for piece := range next {
						fmt.Fprintf(c, from.piece, len(piece), piece)
					}
					io.WriteString(c, from.end)
				})
				w := p.dial()
				w.say("GET http://" + o.host + "/ " + to + "\r\nHost: x\r\n\r\n")
				res, err := http.ReadResponse(w.in, nil) // the head is there before any piece
				if err != nil {
					t.Fatal(err)
				}
				for _, piece := range pieces {
					next <- piece
					got := make([]byte, len(piece))
					io.ReadFull(res.Body, got)
					eq(t, "the piece has come", string(got) == piece, true)
				}
				close(next)
				eq(t, "the rest", readReply(res), "200, miss")
				endless, old := res.ContentLength < 0, to != "HTTP/1.1"
				eq(t, "chunked", res.TransferEncoding != nil, endless && !old)
				eq(t, "closes", res.Close, to == "HTTP/1.0" || endless && old)
				again := p.get("http://"+o.host, "").String()
				eq(t, "stored", strings.HasSuffix(again, ", hit"), caching == "max-age=60")
			})
		}
	}
}

// RFC 9112 §6.3 and §9.3.2: what an origin gets of requests with and without
// a body, which come in one piece. They are answered in their order.
func TestWirePipelining(t *testing.T) {
	p := start(t)
	o := newOrigin(p)
	o.set("/", originPage{do: func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %d %s", r.Method, r.ContentLength, body)
	}})
	large := strings.Repeat("x", 300000)
	text, tests := "", []struct{ method, fields, body, want string }{
		{"GET", "", "", "GET 0 "},
		{"POST", "Content-Length: 0\r\n", "", "POST 0 "},
		{"GET", "Content-Length: 5\r\n", "hello", "GET 5 hello"},
		{"PUT", wireCoding, "0\r\n\r\n", "PUT 0 "},
		{"M-SEARCH", wireCoding, "5;a=b \r\nhello\r\n0;c\r\nX: y\r\n\r\n", "M-SEARCH -1 hello"},
		{"PUT", "Content-Length: 300000\r\n", large, "PUT 300000 " + large},
	}
	for _, test := range tests {
		text += wireHead(test.method+" "+o.url("/"), test.fields) + test.body
	}
	w := p.dial()
	go w.say(text)
	for _, test := range tests {
		eq(t, test.method+" "+test.fields, w.reply(test.method).body, test.want)
	}
}

// RFC 9112 §8: a body that breaks off, or turns out to be malformed, looks
// whole neither to an origin nor to any kind of client, and is not stored.
func TestWireCutBodies(t *testing.T) {
	t.Parallel()
	p := start(t)
	taker := listen(t, "127.0.0.1:0", func(c net.Conn, in *bufio.Reader) {
		if req, err := http.ReadRequest(in); err == nil {
			body, err := io.ReadAll(req.Body)
			eq(t, fmt.Sprintf("%.50q looks whole", body), err == nil, false)
		}
	})
	for name, text := range map[string]string{
		"in a length":             "Content-Length: 100\r\n\r\nhello",
		"before any of a length":  "Content-Length: 100\r\n\r\n",
		"before any chunk":        wireCoding + "\r\n",
		"in a chunk":              wireCoding + "\r\n9\r\nhello",
		"between chunks":          wireCoding + "\r\n5\r\nhello\r\n",
		"before the end":          wireCoding + "\r\n5\r\nhello\r\n0\r\n",
		"at more than its size":   wireCoding + "\r\n5\r\nhelloX\r\n0\r\n\r\n" + wireHidden,
		"at a bad chunk size":     wireCoding + "\r\n5\r\nhello\r\n+0\r\n\r\n" + wireHidden,
		"at bad trailers":         wireCoding + "\r\n5\r\nhello\r\n0\r\nX : y z\r\n\r\n" + wireHidden,
		"at an endless extension": wireCoding + "\r\n5;" + strings.Repeat("a", 99<<10) + wireHidden,
	} {
		t.Run(name, func(t *testing.T) {
			w := p.dial()
			go func() {
				w.say("POST http://" + taker.host + "/ HTTP/1.1\r\nHost: x\r\n" + text)
				w.Conn.(*net.TCPConn).CloseWrite()
			}()
			match(t, "upload", w.rest(), `HTTP/1.1 400 Bad Request\r\n`+wirePage)

			public := "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\n" + text + "\x00"
			o := script(t, public, public, public, strings.Replace(public, "max-age=60", "no-store", 1))
			for i := range 6 {
				version := []string{"1.1", "1.0", "1.0\r\nConnection: keep-alive"}[i%3]
				r := wireAsk(p.dial(), "GET http://"+o.host+"/ HTTP/"+version+"\r\nHost: x\r\n\r\n")
				eq(t, version+" cut", r.err != nil && strings.HasPrefix("hello", r.body), true)
				eq(t, "requests", strings.Count(o.got.String(), "GET "), i+1)
			}
			eventually(t, "no file is left", func() bool { return len(files(p.dir)) == 0 })
		})
	}
}

// RFC 9110 §10.1.1, §15.2, RFC 9112 §9.5: what comes before the final response,
// and responses that come before the request's body.
func TestWireInterim(t *testing.T) {
	p := start(t)
	hints := "HTTP/1.1 103 Hi\r\nLink: </a>\r\nConnection: X\r\nX: y\r\nContent-Length: 9\r\n\r\n"
	final := wireOK("Cache-Control: max-age=60\r\nContent-Length: 5\r\n", "final")
	url, w := "http://"+script(t, "HTTP/1.1 102 Processing\r\n\r\n"+hints+final).host, p.dial()
	eq(t, "first", wireAsk(w, wireHead("GET "+url, "")), "102")
	match(t, "second", readHead(w.in), `HTTP/1.1 103 Hi\r\nLink: </a>\r\nVia: 1.1 proxy-\w+\r\n\r\n`)
	eq(t, "final", w.reply("GET"), `200 "final", miss`)
	eq(t, "stored", wireAsk(w, wireHead("GET "+url, "")), `200 "final", hit`)
	match(t, "HTTP/1.0 gets none", p.say("GET "+url+"/0 HTTP/1.0\r\n\r\n"), `HTTP/1.1 200 .*l`)
	text := p.say(request("http://"+script(t, strings.Repeat(hints, 2*maxInterim)+final).host, ""))
	eq(t, "without end", strings.Count(text, "HTTP/1.1 103 "), maxInterim)
	match(t, "and then", text, `HTTP/1.1 103 .*HTTP/1.1 502 .*`)

	o := listen(t, "127.0.0.1:0", func(c net.Conn, in *bufio.Reader) {
		readHead(in)
		io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n")
		body, _ := in.ReadString('.')
		io.WriteString(c, wireOK("Content-Length: 5\r\n", body))
	})
	head := wireHead("POST http://"+o.host, "Expect: 100-Continue\r\nContent-Length: 5\r\n")
	eq(t, "go on", wireAsk(w, head), "100")
	w.say("body.")
	eq(t, "answer", w.reply("POST"), `200 "body.", miss`)
	eq(t, "another expectation", wireAsk(w, strings.Replace(head, "100", "1", 1)).status, 417)

	o = listen(t, "127.0.0.1:0", func(c net.Conn, in *bufio.Reader) {
		readHead(in)
		io.WriteString(c, "HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
		<-t.Context().Done()
	})
	for _, text := range []string{"Expect: 100-continue\r\nContent-Length: 5\r\n", wireCoding,
		"Content-Length: 50000000\r\n\r\n" + strings.Repeat("a", 2e7)} {
		w := p.dial()
		eq(t, "early", wireAsk(w, wireHead("POST http://"+o.host, text)), `413 "big", miss`)
		eq(t, "and then", w.rest(), "")
	}
}

// RFC 9110 §15.6.3: what is wrong with an origin, or with the head of its
// response (RFC 9112), is a 502 that names it.
func TestWireOriginFaults(t *testing.T) {
	t.Parallel()
	p := start(t)
	const ok, coding = "HTTP/1.1 200 OK\r\n", "Transfer-Encoding: chunked"
	hosts := map[string]string{"nobody there": "127.0.0.1:1", "no such host": "nosuch.invalid",
		"no answer": script(t, "\x00").host, "half a head": script(t, ok+"\x00").host}
	for _, head := range []string{
		"HTTP/2.0 200 OK", "HTTP/1.1 20 OK", "HTTP/1.1 2000 OK", "HTTP/1.1 +20 OK", // §4
		"HTTP/1.1 099 OK", "ICY 200 OK", "<html>", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x",
		ok + "X", ok + "X: a\r\n b", ok + "X: a\rY: b", ok + strings.Repeat("X: y\r\n", 2e4), // §5
		ok + coding + ", chunked", ok + coding + ", gzip", ok + "Transfer-Encoding: \vchunked", // §6.1
		"HTTP/1.0 200 OK\r\n" + coding, ok + "Content-Length: 5, 6", ok + "Content-Length: +5", // §6.3
		ok + "Content-Length:", ok + "Content-Length: 18446744073709551621",
	} {
		hosts[fmt.Sprintf("%.50q", head)] = script(t, head+"\r\n\r\nhello\x00").host
	}
	for name, host := range hosts {
		t.Run(name, func(t *testing.T) {
			for range 2 { // and once more: none of it is stored
				match(t, "answer", p.say(request("http://"+host, "")),
					`HTTP/1.1 502 Bad Gateway\r\n.*\r\n\r\n[ -~]*`+host+`[ -~]+\n`)
			}
		})
	}
}

// RFC 9112 §9.3: a connection to an origin carries another request if all of
// the response has come, and nothing more, and nobody has said otherwise. So
// stray bytes never answer anybody.
func TestWireKeptOrigins(t *testing.T) {
	t.Parallel()
	p := start(t)
	const empty, chunk = "Content-Length: 0\r\n", "5\r\nhello\r\n0\r\n\r\n"
	const evil = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
	for _, test := range []struct{ name, kept, answer string }{
		{"a length", "kept", wireOK("Connection: closed\r\nContent-Length: 5\r\n", "hello")},
		{"chunked", "kept", wireOK(wireCoding, chunk)},
		{"HEAD", "kept", wireOK("Content-Length: 5\r\n", "")},
		{"204", "kept", "HTTP/1.1 204 No Content\r\n" + wireCoding + "\r\n"},
		{"HEAD, chunked", "kept", wireOK(wireCoding, "")},
		{"close, by an old name", "", wireOK("Proxy-Connection: Close\r\n"+empty, "")},
		{"304", "kept", "HTTP/1.1 304 Not Modified\r\nContent-Length: 42\r\n\r\n"},
		{"HTTP/1.0 kept", "kept", "HTTP/1.0 200\r\nProxy-Connection: keep-alive\r\n" + empty + "\r\n"},
		{"HTTP/1.0 closed", "", "HTTP/1.0 200 OK\r\nConnection: keep-alive, close\r\n" + empty + "\r\n"},
		{"close", "", wireOK("Connection: x, Close\r\n"+empty, "")},
		{"until close", "", wireOK("", "hello\x00")},
		{"§6.3: a length and chunks", "", wireOK("Content-Length: 5\r\n"+wireCoding, chunk)},
		{"NTLM", "", wireOK("WWW-Authenticate: A x=\"\\\", \", NTLM\r\n"+empty, "")},
		{"more than a length", "", wireOK("Content-Length: 5\r\n", "hello"+evil)},
		{"more than its chunks", "", wireOK(wireCoding, chunk+evil)},
		{"HEAD with a body", "", wireOK("Content-Length: 42\r\n", evil)},
		{"204 with a body", "", "HTTP/1.1 204 No Content\r\nContent-Length: 42\r\n\r\n" + evil},
		{"304 with a body", "", "HTTP/1.1 304 Not Modified\r\nContent-Length: 42\r\n\r\n" + evil},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := script(t, test.answer, wireOK("Content-Length: 4\r\n", "good"))
			w, method := p.dial(), "GET"
			if strings.HasPrefix(test.name, "HEAD") {
				method = "HEAD"
			}
			r := wireAsk(w, wireHead(method+" http://"+o.host+"/", "If-None-Match: \"1\"\r\n"))
			match(t, "answer", r.String(), `20[04]( "hello")?, miss|304, renewed`)
			eq(t, "next", wireAsk(w, wireHead("GET http://"+o.host+"/2", "")), `200 "good", miss`)
			eq(t, "kept", o.conns.Load() == 1, test.kept == "kept")
		})
	}
}

// RFC 9110 §7.6: what arrives is what was sent, in bytes, case and order, but
// for Via and the fields that concern one connection only.
func TestWireArrivesExactly(t *testing.T) {
	p := start(t)
	const sent = "X-Order: 1\r\nx-ORDER: 2\r\nCookie: a=\"b c\"; d\r\nCookie: e=f\r\nX-Empty: \r\n" +
		"X-8-Bit: caf\xe9 \xff\r\nAuthorization: Basic Zm9v\r\nX-Space: a  b\tc\r\nCache-Control: x\r\n"
	const back = "HTTP/1.1 299 Very Odd\r\nSet-Cookie: a=b; Path=/\r\nSet-Cookie: c=d\r\nx-ODD: v\r\n" +
		"WWW-Authenticate: Basic x=\"o\"\r\nX-8-Bit: caf\xe9 \xff\r\nX-Empty: \r\nServer: a (b)\r\n" +
		"Date: Mon, 02 Jan 2006 15:04:05 GMT\r\nVary: *\r\n"
	const hops = "Connection: X-Hop, Host, close\r\nConnection: Cache-Control, Vary\r\nX-Hop: 1\r\n" +
		"Keep-Alive: 5\r\nProxy-Connection: close\r\nTE: trailers\r\nUpgrade: h2c\r\nTrailer: X-T\r\n"
	for _, target := range []string{"/a%2Fb%2f//c/./../d/;p=1", "/%zz%?a?b&c==", "/\xff?[]{}|^`\"<>\\"} {
		o := script(t, back+hops+"Proxy-Authenticate: x\r\nContent-Length: 2\r\n\r\nok")
		answer := p.say("GET HTTP://u:p@" + o.host + target + "#f HTTP/1.1\r\nHost: elsewhere\r\n" +
			sent + hops + "Proxy-Authorization: Basic eA==\r\n\r\n")
		got, via, _ := strings.Cut(o.got.String(), "Via: 1.1 proxy-")
		match(t, "its Via", via, `\w+\r\n\r\n`)
		eq(t, "request", got, "GET "+target+" HTTP/1.1\r\nHost: "+o.host+"\r\n"+sent)
		match(t, "answer", strings.TrimPrefix(answer, back), `Via: 1.1 proxy-\w+\r\n`+
			`Cache-Status: [ -~]+\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok`)
	}
}

// RFC 9110 §9.2.2: what may be sent twice goes over an idle connection, and
// again if that was just being closed, as here each at its second request.
func TestWireRetries(t *testing.T) {
	p := start(t)
	o := listen(t, "127.0.0.1:0", func(c net.Conn, in *bufio.Reader) {
		if head := readHead(in); !strings.Contains(head, "/silent") {
			io.WriteString(c, wireOK("Content-Length: 2\r\n", "ok"))
			readHead(in)
		}
	})
	for line, sent := range map[string]int{"GET /": 2, "OPTIONS /": 2, "PUT /": 2, "DELETE /": 2,
		"POST /": 1, "PATCH /": 1, "PUT /body": 1, "GET /silent": 2, "POST /silent": 1} {
		t.Run(line, func(t *testing.T) {
			w, method := p.dial(), strings.Fields(line)[0]
			eq(t, "first", wireAsk(w, wireHead("GET http://"+o.host+"/first", "")), `200 "ok", miss`)
			body := strings.Repeat("x", strings.Count(line, "body"))
			fields := fmt.Sprintf("Content-Length: %d\r\n", len(body))
			w.say(wireHead(strings.Replace(line, "/", "http://"+o.host+"/", 1), fields) + body)
			eq(t, "fails", w.reply(method).status == 502, strings.HasSuffix(line, "silent"))
			eq(t, "sent", strings.Count(o.got.String(), line+" HTTP/1.1\r\n"), sent)
		})
	}
}

// The pool holds a bounded number of connections, and none on which the origin
// has said something unasked, or that it has closed.
func TestWirePool(t *testing.T) {
	pool := new(originPool)
	for range maxIdle + 2 {
		pool.put(wireConn(""), "a:80")
	}
	eq(t, "connections", len(pool.idle), maxIdle)
	for _, said := range []string{"HTTP/1.1 200 OK\r\n\r\nevil", "\x00"} {
		o := script(t, said)
		c, _ := dial(o.host, func(netip.Addr) error { return nil })
		pool.put(c, o.host)
		eq(t, "taken while it is idle", pool.take(o.host) == c, true)
		pool.put(c, o.host)
		io.WriteString(c.Conn, "\r\n\r\n") // so the origin says it
		eventually(t, "it has come", func() bool { return !alive(c, syscall.Read) })
		eq(t, "taken after that", pool.take(o.host) == c, false)
	}
}

// RFC 4559 §6: NTLM and Negotiate authenticate a connection, which then serves
// its user alone. This origin does not ask again who is there.
func TestWireUsers(t *testing.T) {
	p := start(t)
	o := listen(t, "127.0.0.1:0", func(c net.Conn, in *bufio.Reader) {
		user, caching := "nobody", "no-store"
		for head := readHead(in); head != ""; head = readHead(in) {
			if _, credentials, found := strings.Cut(head, "Authorization: "); found {
				user, caching = strings.Fields(credentials)[1], "public, max-age=60"
			}
			fields := fmt.Sprintf("Cache-Control: %s\r\nContent-Length: %d\r\n", caching, len(user))
			io.WriteString(c, wireOK(fields, user))
		}
	})
	together(30, func(i int) {
		scheme, user := []string{"NTLM", "Negotiate", "negotiate"}[i%3], fmt.Sprint("user", i)
		for range 2 {
			r := p.get("http://"+o.host, "Authorization: "+scheme+" "+user)
			eq(t, "with credentials", r.body, user)
			eq(t, "without", p.get("http://"+o.host, "").body, "nobody")
		}
	})
	eq(t, "stored", files(p.dir), "[]")
}

// No read or write waits for longer than the limit of its connection, and a
// head has to be whole in time, however it trickles in.
func TestWireLimits(t *testing.T) {
	c := wireSlow(wireHead("PUT http://a/", "Content-Length: 5\r\n") + "hello")
	c.limit = time.Nanosecond // so each read would move the deadline
	stub := c.Conn.(*wireStub)
	req, _ := readRequest(c)
	eq(t, "a head", time.Until(stub.deadline).Round(10*time.Second), headWait)
	io.ReadAll(req.Body)
	eq(t, "its body", time.Until(stub.deadline).Round(10*time.Second), 0*time.Second)

	silent := listen(t, "127.0.0.1:0", func(c net.Conn, in *bufio.Reader) { <-t.Context().Done() })
	c, _ = dial(silent.host, func(netip.Addr) error { return nil })
	defer c.Close()
	c.limit = 30 * time.Millisecond
	_, err := newBody(c, 5, false).Read(make([]byte, 5))
	eq(t, "who gives nothing", err, "the rest of the body has not come within 30ms")
	_, err = c.Write(make([]byte, 64<<20))
	eq(t, "who takes nothing", os.IsTimeout(err), true)
}

// Clients and origins that neither give nor take delay nobody, and cost some
// KiB each, whatever the size of the body. (Not parallel: memory is of all.)
func TestWireSlowOnes(t *testing.T) {
	p := start(t)
	o := newOrigin(p)
	body := strings.Repeat("x", 8<<20)
	o.put("/stored", "Cache-Control: max-age=60", body)
	o.put("/passed", "Cache-Control: no-store", body)
	silent := listen(t, "127.0.0.1:0", func(c net.Conn, in *bufio.Reader) { <-t.Context().Done() })
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for range 10 {
		for _, head := range []string{wireHead("GET "+o.url("/stored"), ""), // and never reads
			wireHead("GET "+o.url("/passed"), ""), wireHead("GET http://"+silent.host, ""),
			wireHead("POST "+o.url("/"), "Content-Length: 9\r\n"), "GET http://"} {
			p.dial().say(head)
		}
	}
	eventually(t, "all are under way", func() bool { return o.count("/passed") == 10 })
	for _, path := range []string{"/stored", "/passed", "/stored"} {
		eq(t, path, p.get(o.url(path), "").body == body, true)
	}
	eq(t, "requests", o.count("/stored"), 1)
	runtime.GC()
	runtime.ReadMemStats(&after)
	each := int64(after.HeapAlloc+after.StackInuse-before.HeapAlloc-before.StackInuse) / 50
	eq(t, fmt.Sprintf("a slow one costs %d bytes", each), each < 256<<10, true)
}

// A thousand rough exchanges leave no goroutine behind, and no file open. (Not
// parallel: these are of all.)
func TestWireNothingLeaks(t *testing.T) {
	p := start(t)
	o := newOrigin(p)
	o.put("/stored", "Cache-Control: max-age=60", bytesOf(300000))
	o.put("/passed", "", bytesOf(300000))
	bad := script(t, "what?\x00", wireOK("Cache-Control: max-age=9\r\nContent-Length: 9\r\n", "cut\x00"))
	texts := []string{wireHead("GET "+o.url("/stored"), ""), wireHead("GET "+o.url("/passed"), ""),
		wireHead("GET http://"+bad.host+"/", ""), wireHead("CONNECT "+o.host, "") + "GET ",
		wireHead("POST "+o.url("/"), "Content-Length: 1000\r\n") + "hello", "GET " + o.url("/") + " HT"}
	p.say(request(o.url("/stored"), "")) // the proxy is under way now
	open := func() int { return len(files("/proc/self/fd")) }
	goroutinesBefore, openBefore := runtime.NumGoroutine(), open()
	together(8, func(worker int) {
		for i := range 125 {
			w, kind := p.dial(), (i+worker)%len(texts)
			w.say(texts[kind])
			if kind < 4 && i%3 > 0 {
				w.in.Peek(1) // else the client is gone before the answer
			}
			if i%2 == 0 {
				w.Conn.(*net.TCPConn).SetLinger(0) // a reset
			}
			w.Close()
		}
	})
	eventually(t, "all is as it was", func() bool {
		for c := p.origins.take(o.host); c != nil; c = p.origins.take(o.host) {
			c.Close()
		}
		return runtime.NumGoroutine() <= goroutinesBefore && open() <= openBefore
	})
}

// The waits themselves, which take a minute and a half.
func TestWireWaits(t *testing.T) {
	if os.Getenv("PROXY_SOAK") == "" {
		t.Skip("PROXY_SOAK is not set")
	}
	silent := listen(t, "127.0.0.1:0", func(c net.Conn, in *bufio.Reader) { <-t.Context().Done() })
	p, head := start(t), request("http://"+silent.host, "")
	for text, want := range map[string]string{head[:9]: "408", head: "504"} {
		w := p.dial()
		w.SetDeadline(time.Now().Add(90 * time.Second))
		w.say(text)
		match(t, "answer", w.rest(), `HTTP/1.1 `+want+` .*`)
	}
}

// FuzzHead reads a head. What has been understood is read again the same, and
// net/textproto finds the same in it, if it accepts the original.
func FuzzHead(f *testing.F) {
	f.Add("GET http://h/a?b HTTP/1.1\r\nHost: h\r\nX: a\r\nx: b \r\n\r\n")
	f.Add("\r\nOPTIONS * HTTP/1.1\r\nHost: a\r\nA:\r\n\r\n")
	f.Add("GET /\xff HTTP/1.0\nA : b\r\n: c\r\nd\r\nE: \xff\n\n")
	f.Add("HTTP/1.1 200 OK\r\nDate : x\r\nVia: 1.1 a,\t b\r\n\r\n")
	f.Add("HTTP/1.0 404\r\n\r\n")
	read := func(text string) (string, error) {
		if !strings.HasPrefix(text, "HTTP/") {
			req, err := readRequest(wireSlow(text))
			line := req.Method + " " + req.Target + " " + req.Proto
			return line + "\r\n" + string(req.appendTo(nil)) + "\r\n", err
		}
		res, err := readResponse(wireSlow(text), "GET")
		if err != nil {
			return "", err
		}
		line := fmt.Sprintf("%s %03d %s", res.Proto, res.Status, res.Reason)
		return line + "\r\n" + string(res.appendTo(nil)) + "\r\n", nil
	}
	oracle := func(text string) (string, error) {
		r := textproto.NewReader(bufio.NewReader(strings.NewReader(strings.TrimLeft(text, "\r\n"))))
		line, _ := r.ReadLine()
		header, err := r.ReadMIMEHeader()
		return fmt.Sprintf("%q %q", strings.TrimRight(line, " "), header), err
	}
	f.Fuzz(func(t *testing.T, data string) {
		text, err := read(data)
		if err != nil {
			return
		}
		again, err := read(text)
		controls := strings.ContainsAny(strings.ReplaceAll(text, "\r\n", ""), "\r\n\x00\x1b\x7f")
		if again != text || controls {
			t.Fatalf("%q passes as %q, and that as %q, %v", data, text, again, err)
		}
		got, _ := oracle(text)
		want, err := oracle(data)
		if err == nil && got != want && !strings.Contains(data, " :") {
			t.Fatalf("%q passes as %s, for net/textproto it is %s", data, got, want)
		}
	})
}

// FuzzChunked reads chunks, at once and byte by byte. What is whole for us is
// whole for net/http, and the same.
func FuzzChunked(f *testing.F) {
	f.Add("5;a=\"b\" \r\nhello\r\nA\r\n0123456789\r\n0;x\r\nX: y\r\n\r\n")
	f.Add("5\nhello\n0\n\n")
	f.Add("1 \t\r\na\r\n00\r\n\r\n")
	f.Fuzz(func(t *testing.T, data string) {
		got := wireBody(wireConn(wireOK(wireCoding, data)))
		eq(t, "byte by byte", wireBody(wireSlow(wireOK(wireCoding, data))), got)
		want, err := io.ReadAll(httputil.NewChunkedReader(strings.NewReader(data)))
		same := err == nil && strings.HasPrefix(got, fmt.Sprintf("%q then ", want))
		if !same && !strings.HasSuffix(got, " cut") {
			t.Fatalf("%q is %s, for net/http %q, %v", data, got, want, err)
		}
	})
}

// FuzzAuthority reads a host and a port, which have one spelling.
func FuzzAuthority(f *testing.F) {
	f.Add("a.b:080")
	f.Add("[::FFFF:1.2.3.4]:81")
	f.Fuzz(func(t *testing.T, text string) {
		if authority, err := parseAuthority(text, "80"); err == nil {
			again, err := parseURL("user:pw@" + text + "#f")
			eq(t, text, fmt.Sprintf("%s%s %v", again.Authority, again.Path, err), authority+"/ <nil>")
			same, err := parseAuthority(authority, "80")
			eq(t, text, fmt.Sprint(same, err), authority+"<nil>")
		}
	})
}

// The tests of the cache: each rule as a table on plain values; files and
// memory; how a second request is answered; and downloads that many follow.

// cacheTime is when the rules are tried, and cacheAfter a while later.
var cacheTime = time.Date(2026, 11, 22, 6, 0, 0, 0, time.UTC)

func cacheAfter(wait string) time.Time {
	d, _ := time.ParseDuration(wait)
	return cacheTime.Add(d)
}

// cachePage makes a page of "200 A: b | C: d" and a body. With status 0 the
// origin breaks off.
func cachePage(response, body string) originPage {
	status, fields, _ := strings.Cut(response, " ")
	page := originPage{fields: fields, body: body}
	page.status, _ = strconv.Atoi(status)
	if page.status == 0 {
		page.do = func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
	}
	return page
}

// cacheEntry makes an entry of "200 A: b | C: d", which came at cacheTime.
func cacheEntry(response string) *Entry {
	o := origin{clock: func() time.Time { return cacheTime }}
	page := cachePage(response, "")
	h := splitFields(o.at(page.fields))
	if !h.Has("Date") {
		h = append(h, dateField("Date", cacheTime))
	}
	e := &Entry{Response: Response{Status: page.status, Header: h}, request: Header{dateField("Date", cacheTime)}}
	e.assess(0, cacheTime)
	e.Header = h
	return e
}

// cacheRules tries a table: the last column is the verdict on the others.
func cacheRules(t *testing.T, rows [][]string, verdict func(row []string) any) {
	for _, row := range rows {
		t.Run(fmt.Sprintf("%.90s", strings.Join(row, "; ")), func(t *testing.T) {
			eq(t, "verdict", verdict(row), row[len(row)-1])
		})
	}
}

func TestCacheDates(t *testing.T) { // RFC 9110 §5.6.7
	const good, bad = "784111777", "-62135596800"
	cacheRules(t, [][]string{
		{"Sun, 06 Nov 1994 08:49:37 GMT", good}, {"Sunday, 06-Nov-94 08:49:37 GMT", good},
		{"Sun Nov  6 08:49:37 1994", good}, {"MON, 06 nov 1994 08:49:37 gmt", good},
		{"Sun, 06 Nov 1994 08:49:37 UTC", bad}, {"Sun, 06 Nov 1994 08:49:37 +0000", bad},
		{"Sun, 6 Nov 1994 08:49:37 GMT", bad}, {"Sun, 06 Nov 94 08:49:37 GMT", bad},
		{"Sun, 06 Nov 1994 8:49:37 GMT", bad}, {"Sun, 31 Nov 1994 08:49:37 GMT", bad},
		{"Sun 06 Nov 1994 08:49:37 GMT", bad}, {"", bad}, {"0", bad}, {"784111777", bad},
	}, func(row []string) any { return httpDate(row[0]).Unix() })
}

func TestCacheLifetime(t *testing.T) {
	const cc, ever = "200 Cache-Control: ", "Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT"
	const week = "604800"
	cacheRules(t, [][]string{
		// What the response tells: RFC 9111 §4.2.1, §5.2.2, §5.3
		{"599 Cache-Control: max-age=60", "60"}, {cc + `MAX-AGE="60"`, "60"}, {cc + "max-age=x", "0"},
		{cc + `x="max-age=1, y", max-age=60`, "60"}, {cc + "public; max-age=60", "60"},
		{cc + "public | Cache-Control: max-age=60", "60"}, {cc + "max-age", "0"}, {cc + "max-age=-60", "0"},
		{cc + "max-age=99999999999999999999", "2147483648"}, {cc + "max-age=999, s-maxage=60", "60"},
		{cc + "max-age=60 | Expires: @-60", "60"}, {cc + "max-age=60, no-cache", "0"},
		{"200 Expires: @10 | Date: @-50", "60"}, {"200 Expires: 0 | " + ever, "0"},
		{"200 Expires: | " + ever, "0"}, {"200 Expires: Thu, 01 Jan 2099 00:00:00 UTC", "0"},
		// What it does not tell, where -ttl is 9: §4.2.2, RFC 9110 §15.1
		{"200 Last-Modified: @-1000", "100"}, {"404 " + ever, week}, {"200 Last-Modified: @1000", "9"},
		{"302 " + ever, "0"}, {"302 Cache-Control: public | Last-Modified: @-1000", "100"}, {"200 ", "9"},
	}, func(row []string) any {
		return int(lifetime(&cacheEntry(row[0]).Response, 9*time.Second).Seconds())
	})
}

func TestCacheAge(t *testing.T) { // RFC 9111 §4.2.3
	cacheRules(t, [][]string{
		{"", "10s", "10"}, {"Age: 50", "10s", "60"}, {"Date: @-50", "10s", "60"},
		{"Date: @-50 | Age: 20", "10s", "60"}, {"Date: @500", "10s", "10"}, {"Age: x", "10s", "10"},
		{"Age: -1", "10s", "10"}, {"Age: 99999999999999999999", "10s", "2147483658"},
		{"", "-50s", "9223372036"}, // the clock has been set back, and nobody knows
	}, func(row []string) any {
		e, now := cacheEntry("200 "+row[0]), cacheAfter(row[1])
		e.assess(0, now)
		return int(now.Sub(e.born).Seconds())
	})
}

func TestCacheSatisfies(t *testing.T) {
	const minute, cc, pragma = "max-age=60", "Cache-Control: ", "Pragma: no-cache"
	const maxStale, maxAge, minFresh = cc + "max-stale", cc + "max-age=20", cc + "min-fresh=20"
	cacheRules(t, [][]string{
		{minute, "", "59s", "hit"}, {minute + ", immutable", "", "60s", "stale"}, // RFC 9111 §4.2
		{"max-age=1", "", "-5s", "hit"},                                    // newer than the request
		{minute, maxAge, "19s", "hit"}, {minute, maxAge, "20s", "request"}, // §5.2.1.1
		{minute, maxStale + "=20", "79s", "hit"}, {minute, maxStale + "=20", "80s", "stale"}, // §5.2.1.2
		{minute, maxStale, "9999s", "hit"}, {minute + ", must-revalidate", maxStale, "60s", "stale"},
		{minute + ", proxy-revalidate", maxStale, "60s", "stale"}, {"s-maxage=60", maxStale, "60s", "stale"},
		{minute + ", no-cache", maxStale, "0s", "stale"},
		{minute, minFresh, "40s", "hit"}, {minute, minFresh, "41s", "request"}, // §5.2.1.3
		{minute, maxStale + ", min-fresh=1", "60s", "request"},
		{minute, cc + "no-cache", "0s", "request"}, {minute, pragma, "0s", "request"}, // §5.2.1.4, §5.4
		{minute, maxStale + " | " + pragma, "0s", "hit"}, {minute, cc + "only-if-cached", "0s", "hit"},
	}, func(row []string) any {
		ok, why := cacheEntry("200 "+cc+row[0]).satisfies(splitFields(row[1]), cacheAfter(row[2]))
		if ok {
			return "hit"
		}
		return why
	})
}

func TestCacheStorable(t *testing.T) {
	const cc, fresh, old = "Cache-Control: ", "Cache-Control: max-age=60", "Last-Modified: @-9999"
	const ok, auth, ntlm = "200 " + fresh, "Authorization: Basic eA==", "Authorization: NTLM eA=="
	rows := [][]string{
		// RFC 9111 §3, §5.2.2
		{"", "299 " + fresh, "stored"}, {"", "302 Expires: @60", "stored"}, {"", `200 ETag: "1"`, "stored"},
		{"", "200 ", "no-freshness"}, {"", "302 " + old, "no-freshness"},
		{"", "200 " + cc + "max-age=0", "no-freshness"}, {"", "299 " + cc + "public | " + old, "stored"},
		{"", ok + ", No-Store", "no-store"}, {"", ok + `, x="no-store"`, "stored"},
		{cc + "no-store", ok, "request-no-store"}, {"", "200 " + cc + "private; max-age=60", "private"},
		{"", ok + " | Set-Cookie: a=b | Connection: Set-Cookie", "set-cookie"},
		{"", ok + " | Vary: Accept, *", "vary"}, {"", "206 " + fresh, "status"}, // §4.1, §3.3
		{"", "304 " + fresh, "status"}, {"", "416 " + fresh, "status"},
		{"", ok + ", no-store, must-understand", "stored"}, // §5.2.2.3
		{"", "299 " + fresh + ", must-understand", "status"},
		{auth, ok, "authorization"}, {auth, ok + ", public", "stored"}, // §3.5
		{auth, "200 " + cc + "s-maxage=60", "stored"}, {auth, ok + ", must-revalidate", "stored"},
		{ntlm, ok + ", public", "authorization"},
		{"", "401 " + fresh + " | WWW-Authenticate: NTLM", "authorization"},
		{"", ok + strings.Repeat(" | A: b", 300), "too-large"},
	}
	for _, status := range []int{200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501} { // RFC 9110 §15.1
		rows = append(rows, []string{"", fmt.Sprint(status, " ", old), "stored"})
	}
	verdict := func(method, request string, e *Entry, config CacheConfig) any {
		ok, why := storable(&Request{Method: method, Header: splitFields(request)}, &e.Response, config)
		if ok {
			return "stored"
		}
		return why
	}
	cacheRules(t, rows, func(row []string) any {
		return verdict("GET", row[0], cacheEntry(row[1]), CacheConfig{})
	})
	e := cacheEntry(ok)
	e.Origin, e.Length = netip.MustParseAddr("127.0.0.1"), 1000
	eq(t, "as large as all", verdict("GET", "", e, CacheConfig{limit: 1000, shareInner: true}), "stored")
	eq(t, "larger", verdict("GET", "", e, CacheConfig{limit: 999, shareInner: true}), "too-large")
	eq(t, "an inner address", verdict("GET", "", e, CacheConfig{limit: 1000}), "inner-address")
	eq(t, "POST", verdict("POST", "", e, CacheConfig{limit: 1000, shareInner: true}), "method")
}

func TestCacheVary(t *testing.T) { // RFC 9111 §4.1
	const coding, language = "Accept-Encoding", "Accept-Language"
	began := time.Now()
	cacheRules(t, [][]string{
		{"foo", "FOO: 1", "Foo: 1 | Bar: 2", "true"}, {"Foo", "Foo: a", "Foo: A", "false"},
		{"Foo", "", "Bar: 1", "true"}, {"Foo", "Foo: 1", "", "false"}, {"Foo", "", "Foo:", "false"},
		{"Foo, Bar", "Foo: 1 | Bar: 2", "Bar: 2 | Foo: 1", "true"}, {"Foo, Bar", "Foo: 1", "Bar: 1", "false"},
		{"Foo | Vary: Bar", "Bar: 2", "Bar: 3", "false"}, {"Foo", `Foo: "a,b"`, `Foo: "a, b"`, "false"},
		{"Foo", "Foo: 1 | Foo: 2", "Foo: 1 , 2", "true"}, {"Foo", "Foo: 1, 2", "Foo: 2, 1", "false"},
		{coding, coding + ": gzip, br", coding + ": BR,gzip", "true"},
		{language, language + ": en, de", language + ": en, de;q=0.5", "false"},
		{strings.Repeat("Foo,", 4000), "Foo: " + strings.Repeat(",", 2e4), "", "false"}, // took minutes
	}, func(row []string) any {
		e := cacheEntry("200 Vary: " + row[0])
		e.request = selectingFields(e.Header, splitFields(row[1]))
		return e.selectedBy(splitFields(row[2]))
	})
	eq(t, "within a second", time.Since(began) < time.Second, true)
}

// May an entry be used that has been stale for a while, where the origin
// answers with an error or, at 0, not at all?
func TestCacheMayStandIn(t *testing.T) {
	const minute, strict, allows = "max-age=60", "max-age=60, must-revalidate", ", stale-if-error=600"
	cacheRules(t, [][]string{
		{minute, "", "9999s", "0", "true"}, {"no-cache", "", "3s", "0", "false"}, // RFC 9111 §4.2.4
		{strict, "", "3s", "0", "false"}, {minute + ", proxy-revalidate", "", "3s", "0", "false"},
		{"s-maxage=60", "", "3s", "0", "false"}, {minute, "no-cache", "3s", "0", "false"},
		{minute, "", "3s", "503", "false"}, {minute + allows, "", "599s", "500", "true"}, // RFC 5861 §4
		{minute, allows, "599s", "504", "true"}, {minute + allows, "", "600s", "502", "false"},
		{minute + allows, "", "600s", "0", "false"}, {minute + allows, "", "3s", "404", "false"},
		{strict + allows, allows, "3s", "503", "false"},
	}, func(row []string) any {
		e, res := cacheEntry("200 Cache-Control: "+row[0]), cacheEntry(row[3])
		var err error
		if res.Status == 0 {
			err = io.EOF
		}
		now := cacheAfter(row[2]).Add(e.lifetime)
		return e.mayStandIn(splitFields("Cache-Control: "+row[1]), &res.Response, err, now)
	})
}

// No two of these share a name on any file system.
var cacheNames = []string{"h/a/b", "h/a_b", "h/a%2Fb", "h/a%2fb", "h/a%5fb", "h/A/b", "H/a/b", "h/a?b",
	"h/a%3fb", "h/a/b/", "h/a//b", "h:81/a", "h_81/a", "h%3a81/a", "h/a.", "h/a", "h/a%20", "h/..", "h/a+b",
	"h/a%2bb", "h/a%", "h/a:b", "h/a*b", "h/a\\b", "h/\xff", "h/%ff", "h/ü", "h/u\u0308", "h/ß", "con/",
	"con", "nul.txt/", "com1.de/a", "lpt9/", "aux./", "[::1]/", "h", "h/", ".h", "h/a~00000000",
	"h/" + strings.Repeat("?", 100), "h/" + strings.Repeat("?", 101), "h/" + strings.Repeat("a", 301),
	"h/" + strings.Repeat("A", 301), "h/" + strings.Repeat("a", 118) + "+0123456789abcdef"}

var badCacheName = regexp.MustCompile(
	`(?i)^$|^\.|^\+download-|[. ]$|[^!-~]|[<>:"/\\|?*]|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)|^.{200}`)

func FuzzFileName(f *testing.F) {
	eq(f, "the lab's rule", fileName("example.com/logo.png"), "example.com_logo.png")
	for i, url := range cacheNames {
		for _, other := range cacheNames[:i] {
			f.Add(url, other)
		}
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		if a == "" || b == "" {
			t.Skip("no URL is empty")
		}
		x, y, variant := fileName(a), fileName(b), fileName(a)+"~0123abcd"
		eq(t, "what is bad in "+x, badCacheName.FindString(x), "")
		if a != b && strings.EqualFold(x, y) || strings.EqualFold(y, variant) {
			t.Errorf("%q and %q share %s", a, b, y)
		}
	})
}

// A cacheStore is a store without a proxy, whose clock only the test moves.
type cacheStore struct {
	*Cache
	time time.Time
}

func newCacheStore(t *testing.T, limit int64) *cacheStore {
	s := &cacheStore{time: cacheTime}
	var err error
	s.Cache, err = newCache(CacheConfig{dir: t.TempDir(), limit: limit, uses: 1, guard: guard,
		now: func() time.Time { return s.time }, warn: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// get asks for http://example.com/, where there is a text with fields and the
// tag "1". It returns the outcome, Age and Cache-Status.
func (s *cacheStore) get(request, fields, text string) string {
	req := &Request{Method: "GET", URL: URL{"example.com:80", "/"}, Body: new(body)}
	req.Header = splitFields(request)
	res, status, _ := s.roundTrip(req, func(req *Request) (*Response, error) {
		res := &Response{Status: 200, Ready: true, Length: int64(len(text))}
		res.Header = append(splitFields(fields), dateField("Date", s.time), Field{"ETag", `"1"`})
		if req.Header.Has("If-None-Match") {
			res.Status, text = 304, ""
		}
		res.Body = io.NopCloser(strings.NewReader(text))
		return res, nil
	})
	b, _ := io.ReadAll(io.LimitReader(res.Body, res.Length))
	res.Body.Close()
	return fmt.Sprintf("%d %q %s %s %s", res.Status, b, status.Outcome, res.Header.Get("Age"), status)
}

// Memory answers for a second without a look at the file. Age (RFC 9111 §5.1)
// and ttl (RFC 9211 §2.4) count on.
func TestCacheMemory(t *testing.T) {
	s := newCacheStore(t, 1<<30)
	const missed = `200 "text" TCP_MISS 10 proxy; fwd=uri-miss; fwd-status=200; stored`
	const hit = `200 "text" TCP_HIT %d proxy; hit; ttl=%d`
	const renewed = `200 "text" TCP_REFRESH_UNMODIFIED 10 proxy; fwd=stale; fwd-status=304; stored`
	cacheRules(t, [][]string{
		{"at first", "", "0s", missed},
		{"from the file", "", "20s", fmt.Sprintf(hit, 30, 70)},
		{"from memory", "", "1s", `200 "text" TCP_MEM_HIT 31 proxy; hit; ttl=69`},
		{"with a condition", `If-None-Match: "1"`, "0s", `304 "" TCP_IMS_HIT 31 proxy; hit; ttl=69`},
		{"stale, but wanted", "Cache-Control: max-stale", "80s", fmt.Sprintf(hit, 111, -11)},
		{"stale", "", "0s", renewed},
		{"from the new file", "", "1s", fmt.Sprintf(hit, 11, 89)},
		{"file removed, a second ago", "", "1s", `200 "text" TCP_MEM_HIT 12 proxy; hit; ttl=88`},
		{"file removed, more than a second ago", "", "1s", missed},
		{"after the clock was set back", "", "-1h", renewed},
	}, func(row []string) any {
		s.time = s.time.Add(cacheAfter(row[2]).Sub(cacheTime))
		if strings.HasPrefix(row[0], "file removed") {
			os.Remove(filepath.Join(s.dir, "example.com_"))
		}
		return s.get(row[1], "Cache-Control: max-age=100 | Age: 10", "text")
	})
	for size, want := range map[int]string{maxInMemory: "TCP_MEM_HIT", maxInMemory + 1: "TCP_HIT"} {
		s := newCacheStore(t, 1<<30)
		s.get("", "Cache-Control: max-age=100", bytesOf(size))
		s.get("", "", "")
		match(t, fmt.Sprint(size), s.get("Range: bytes=0-2", "", ""), `206 "[^ ]*" `+want+" .*")
	}
}

// Nobody waits for what may not be for all (RFC 9111 §3.5, §5.2.1.4).
func TestCacheWaits(t *testing.T) {
	s := newCacheStore(t, 1<<30)
	waits := func(fields string, ago time.Duration, known chan struct{}) bool {
		req := &Request{Method: "GET", Header: splitFields(fields)}
		x := &transaction{Cache: s.Cache, req: req, name: "example.com_"}
		return x.wait(&download{began: time.Now().Add(-ago), known: known})
	}
	known := make(chan struct{})
	close(known) // so who would wait goes on at once
	cacheRules(t, [][]string{
		{"", "true"}, {"Authorization: Basic eA==", "false"}, {"Cache-Control: no-cache", "false"},
		{"Range: bytes=0-1", "false"},
	}, func(row []string) any { return waits(row[0], 0, known) })
	eq(t, "for longer than 5 s", waits("", joinWait, make(chan struct{})), false)
	bringNothing := func(awaited bool) { // to share
		x := &transaction{Cache: s.Cache, req: &Request{Method: "GET"}, name: "example.com_"}
		x.version = s.version.Load()
		x.status.ForwardStatus = 200
		d, _ := x.claim()
		d.awaited = awaited
		x.release(d)
	}
	bringNothing(false)
	eq(t, "for what nobody waited for", waits("", 0, known), true)
	bringNothing(true)
	eq(t, "for what was not stored", waits("", 0, known), false)
	s.time = s.time.Add(time.Hour)
	eq(t, "an hour later", waits("", 0, known), true)
	bringNothing(true)
	s.get("", "Cache-Control: max-age=60", "")
	eq(t, "once it is stored", waits("", 0, known), true)
}

// cacheProxy starts a proxy on a directory, and an origin. At the end of the
// test nothing must be left open or half done.
func cacheProxy(t testing.TB, dir string, flags ...string) (*testProxy, *origin) {
	t.Helper()
	p := startOn(t, "127.0.0.1:0", dir, flags...)
	t.Cleanup(func() {
		eventually(t, "no download, open file or temporary file is left", func() bool {
			p.cache.Lock()
			left := len(p.cache.downloads) + len(cacheStrays(dir))
			p.cache.Unlock()
			for _, fd := range files("/proc/self/fd") {
				name, _ := os.Readlink("/proc/self/fd/" + fd)
				if strings.HasPrefix(name, dir+"/") {
					left++
				}
			}
			return left == 0
		})
	})
	return p, newOrigin(p)
}

// cacheStrays are the temporary files in a directory.
func cacheStrays(dir string) []string {
	names, _ := filepath.Glob(filepath.Join(dir, temporary+"*"))
	return names
}

// Somebody asks, and the origin has "old". It has "new" when somebody asks 100
// seconds later, and another at once: so the body says where an answer is from.
func TestCacheSecondRequest(t *testing.T) {
	t.Parallel()
	const cc, stale = "Cache-Control: ", "200 Cache-Control: max-age=60"
	const fresh = stale + "0"
	const tag, date = ` | ETag: "1"`, " | Last-Modified: Sunday, 06-Nov-94 08:49:37 GMT"
	const hit, fetched, newHit = `200 "old", hit`, `200 "new", miss`, `200 "new", hit`
	const renewed, shared, stands = `200 "old", renewed`, `200 "old", (hit|collapsed)`, `200 "old", miss`
	p, o := cacheProxy(t, t.TempDir())
	for i, row := range []struct{ first, old, second, new, want, third string }{
		// RFC 9111 §3, §4.2
		{"GET", fresh + " | Date: x", "GET", "", hit, hit},
		{"GET", fresh + ", private", "GET", "", fetched, fetched},
		// §4.3; a date is sent as it came, and a cookie is for one client alone
		{"GET", stale + tag, "GET", "", renewed, shared}, {"GET", stale + date, "GET", "", renewed, shared},
		{"GET", stale + tag, `GET If-None-Match: "1"`, "", "304, renewed", shared},
		{"GET", stale + tag, "GET", stale + ` | ETag: "2"`, fetched, newHit},
		{"GET", stale + tag, "GET", stale + tag + " | Set-Cookie: a=b", renewed + " a=b", shared},
		{"GET", stale + tag, "GET", "200 " + cc + "no-store" + tag, renewed, fetched},
		{"GET", stale + tag, "GET", "200 " + cc + "no-store", fetched, fetched},
		// The origin is gone, or fails: §4.2.4, RFC 5861 §4
		{"GET", stale, "GET", "0", stands, stands},
		{"GET", stale + ", must-revalidate", "GET", "0", "502 .*", ""},
		{"GET", stale + ", stale-if-error=99", "GET", "503 ", stands, stands},
		// RFC 9111 §5.2.1, §3.5
		{"GET", fresh + tag, "GET " + cc + "no-cache", "", renewed, shared},
		{"GET", fresh, "GET " + cc + "no-cache", "", fetched, newHit},
		{"HEAD", fresh, "GET " + cc + "only-if-cached", "", "504 .*", fetched},
		{"GET", fresh, "GET Authorization: Basic eA==", "", hit, hit},
		// §3.3, RFC 9110 §9.3
		{"GET Range: bytes=0-3", "206" + fresh[3:], "GET", "", `206 "new", miss`, ""},
		{"GET Range: bytes=1-2", fresh, "GET", "", hit, hit},
		{"GET", fresh, "GET Range: bytes=0-1,3-3", "", fetched, hit},
		{"POST", fresh, "GET", "", fetched, newHit}, {"GET", fresh, "HEAD", "", "200, hit", hit},
	} {
		t.Run(row.first+", "+row.old+", "+row.second+", "+row.new, func(t *testing.T) {
			path := fmt.Sprint("/", i)
			ask := func(request string) string {
				method, fields, _ := strings.Cut(request, " ")
				r := p.do(method, o.url(path), fields, "")
				return strings.TrimSpace(r.String() + " " + r.Get("Set-Cookie"))
			}
			o.set(path, cachePage(row.old, "old"))
			match(t, "first", ask(row.first), ".*, miss")
			p.move(100 * time.Second)
			o.set(path, cachePage(cmp.Or(row.new, row.old), "new"))
			match(t, "second", ask(row.second), row.want)
			match(t, "third", ask("GET"), cmp.Or(row.third, row.want))
		})
	}
	o.set("/", cachePage(fresh, "key"))
	p.say("GET " + o.url("/") + " HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
	eq(t, "Host is no part of the key", p.get(o.url("/"), ""), `200 "key", hit`) // RFC 9111 §2
	eq(t, "but the query is", p.get(o.url("/?a"), ""), `200 "key", miss`)

	const head = "\r\nCache-Control: max-age=60\r\nContent-Length: 3\r\nETag: "
	other := script(t, "HTTP/1.1 200 OK"+head+"\"1\"\r\n\r\nold",
		"HTTP/1.1 304 Not Modified"+head+"W/\"2\"\r\n\r\n", "HTTP/1.1 200 OK"+head+"\"2\"\r\n\r\nnew")
	eq(t, "first", p.get("http://"+other.host+"/", ""), `200 "old", miss`)
	p.move(100 * time.Second)
	eq(t, "a 304 for another tag", p.get("http://"+other.host+"/", ""), fetched) // RFC 9111 §4.3.4
	eq(t, "third", p.get("http://"+other.host+"/", ""), newHit)
}

func TestCacheFlags(t *testing.T) {
	t.Parallel()
	cacheRules(t, [][]string{ // requests, a while after the first two
		{"-uses=3", "max-age=9999", "0s", " miss miss miss hit hit"},
		{"-uses=3", "max-age=9999", "11m", " miss miss miss miss miss hit"},
		{"-ttl=10m", "x", "9m", " miss hit hit hit"}, {"-ttl=10m", "x", "11m", " miss hit miss hit"},
	}, func(row []string) any {
		p, o := cacheProxy(t, t.TempDir(), row[0])
		o.put("/", "Cache-Control: "+row[1], "")
		got := p.get(o.url("/"), "").String() + p.get(o.url("/"), "").String()
		p.move(cacheAfter(row[2]).Sub(cacheTime))
		for range strings.Count(row[3], " ") - 2 {
			got += p.get(o.url("/"), "").String()
		}
		return strings.ReplaceAll(got, "200,", "")
	})
}

// Conditions and ranges, of an entry as it stands in the cache.
func TestCacheConditionsAndRanges(t *testing.T) {
	t.Parallel()
	const date, before = "Mon, 02 Jan 2006 15:04:05 GMT", "Sun, 01 Jan 2006 15:04:05 GMT"
	const after, none = "Tuesday, 03-Jan-06 15:04:05 GMT", "416 bytes */10, hit"
	const all, first, has = `200 "0123456789", hit`, `206 "01" bytes 0-1/10, hit`, "304, hit"
	p, o := cacheProxy(t, t.TempDir())
	o.put("/", `ETag: "1" | Cache-Control: max-age=6000 | Last-Modified: `+date, "0123456789")
	p.get(o.url("/"), "")
	cacheRules(t, [][]string{
		// RFC 9110 §13.1.2, §13.1.3, §13.2.2
		{`If-None-Match: W/"1"`, has}, {`If-None-Match: "0", "1"`, has}, {`If-None-Match: *`, has},
		{`If-None-Match: "0" | If-None-Match: "1"`, has}, {`If-None-Match: "1,2"`, all},
		{`If-None-Match: 1`, all}, {"If-Modified-Since: " + date, has}, {"If-Modified-Since: " + after, has},
		{"If-Modified-Since: " + before, all}, {"If-Modified-Since: garbage", all},
		{`If-None-Match: "2" | If-Modified-Since: ` + after, all},
		{`If-None-Match: "1" | If-Modified-Since: ` + before, has},
		{`If-None-Match: "1" | Range: bytes=0-1`, has}, {`If-None-Match: "2" | Range: bytes=0-1`, first},
		// RFC 9110 §14.1.2
		{"Range: bytes=5-", `206 "56789" bytes 5-9/10, hit`}, {"Range: bytes=-1", `206 "9" bytes 9-9/10, hit`},
		{"Range: bytes=-30", `206 "0123456789" bytes 0-9/10, hit`}, {"Range: bytes=10-", none},
		{"Range: bytes=9-99999999999999999999", `206 "9" bytes 9-9/10, hit`}, {"Range: bytes=-0", none},
		{"Range: bytes=99999999999999999999-", none}, {"Range: bytes=5-4", all}, {"Range: bytes=-", all},
		{"Range: bytes=a-b", all}, {"Range: bytes=+1-2", all}, {"Range: lines=0-4", all},
		// RFC 9110 §13.1.5
		{`Range: bytes=0-1 | If-Range: "1"`, first}, {`Range: bytes=0-1 | If-Range: "2"`, all},
		{`Range: bytes=0-1 | If-Range: W/"1"`, all}, {"Range: bytes=0-1 | If-Range: " + date, first},
		{"Range: bytes=0-1 | If-Range: " + after, all},
	}, func(row []string) any { return p.get(o.url("/"), row[0]) })
	eq(t, "a condition of HEAD", p.do("HEAD", o.url("/"), `If-None-Match: "1"`, ""), has)
	eq(t, "a range of HEAD", p.do("HEAD", o.url("/"), "Range: bytes=0-1", ""), "200, hit") // §14.2
	eq(t, "tag of a 304", p.get(o.url("/"), "If-None-Match: *").Get("ETag"), `"1"`)        // §15.4.5
}

// An entry is a transcript of the request and the response.
func TestCacheTranscripts(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "a", "b")
	p, o := cacheProxy(t, dir)
	other, _ := cacheProxy(t, dir) // as after a restart
	for path, length := range map[string]string{"/known": " | Content-Length: 100000", "/chunked": ""} {
		image, url := bytesOf(100_000), o.url(path)
		o.put(path, `Cache-Control: max-age=60 | Connection: X | X: y | ETag: "abc"`+length, image)
		eq(t, "first", p.get(url, ""), "200 100000 bytes, miss")
		text, _ := os.ReadFile(p.entry(url))
		match(t, "heads", strings.TrimSuffix(string(text), image), `GET `+url+` HTTP/1\.1\r\n`+
			`Date: [^\n]+ GMT\r\nInner: 127\.0\.0\.1\r\n\r\nHTTP/1\.1 200 OK\r\n`+
			`((Cache-Control: max-age=60|Content-Type: text/plain|Etag: "abc"|Date: [^\n]+ GMT)\r\n){4}`+
			`Content-Length: +100000\r\n\r\n`)
		info, _ := os.Stat(p.entry(url))
		folder, _ := os.Stat(dir)
		eq(t, "modes", fmt.Sprint(info.Mode(), folder.Mode()), "-rw------- drwx------")
		hit := other.get(url, "")
		eq(t, "by another proxy", hit, "200 100000 bytes, hit")
		eq(t, "body and fields", fmt.Sprint(hit.body == image, hit.Header["X"]), "true []")
		for what, remove := range map[string]func(string) error{p.entry(url): os.Remove, dir: os.RemoveAll} {
			remove(what)
			p.move(2 * time.Second)
			eq(t, "after rm "+what, p.get(url, ""), "200 100000 bytes, miss")
			eq(t, "made anew", p.get(url, ""), "200 100000 bytes, hit")
		}
		os.RemoveAll(dir)
		os.Mkdir(dir, 0o700) // another one in its place
		other.ahead.Store(p.ahead.Load())
		eq(t, "another directory", other.get(url, ""), "200 100000 bytes, miss")
	}
}

// Whatever happens to a file, no answer is wrong.
func TestCacheDamagedEntries(t *testing.T) {
	t.Parallel()
	p, o := cacheProxy(t, t.TempDir())
	const fields, status, length = "Cache-Control: max-age=600", "HTTP/1.1 200 OK", "Content-Length: "
	outside, body := filepath.Join(t.TempDir(), "x"), bytesOf(2000)
	for _, row := range [][3]string{ // what is replaced in a file, and by what
		{"cut", body, body[1:]}, {"cut in a head", length, "\x00"}, {"longer", body, body + "x"},
		{"garbage", "GET ", body}, {"another URL", "http://", "http://x"}, {"no status", "200 OK", "2OO OK"},
		{"another length", length + " ", length + "1"}, {"negative", length + " ", length + "-"},
		// The first edition had such files.
		{"a part", status, "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/20"},
		{"a cookie", status, status + "\r\nSet-Cookie: a=b"},
		{"a directory"}, {"a pipe"}, {"a link out"},
	} {
		t.Run(row[0], func(t *testing.T) {
			path := "/" + url.PathEscape(row[0])
			o.put("/"+row[0], fields, body)
			p.get(o.url(path), "")
			name := p.entry(o.url(path))
			text, _ := os.ReadFile(name)
			os.Rename(name, outside)
			switch row[0] {
			case "a directory":
				os.MkdirAll(name+"/full", 0o700)
			case "a pipe":
				syscall.Mkfifo(name, 0o600)
			case "a link out":
				os.Symlink(outside, name)
			default:
				os.WriteFile(name, []byte(strings.Replace(string(text), row[1], row[2], 1)), 0o600)
			}
			p.move(2 * time.Second)
			got := p.get(o.url(path), "")
			eq(t, "reply", got, "200 2000 bytes, miss")
			eq(t, "all of it", got.body == body, true)
		})
	}
	o.put("/large", fields, bytesOf(24<<20))
	p.get(o.url("/large"), "")
	got := cacheCrowd(p, o, "/large", fields, bytesOf(24<<20), 1, 1, func() {
		os.Truncate(p.entry(o.url("/large")), 1000)
	})
	match(t, "cut while it is read", fmt.Sprint(got), `map\[200 .* cut, hit:1\]`)
}

// A process that is killed leaves no wrong file. What it was writing goes after
// an hour, as another may still be writing what is younger.
func TestCacheKilled(t *testing.T) {
	t.Parallel()
	dir, o, stuck := t.TempDir(), newOrigin(start(t)), make(chan bool)
	defer close(stuck)
	o.set("/20", cacheParts(o, "Cache-Control: max-age=9", "stuck", 2, stuck))
	for i := range 20 {
		length := []string{"", fmt.Sprint(" | Content-Length: ", i*20_000)}[i%2]
		o.set(fmt.Sprint("/", i), originPage{do: func(w http.ResponseWriter, r *http.Request) {
			rest := make(chan bool)
			time.AfterFunc(rand.N(10*time.Millisecond), func() { close(rest) })
			cacheParts(o, "Cache-Control: max-age=99999"+length, bytesOf(i*20_000), i*10_000, rest).do(w, r)
		}})
	}
	for round := range 3 {
		says, cmd := new(buffer), exec.Command(os.Args[0], "-cache", dir, "-files", "", "0")
		cmd.Env = append(os.Environ(), "PROXY_TEST_RUNS_MAIN=1")
		cmd.Stderr = says
		cmd.Start()
		eventually(t, "it listens", func() bool { return strings.Contains(says.String(), "listening") })
		host := regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(says.String())
		q := &testProxy{client: &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: host})}}
		go together(21, func(i int) { q.get(o.url(fmt.Sprint("/", i)), "") })
		eventually(t, "some files", func() bool {
			return len(files(dir)) > 6*(round+1) && len(cacheStrays(dir)) > round
		})
		cmd.Process.Kill()
		cmd.Wait()
	}
	p, _ := cacheProxy(t, dir)
	for i := range 20 {
		got := p.get(o.url(fmt.Sprint("/", i)), "")
		eq(t, fmt.Sprint("/", i, " is whole"), got.body == bytesOf(i*20_000) && got.err == nil, true)
	}
	p.cache.trim(false)
	eq(t, "young files stay", len(cacheStrays(dir)) >= 3, true)
	p.move(strayWait + time.Minute)
	p.cache.trim(false)
	eq(t, "files after an hour", len(files(dir)), 20)
}

// A 304 brings new fields (RFC 9111 §3.2), for a body in memory, in a file, and
// in one so large that it is copied in steps.
func TestCacheRenewal(t *testing.T) {
	t.Parallel()
	p, o := cacheProxy(t, t.TempDir())
	other, _ := cacheProxy(t, p.dir)
	const fresh = `Cache-Control: max-age=600 | ETag: W/"1" | `
	for _, size := range []int{100, 2 * maxInMemory, copyStep + 100} {
		path, body := fmt.Sprint("/", size), bytesOf(size)
		o.put(path, fresh+"X-A: 1 | X-B: 1", body)
		p.get(o.url(path), "")
		p.move(700 * time.Second)
		o.put(path, fresh+"X-A: 2 | X-A: 3 | Content-Encoding: gzip", "")
		got := p.get(o.url(path), `If-None-Match: "other" | Range: bytes=0-3 | If-Modified-Since: x`)
		eq(t, "a range", got, fmt.Sprintf("206 %q bytes 0-3/%d, renewed", body[:4], size))
		asked := o.requests(path)[1].Header
		eq(t, "asked", fmt.Sprint(asked["If-None-Match"], asked["If-Modified-Since"]), `[W/"1"] []`)
		eventually(t, "renewed", func() bool { return p.get(o.url(path), "").Get("X-A") == "2" })
		p.move(500 * time.Second)
		other.ahead.Store(p.ahead.Load())
		for _, p := range []*testProxy{p, other} {
			got = p.get(o.url(path), "")
			eq(t, "later", fmt.Sprint(got.Header["X-A"], got.Header["X-B"], got.Header["Content-Encoding"],
				got.body == body, strings.HasSuffix(got.String(), ", hit")), "[2 3] [1] [] true true")
		}
	}
}

func TestCacheInvalidation(t *testing.T) { // RFC 9111 §4.4
	t.Parallel()
	p, o := cacheProxy(t, t.TempDir())
	other, n := newOrigin(p), 0
	const fields = "Cache-Control: max-age=600"
	cacheRules(t, [][]string{
		{"POST /PATH", "200 ", "miss"}, {"PUT /PATH", "204 ", "miss"}, {"DELETE /PATH", "200 ", "miss"},
		{"PATCH /PATH", "302 ", "miss"}, {"M-ODD /PATH", "200 ", "miss"}, {"OPTIONS /PATH", "200 ", "hit"},
		{"REPORT /PATH", "200 ", "hit"}, {"POST /PATH", "500 ", "hit"}, {"POST /PATH", "404 ", "hit"},
		{"POST /x", "201 Location: http://HOST/PATH", "miss"}, {"POST /x", "200 Location: ?x", "hit"},
		{"POST /x", "200 Content-Location: /PATH", "miss"},
		{"POST /x", "200 Location: http://OTHER/PATH", "hit"},
		{"POST /x", "200 Content-Location: http://HOST.evil/PATH", "hit"},
	}, func(row []string) any {
		n++
		path := fmt.Sprint("/", n)
		for _, o := range []*origin{o, other} {
			o.put(path, fields, "")
			p.get(o.url(path), "")
		}
		names := strings.NewReplacer("HOST", o.host, "OTHER", other.host, "PATH", path[1:])
		method, by, _ := strings.Cut(names.Replace(row[0]), " ")
		o.set(by, cachePage(names.Replace(row[1]), ""))
		p.do(method, o.url(by), "", "")
		o.put(path, fields, "")
		eq(t, "on another host", p.get(other.url(path), ""), "200, hit")
		return strings.TrimPrefix(p.get(o.url(path), "").String(), "200, ")
	})
	got := cacheCrowd(p, o, "/late", fields, "old", 2, 1, func() {
		o.put("/late", fields, "new")
		p.do("POST", o.url("/late"), "", "")
	})
	eq(t, "a download under way", got, `map[200 "old", miss:1]`)
	eq(t, "is not stored", p.get(o.url("/late"), ""), `200 "new", miss`)
}

// -size is kept. The least recently used entries go, and nothing of others.
func TestCacheSize(t *testing.T) {
	t.Parallel()
	p, o := cacheProxy(t, t.TempDir(), "-size", "1M")
	foreign := filepath.Join(p.dir, "example.com_my_film.mkv")
	os.WriteFile(foreign, make([]byte, 2<<20), 0o600)
	os.Chtimes(foreign, time.Time{}, time.Unix(0, 0))
	long := "/" + strings.Repeat("_", 60) // so that the name of the file ends in a hash
	for i := range 12 {
		path := fmt.Sprint(long, i)
		o.put(path, "Cache-Control: max-age=99999999", bytesOf(100_000))
		if i == 8 {
			p.move(2 * time.Second)
			eq(t, "used again", p.get(o.url(long+"0"), ""), "200 100000 bytes, hit")
		}
		eq(t, "new", p.get(o.url(path), ""), "200 100000 bytes, miss")
		if i < 8 {
			used := time.Now().Add(time.Duration(i-100) * time.Hour)
			os.Chtimes(p.entry(o.url(path)), used, used)
		}
	}
	eventually(t, "the limit is kept", func() bool {
		n, size := p.cache.usage()
		return size > 500_000 && size <= 1<<20 && int(n)+1 == len(files(p.dir))
	})
	kept := files(p.dir)
	for i, want := range map[string]bool{"0": true, "1": false, "2": false, "10": true, "11": true} {
		eq(t, i+" is kept", slices.Contains(kept, fileName(o.host+long+i)), want)
	}
	eq(t, "and what is of others", slices.Contains(kept, filepath.Base(foreign)), true)
	for path, length := range map[string]string{"/known": " | Content-Length: 5242880", "/chunked": ""} {
		got := cacheCrowd(p, o, path, "Cache-Control: max-age=600"+length, bytesOf(5<<20), 3<<20, 1, func() {
			eq(t, "files", files(p.dir), kept) // it was given up after 1 MiB
		})
		eq(t, "what is larger than that", got, "map[200 5242880 bytes, miss:1]")
	}
}

// cacheParts answers with n bytes of a body, and with the rest once the test
// closes that channel.
func cacheParts(o *origin, fields, body string, n int, rest chan bool) originPage {
	return originPage{do: func(w http.ResponseWriter, r *http.Request) {
		for _, f := range splitFields(o.at("Date: @0 | " + fields)) {
			w.Header().Set(f.Name, f.Value)
		}
		io.WriteString(w, body[:n])
		w.(http.Flusher).Flush()
		select {
		case <-rest:
			io.WriteString(w, body[n:])
		case <-r.Context().Done():
		}
	}}
}

// A replyCount counts equal replies.
type replyCount map[string]int

// cacheCrowd asks n times at once for a body, of which the origin sends some
// bytes. When all have these it calls do, and the rest comes. It counts equal
// replies.
func cacheCrowd(p *testProxy, o *origin, path, fields, body string, some, n int, do func()) replyCount {
	rest := make(chan bool)
	o.set(path, cacheParts(o, fields, body, some, rest))
	var have sync.WaitGroup
	have.Add(n)
	go func() {
		have.Wait()
		do()
		close(rest)
	}()
	replies := make(chan reply, n)
	together(n, func(int) {
		begin := make([]byte, some)
		res, err := p.client.RoundTrip(httptest.NewRequest("GET", o.url(path), nil))
		if err == nil {
			_, err = io.ReadFull(res.Body, begin)
		}
		have.Done()
		if err != nil {
			p.t.Error(err)
			return
		}
		r := readReply(res)
		r.body = string(begin) + r.body
		replies <- r
	})
	close(replies)
	count := replyCount{}
	for r := range replies {
		count[r.String()]++
		eq(p.t, "no byte is wrong", strings.HasPrefix(body, r.body), true)
	}
	return count
}

// A hundred clients at once are one request, whatever becomes of it.
func TestCacheCrowd(t *testing.T) {
	t.Parallel()
	p, o := cacheProxy(t, t.TempDir())
	const fresh, whole, cut = "Cache-Control: max-age=600", "200 300000 bytes", "200 150000 bytes cut"
	for i, row := range [][3]string{
		{"", whole, whole + ", hit"}, {" | Content-Length: 300000", whole, whole + ", hit"},
		{"", cut, `200 "new", miss`}, {" | Content-Length: 300000", cut, `200 "new", miss`},
	} {
		t.Run(row[1]+row[0], func(t *testing.T) {
			path := fmt.Sprint("/", i)
			got := cacheCrowd(p, o, path, fresh+row[0], bytesOf(300_000), 150_000, 100, func() {
				if row[1] == cut {
					o.CloseClientConnections()
				}
			})
			eq(t, "replies", got, map[string]int{row[1] + ", miss": 1, row[1] + ", collapsed": 99})
			eq(t, "requests", o.count(path), 1)
			o.put(path, "", "new")
			eq(t, "afterwards", p.get(o.url(path), ""), row[2])
		})
	}
	hold := func() {}
	o.set("/variants", originPage{do: func(w http.ResponseWriter, r *http.Request) {
		hold()
		r.URL.Path = "/" + r.Header.Get("Foo")
		o.ServeHTTP(w, r)
	}})
	for _, row := range [][3]string{ // after a while, the requests so far, and what the first gets
		{"0s", "2", "miss"}, {"2s", "2", "hit"}, {"700s", "4", "renewed"}, {"0s", "7", "miss"}, // §4.1
	} {
		t.Run("of two variants: "+row[2], func(t *testing.T) {
			p.move(cacheAfter(row[0]).Sub(cacheTime))
			if row[1] == "7" {
				p.do("POST", o.url("/variants"), "Foo: a", "")
			}
			hold = sync.OnceFunc(func() {
				eventually(t, "all ask", func() bool { return p.active.Load() == 40 })
			})
			o.put("/a", fresh+` | Vary: Foo | ETag: "a"`, "a")
			o.put("/b", fresh+` | Vary: Foo | ETag: "b"`, "b")
			together(40, func(i int) {
				foo := "ab"[i%2 : i%2+1]
				got := p.get(o.url("/variants"), "Foo: "+foo).String()
				match(t, "reply", got, `200 "`+foo+`", (hit|collapsed|`+row[2]+`)`)
			})
			eq(t, "requests", o.count("/variants"), row[1])
		})
	}
	all := make(chan bool) // what may not be stored is fetched side by side
	o.set("/mine", cacheParts(o, "Cache-Control: private", "mine", 0, all))
	go func() {
		eventually(t, "20 ask before one has an answer", func() bool { return o.count("/mine") == 20 })
		close(all)
	}()
	together(20, func(int) { match(t, "reply", p.get(o.url("/mine"), "").String(), `200 "mine", \w+`) })
}

// Who stalls or leaves hurts nobody. What nobody reads any more is finished if
// little is left, and else dropped.
func TestCacheWhoStallsOrLeaves(t *testing.T) {
	t.Parallel()
	const size, known = 32 << 20, " | Content-Length: 33554432"
	for _, row := range []struct {
		name, length string
		left, others int
		want         string
	}{
		{"others stall, or read", known, 8 << 20, 3, "hit"},
		{"little is left", known, maxUnread - 1<<17, 0, "hit"},
		{"more is left", known, maxUnread + 1<<17, 0, "miss"}, {"who knows how much", "", 1000, 0, "miss"},
	} {
		t.Run(row.name, func(t *testing.T) {
			p, o := cacheProxy(t, t.TempDir())
			rest, body := make(chan bool), bytesOf(size)
			o.set("/", cacheParts(o, "Cache-Control: max-age=600"+row.length, body, size-row.left, rest))
			var clients []*wire
			for range 1 + row.others {
				w := p.dial()
				w.say(request(o.url("/"), ""))
				readHead(w.in)
				clients = append(clients, w)
			}
			eventually(t, "all but that is here", func() bool {
				info, err := os.Stat(cacheStrays(p.dir)[0])
				return err == nil && info.Size() >= int64(size-row.left)
			})
			clients[0].Conn.(*net.TCPConn).SetLinger(0) // so that it leaves by a reset
			clients[0].Close()
			eventually(t, "it is gone", func() bool { return int(p.active.Load()) == row.others })
			close(rest)
			for _, w := range clients[1:] { // while the next one stalls
				eq(t, "another has all", w.rest() == body, true)
			}
			eventually(t, "it is over", func() bool { return len(cacheStrays(p.dir)) == 0 })
			o.put("/", "Cache-Control: max-age=600", body)
			eq(t, "afterwards", p.get(o.url("/"), ""), fmt.Sprintf("200 %d bytes, %s", size, row.want))
		})
	}
}

// Who comes after a download has been dropped, and before its origin knows,
// must not get a part of it.
func TestCacheDroppedDownloads(t *testing.T) {
	s := newCacheStore(t, 1<<30)
	out, in := io.Pipe()
	req := &Request{Method: "GET", URL: URL{"example.com:80", "/"}, Body: new(body)}
	res, _, _ := s.roundTrip(req, func(*Request) (*Response, error) {
		e := cacheEntry("200 Cache-Control: max-age=60")
		e.Length, e.Body = -1, io.NopCloser(out) // of a length that nobody knows, and slow to close
		return &e.Response, nil
	})
	res.Body.Close()
	s.Lock()
	eq(t, "nobody joins it", s.downloads["example.com_"] == nil, true)
	s.Unlock()
	in.CloseWithError(io.ErrClosedPipe)
	eventually(t, "it is over", func() bool { return len(files(s.dir)) == 0 })
}

// Who asks for a part, or has it already, while a download is under way
// (RFC 9110 §14.2, §13.2.2).
func TestCacheRangesOfDownloads(t *testing.T) {
	t.Parallel()
	p, o := cacheProxy(t, t.TempDir())
	const known, fields = " | Content-Length: 10", `Cache-Control: max-age=600 | ETag: "1"`
	cacheRules(t, [][]string{
		{known, "Range: bytes=1-2", `206 "12" bytes 1-2/10, collapsed`}, // which is here
		{known, "Range: bytes=-2", `206 "89" bytes 8-9/10, collapsed`},  // which is to come
		{"", "Range: bytes=1-2", `200 "0123456789", collapsed`},         // of an unknown length
		{known, "Range: bytes=10-", "416 bytes */10, collapsed"},        // behind the end
		{known, `If-None-Match: "1"`, "304, collapsed"},
	}, func(row []string) any {
		second, path := make(chan reply, 1), fmt.Sprint("/", rand.Int())
		first := cacheCrowd(p, o, path, fields+row[0], "0123456789", 5, 1, func() {
			go func() { second <- p.get(o.url(path), row[1]) }()
			eventually(t, "both", func() bool {
				p.cache.Lock()
				defer p.cache.Unlock()
				d := p.cache.downloads[fileName(o.host+path)]
				return d.users == 3 || len(second) > 0
			})
		})
		eq(t, "first", first, `map[200 "0123456789", miss:1]`)
		return <-second
	})
	rest := make(chan bool)
	defer close(rest)
	raw := listen(t, "127.0.0.1:0", func(c net.Conn, in *bufio.Reader) {
		if strings.Contains(readHead(in), "Range") {
			io.WriteString(c, "HTTP/1.1 206 Partial Content\r\nContent-Length: 9\r\n\r\n0123")
			<-rest
		}
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwhole")
	})
	w := p.dial()
	w.say(request("http://"+raw.host+"/", "Range: bytes=0-8\r\n"))
	match(t, "a part of the origin's", readHead(w.in), "HTTP/1.1 206 .*") // RFC 9111 §3.3
	eq(t, "all beside it", p.get("http://"+raw.host+"/", ""), `200 "whole", miss`)
}

func TestCacheFullDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", dir).CombinedOutput()
	if err != nil {
		t.Skipf("no small disk to be had: %s", out)
	}
	t.Cleanup(func() { exec.Command("umount", "-l", dir).Run() })
	p, o := cacheProxy(t, dir)
	var told buffer
	p.cache.warn = func(err error) { fmt.Fprintln(&told, err, errors.Is(err, syscall.ENOSPC)) }
	const fresh = `ETag: "1" | Cache-Control: max-age=60000`
	large := bytesOf(100_000)
	for path, length := range map[string]string{"/chunked": "", "/known": " | Content-Length: 20971520"} {
		got := cacheCrowd(p, o, path, fresh+length, bytesOf(20<<20), 300_000, 6, func() {})
		for reply, n := range got {
			match(t, "replies", fmt.Sprint(n, reply), `1200 20971520 bytes, miss|\d200 \d+ bytes cut, collapsed`)
		}
		eq(t, "who was first", got["200 20971520 bytes, miss"], 1)
		eventually(t, "it is over", func() bool { return p.active.Load() == 0 && len(files(dir)) == 0 })
	}
	match(t, "the operator is told once", told.String(), "not stored: [^\n]*no space left on device true\n")
	for i := range 12 {
		p.move(2 * time.Minute)
		o.put(fmt.Sprint("/", i), fresh, large)
		eq(t, "all", p.get(o.url(fmt.Sprint("/", i)), "").body == large, true)
	}
	eventually(t, "room is made, and the last is stored", func() bool {
		p.move(2 * time.Minute)
		return strings.HasSuffix(p.get(o.url("/11"), "").String(), "hit")
	})
	var n, size int64
	eventually(t, "it is counted", func() bool {
		p.cache.trim(false) // what is stored while it counts may count twice
		n, size = p.cache.usage()
		return n == int64(len(files(dir))) && size <= 1<<20
	})
	eq(t, "files", n, len(files(dir)))
	fill := func(name string) { // so that it stays full
		for i := range 20 {
			os.WriteFile(filepath.Join(dir, fmt.Sprint(name, i)), []byte(large), 0o600)
		}
	}
	fill("a")
	o.put("/small", fresh, "small")
	small := p.get(o.url("/small"), "")
	eq(t, "a small one", small, `200 "small", miss`)
	match(t, "it says why", small.Get("Cache-Status"), ".*; fwd-status=200; detail=disk-error")
	fill("b")
	eq(t, "a renewal", p.get(o.url("/11"), "Cache-Control: no-cache").body == large, true)
	o.put("/range", fresh+" | Content-Length: 600000", bytesOf(600_000))
	pad := filepath.Join(dir, "a0") // its room is enough for a head, but not for all of the body
	for range 5 {
		eventually(t, "what was before is over", func() bool { return p.active.Load() == 0 })
		os.WriteFile(pad, []byte(large), 0o600)
		fill("c")
		os.Remove(pad)
		got := p.get(o.url("/range"), "Range: bytes=599990-")
		eq(t, "the end of a body", got.body == bytesOf(600_000)[599_990:], true)
	}
}

// All at once for as long as PROXY_SOAK says, with an oracle for every byte.
func TestCacheSoak(t *testing.T) {
	d, err := time.ParseDuration(os.Getenv("PROXY_SOAK"))
	if err != nil {
		t.Skip("PROXY_SOAK does not say for how long, as 60s")
	}
	end := time.Now().Add(d)
	p, o := cacheProxy(t, t.TempDir(), "-size", "10M")
	for i := range 100 {
		fields := []string{"Cache-Control: max-age=2", "", "Cache-Control: max-age=1, stale-if-error=9",
			`ETag: "1"`, "Vary: Foo | Cache-Control: max-age=60"}[i%5]
		o.put(fmt.Sprint("/", i), fields, bytesOf(i*i*200))
	}
	cut := script(t, "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: 9\r\n\r\nhello\x00")
	requests := []string{"", "Cache-Control: no-cache", "Foo: 1", "Foo: 2", "Cache-Control: max-age=0"}
	together(32, func(int) {
		for time.Now().Before(end) {
			i := rand.IntN(100)
			url, body := o.url(fmt.Sprint("/", i)), bytesOf(i*i*200)
			from := rand.IntN(len(body) + 1)
			switch rand.IntN(10) {
			case 0:
				eq(t, "a cut answer is cut", p.get("http://"+cut.host+"/", "").err != nil, true)
			case 1: // who leaves before the answer, or in its midst
				w := p.dial()
				w.say(request(url, ""))
				w.SetReadDeadline(time.Now().Add(rand.N(3 * time.Millisecond)))
				io.CopyN(io.Discard, w.in, int64(from))
				w.Close()
			case 2:
				p.do("POST", url, "", "hello")
			case 3:
				os.Remove(filepath.Join(p.dir, fileName(url[len("http://"):])))
			case 4:
				got := p.get(url, fmt.Sprintf("Range: bytes=%d-", from))
				want := map[int]string{200: body, 206: body[from:]}[got.status]
				eq(t, "a range", got.body == want && got.err == nil, true)
			default:
				got := p.get(url, requests[rand.IntN(len(requests))])
				eq(t, url, got.status == 200 && got.body == body && got.err == nil, true)
			}
		}
	})
}

// What a 304 is about: by its tag, or else by its date of change (RFC 9111 §4.3.4).
func TestCacheSameRepresentation(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		stored, validation string
		want               bool
	}{
		{`ETag: "1"`, `ETag: "1"`, true}, {`ETag: "1"`, `ETag: W/"1"`, true}, {`ETag: "1"`, `ETag: "2"`, false},
		{`ETag: "1"`, "", true}, {"Last-Modified: a", "Last-Modified: a", true},
		{"Last-Modified: a", "Last-Modified: b", false}, {"Last-Modified: a", "", true},
		{`ETag: "1" | Last-Modified: a`, `ETag: "1" | Last-Modified: b`, true},
	} {
		t.Run(test.stored+" and "+test.validation, func(t *testing.T) {
			eq(t, "same", sameRepresentation(splitFields(test.stored), splitFields(test.validation)), test.want)
		})
	}
}

// A renewal is finished though the client who caused it wants none of the body.
func TestCacheRenewalOutlivesItsClient(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := newOrigin(p)
	o.put("/", `Cache-Control: max-age=60 | ETag: "1"`, bytesOf(5<<20))
	eq(t, "first", len(p.get(o.url("/"), "").body), 5<<20)
	p.move(61 * time.Second)
	eq(t, "a condition", p.get(o.url("/"), `If-None-Match: "1"`), "304, renewed")
	eventually(t, "a hit", func() bool { return p.get(o.url("/"), `If-None-Match: "1"`).String() == "304, hit" })
	eq(t, "requests", o.count("/"), 2)
}

// A 304 for one who has credentials leaves what is stored for all.
func TestCachePersonalRenewals(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := newOrigin(p)
	o.put("/", `Cache-Control: max-age=60 | ETag: "1"`, "body")
	p.get(o.url("/"), "")
	p.move(61 * time.Second)
	eq(t, "with credentials", p.get(o.url("/"), "Authorization: Basic eA=="), `200 "body", renewed`)
	eq(t, "without", p.get(o.url("/"), ""), `200 "body", renewed`)
}

// Chunks of one byte give nobody the room for a line without end (RFC 9112 §7.1.1).
func TestWireChunkRoom(t *testing.T) {
	t.Parallel()
	text := strings.Repeat("1\r\nx\r\n", 100_000) + "1;" + strings.Repeat("a", 100_000) + "\r\nx\r\n0\r\n\r\n"
	b := newBody(newConn(&wireStub{from: strings.NewReader(text)}), -1, true)
	n, err := io.Copy(io.Discard, b)
	eq(t, "read", fmt.Sprint(n, " ", err), "100000 more than 65536 bytes in front of the body")
}

func BenchmarkHit(b *testing.B)  { benchCache(b, "max-age=9999", "/") }
func BenchmarkMiss(b *testing.B) { benchCache(b, "no-store", "/") }
func BenchmarkFill(b *testing.B) { benchCache(b, "max-age=9999", "/%d") }

// benchCache asks for 1,000 bytes on lasting connections over loopback, at the
// same path or at new ones.
func benchCache(b *testing.B, directive, path string) {
	p := start(b)
	o := script(b, "HTTP/1.1 200 OK\r\nCache-Control: "+directive+"\r\nContent-Type: text/html\r\n"+
		"Content-Length: 1000\r\n\r\n"+strings.Repeat("x", 1000))
	var n atomic.Int64
	head := strings.TrimSuffix("GET http://"+o.host+path, "%d")
	p.get("http://"+o.host+"/", "")
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		w := p.dial()
		w.SetDeadline(time.Time{})
		for pb.Next() {
			anew := ""
			if path != "/" {
				anew = strconv.FormatInt(n.Add(1), 10)
			}
			w.say(head + anew + " HTTP/1.1\r\nHost: " + o.host + "\r\n\r\n")
			if readHead(w.in) == "" {
				b.Error("no answer")
				return
			}
			w.in.Discard(1000)
		}
	})
}

// The program: its command line and its end, who may ask and for what, the
// life of a request, tunnels, and what is said of it all.

// command makes the program ready to run in a directory of its own: it is
// this binary, see TestMain.
func command(t testing.TB, args ...string) *exec.Cmd {
	name, _ := os.Executable()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "PROXY_TEST_RUNS_MAIN=1", "CACHE_DIRECTORY=here")
	t.Cleanup(func() { cmd.Wait() })
	return cmd
}

// dialFrom returns a connection that seems to the proxy to come from another
// address. It does not lead to p.addr, but to its own RemoteAddr.
func (p *testProxy) dialFrom(peer string) *wire {
	o := listen(p.t, "127.0.0.1:0", func(nc net.Conn, _ *bufio.Reader) {
		c := newConn(nc)
		c.peer = netip.MustParseAddr(peer)
		p.serveClient(c)
	})
	return (&testProxy{t: p.t, addr: o.host}).dial()
}

// ask sends a request without a body, as in ask("GET /a | Range: bytes=0-1"),
// and reads the reply. HERE is where the connection leads; Host is that too,
// unless it is the first field. A tunnel is ended at once.
func (w *wire) ask(request string) reply {
	line, fields, _ := strings.Cut(request, " | ")
	if !strings.HasPrefix(fields, "Host:") {
		fields = "Host: HERE | " + fields
	}
	head := line + " HTTP/1.1\r\n" + string(splitFields(fields).appendTo(nil)) + "\r\n"
	w.say(strings.ReplaceAll(head, "HERE", w.RemoteAddr().String()))
	method, _, _ := strings.Cut(line, " ")
	if method == "CONNECT" {
		w.Conn.(*net.TCPConn).CloseWrite()
	}
	return w.reply(method)
}

// An asked is some requests as for ask, with semicolons between them, and an
// expression for the reply to each.
type asked struct{ name, want, requests string }

// replies checks each request on a connection of its own. HOST is the host, a
// host:port, PORT its port, and URL is http://HOST.
func replies(t *testing.T, dial func() *wire, host string, rows ...asked) {
	_, port, _ := net.SplitHostPort(host)
	words := strings.NewReplacer("HOST", host, "PORT", port, "URL", "http://"+host)
	for _, test := range rows {
		for request := range strings.SplitSeq(words.Replace(test.requests), "; ") {
			t.Run(test.name+": "+request, func(t *testing.T) {
				match(t, request, dial().ask(request).String(), test.want)
			})
		}
	}
}

func TestProgramCommandLine(t *testing.T) {
	t.Parallel()
	taken := listen(t, "127.0.0.1:0", nil).host
	for args, want := range map[string]string{ // exit status, stdout; stderr
		"0 -nonsense": `2 ; proxy: flag [^\n]* not defined: -nonsense \(proxy -h lists the flags\)\n`,
		"0 -files no": `2 ; proxy: -files: open no: no such [^\n]* \(proxy -h lists the flags\)\n`,
		taken:         `1 ; proxy: listen [^\n]*: address already in use\n`,
		"-cache none": `1 ; proxy: mkdir none: not a directory\n`, "-cache none/a": `1 ; proxy: mkdir none.*`,
		"0 -uses 2 -h": `0 usage: proxy \[flags\] \[port \| host:port\]\n.*-allow .*-block .*-uses .*; `,
		"-version":     `0 proxy \S+ go\S+\n; `,
	} {
		t.Run(args, func(t *testing.T) {
			cmd, stderr := command(t, strings.Fields(args)...), new(buffer)
			os.WriteFile(filepath.Join(cmd.Dir, "none"), nil, 0o600)
			cmd.Stderr = stderr
			stdout, _ := cmd.Output()
			got := fmt.Sprintf("%d %s; %s", cmd.ProcessState.ExitCode(), stdout, stderr)
			match(t, "status and output", got, want)
			eq(t, "what it leaves behind", files(cmd.Dir), "[none]")
		})
	}
}

func TestProgramFlags(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	os.WriteFile(filepath.Join(dir, "none"), []byte("# a:b\n\n"), 0o600)
	os.WriteFile(filepath.Join(dir, "one"), []byte("# who\n\nme:pass:word\n"), 0o600)
	os.WriteFile(filepath.Join(dir, "two"), []byte("a:b\nc:d\n"), 0o600)
	for _, test := range []struct{ want, args string }{
		{"127.0.0.1:8899 1073741824 1 0s ", ""},
		{"127.0.0.1:80 524288000 3 1h30m0s ", "-uses=3 80 -ttl 1h30m -size 500M"},
		{`\[::1]:80 5000 1 0s `, "[::1]:80 -size 5000"},
		{":80 0 1 0s ", ":80 -size 0"}, // nothing is to be kept
		{":80 1073741824 1 0s bWU6cGFzczp3b3Jk", ":80 -auth me:pass:word; -auth @DIR/one :80"},
		{`flag .* not defined: -.*`, "-nonsense; -1"},
		{`neither a port nor host:port: .*`, "1.2.3.4; localhost:; http; 65536; +80"},
		{`two addresses: 0 and 1`, "0 -uses 2 1"},
		{`.* -size: a size looks like 5000, 500M or 10G`,
			"-size 1X; -size 5KM; -size -1; -size 99999999999G; -size="},
		{`.*-uses.*`, "0 -uses 0; 0 -uses 1.5; 0 -uses"},
		{`.* -ttl: a duration looks like 90s, 10m or 1h30m`, "-ttl 60 0; -ttl -1s"},
		{`-cache must name a directory`, "-cache="},
		{`.* -auth: it must be one user:password`, "-auth=; -auth nobody; -auth @DIR/two; -auth @DIR/none"},
		{`.*-(auth|deny|files): open no: no such file or directory`, "-auth @no; -files no; -deny @no"},
		{`-files: open .*/none: not a directory`, "-files DIR/none"},
		{`.* -block: ".*" is .*`, "-block http://a/; -block 10.0.0.0/99; -block *.a; -block a:80"},
		{`.*-(allow|deny): ".*" is .*`, "-allow a.example; -deny @DIR/two"},
	} {
		for args := range strings.SplitSeq(test.args, "; ") {
			t.Run(args, func(t *testing.T) {
				c, err := parseFlags(strings.Fields("-files= " + strings.ReplaceAll(args, "DIR", dir)))
				store := c.caching
				got := fmt.Sprint(c.address, " ", store.limit, " ", store.uses, " ", store.ttl, " ", c.auth)
				if err != nil {
					got = err.Error()
				}
				match(t, "config or error", got, test.want)
			})
		}
	}
}

// Who may ask, and for what. Inner addresses are for clients on this machine:
// services on it trust these, and at 169.254.169.254 are the credentials that
// a cloud has for the machine.
func TestProgramAdmits(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "list")
	const list = "A.Example, ::ffff:192.0.2.7\r\n# b.example\n\n  # b.example\nd.example 10.0.0.0/8"
	os.WriteFile(file, []byte(list), 0o600)
	const inner = "127.0.0.1 127.9.9.9 ::1 0.0.0.0 :: 169.254.169.254 fe80::1 fd00:ec2::254"
	const others = " 10.0.0.1 198.51.100.1 fd00::1 2001:db8::1"
	for _, test := range []struct{ name, flags, from, may, mayNot string }{
		// Without from, these are clients.
		{"private networks may ask (RFC 1918, RFC 4193)", "", "",
			"127.0.0.1 127.9.9.9 ::1 10.1.2.3 172.16.0.1 172.31.9.9 192.168.0.1 169.254.7.7 fd00::1 fe80::1",
			"172.32.0.1 192.0.2.1 100.64.0.1 2001:db8::1 0.0.0.0"},
		{"-allow replaces these, not this machine", "-allow 192.0.2.0/24,2001:db8::/32", "",
			"192.0.2.1 2001:db8::1 127.0.0.1", "10.1.2.3 192.0.3.1 fd00::1"},
		{"-deny beats -allow", "-allow 10.0.0.0/8 -deny 10.1.0.0/16", "", "10.2.0.1", "10.1.0.1 192.168.0.1"},
		{"-deny beats the defaults, and this machine", "-deny 127.0.0.0/8 -deny 10.0.0.0/8", "",
			"::1 192.168.0.1", "127.0.0.1 10.1.2.3"},
		{"-block is not about clients", "-block 127.0.0.0/8,10.0.0.0/8", "", "127.0.0.1 10.1.2.3", ""},
		// With it, they are what a client asks for.
		{"a name, and all below it", "-block .A.example.", "::1", "example ba.example a.example.org",
			"a.example a.example. x.y.a.example x.a.example."},
		{"several", "-block e.example,192.0.2.9 -block @" + file, "::1", "b.example 192.0.2.1",
			"a.example d.example e.example 192.0.2.7 192.0.2.9 10.9.9.9"},
		{"networks", "-block 192.0.2.0/24 -block [2001:DB8:0::1] -block fe80::1%eth0", "::1",
			"192.0.3.1 ::1 2001:db8::2", "192.0.2.1 192.0.2.255 2001:db8::1 fe80::1"},
		{"mapped ones", "-block ::ffff:192.0.2.0/120", "::1", "192.0.3.1", "192.0.2.1 ::ffff:192.0.2.1"},
		{"unspecified ones lead to this machine", "-block ::1", "::1", "127.0.0.1", "::1 0.0.0.0 ::"},
		{"this machine", "", "127.0.0.1", inner + others, ""}, {"by IPv6", "", "::1", inner + others, ""},
		{"another machine", "", "10.1.2.3", others, inner}, {"a neighbour", "", "fe80::1", others, inner},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, err := parseFlags(strings.Fields("-files= -cache " + t.TempDir() + " " + test.flags))
			eq(t, "error", err, nil)
			p, err := newProxy(c, &net.TCPAddr{}, io.Discard)
			eq(t, "error", err, nil)
			for word := range strings.FieldsSeq(test.may + " " + test.mayNot) {
				req := &Request{Target: "/", Direct: true}
				if test.from != "" {
					req = &Request{Target: "/", URL: URL{net.JoinHostPort(word, "80"), "/"}}
				}
				client := &conn{peer: netip.MustParseAddr(cmp.Or(test.from, word))}
				err := (&exchange{proxy: p, client: client, req: req}).admit()
				eq(t, word, err == nil, slices.Contains(strings.Fields(test.may), word))
			}
		})
	}
}

// A download and an idle client are there when the signals come. If these end
// the download, it is visibly cut, even for HTTP/1.0.
func TestProgramEnds(t *testing.T) {
	t.Parallel()
	const whole, cut, local = `200 "last", miss; 0`, `200 cut, miss; `, `127\.0\.0\.1:\d+`
	const readers = "mkfifo pipe; head -n 1 <pipe >&2 & exec PROXY 0 >pipe 2>&1"
	for _, test := range []struct {
		name, run, address, signals string
		want, says                  string // the rest of the reply and the exit status, last words
	}{
		{"SIGTERM", "exec PROXY 0", local, "TERM", whole, "1 requests"},
		{"SIGINT", "exec PROXY -cache here localhost:0", local, "INT", whole, "1 requests"},
		{"SIGHUP", "exec PROXY :0 -cache here", `.*\]?:\d+`, "HUP", whole, "1 requests"},
		{"twice", "exec PROXY 0", local, "HUP TERM", cut + "1", "stopped"},
		{"SIGKILL", "exec PROXY 0", local, "KILL", cut + "-1", "listening"},
		{"nohup", "trap '' HUP; exec PROXY 0", local, "HUP TERM", whole, "1 requests"},
		{"readers of the log go away", readers, local, "TERM", whole, "listening"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			release := make(chan bool)
			o := listen(t, "127.0.0.1:0", func(c net.Conn, in *bufio.Reader) {
				readHead(in)
				io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nfirst \r\n")
				<-release
				io.WriteString(c, "4\r\nlast\r\n0\r\n\r\n")
			})
			cmd, stderr, p := command(t), new(buffer), &testProxy{t: t, log: new(buffer)}
			cmd.Args = []string{"sh", "-c", strings.ReplaceAll(test.run, "PROXY", cmd.Path)}
			cmd.Path, cmd.Stdout, cmd.Stderr = "/bin/sh", p.log, stderr
			eq(t, "error", cmd.Start(), nil)
			eventually(t, "listening", func() bool {
				_, said, found := strings.Cut(stderr.String(), "listening on ")
				p.addr, _, _ = strings.Cut(said, ", ")
				return found
			})
			match(t, "address", p.addr, test.address)
			p.dial()
			w := p.dial()
			w.say("GET http://" + o.host + "/ HTTP/1.0\r\n\r\n")
			res, err := http.ReadResponse(w.in, nil)
			if err != nil {
				t.Fatal(err)
			}
			io.CopyN(io.Discard, res.Body, int64(len("first ")))
			for signal := range strings.FieldsSeq(test.signals) {
				exec.Command("sh", "-c", fmt.Sprint("kill -", signal, " ", cmd.Process.Pid)).Run()
				if signal == "HUP" && test.name == "nohup" {
					continue
				}
				eventually(t, "it has stopped listening", func() bool {
					_, err := net.Dial("tcp", p.addr)
					return err != nil
				})
			}
			if test.want != whole {
				cmd.Wait()
			}
			close(release)
			got := readReply(res)
			cmd.Wait() // once more does no harm
			eq(t, "reply and status", fmt.Sprint(got, "; ", cmd.ProcessState.ExitCode()), test.want)
			match(t, "last words", stderr.String(), `(.*\n)?proxy: `+test.says+`[^\n]*\n`)
			logged := strings.Count(p.log.String(), "TCP_MISS/200")
			eq(t, "it is logged", logged == 1, test.says == "1 requests")
			info, err := os.Stat(filepath.Join(cmd.Dir, "here"))
			eq(t, "the cache is for this user only", err == nil && info.Mode().Perm() == 0o700, true)
		})
	}
}

// Not in parallel, as it reads what all say on stderr.
func TestProgramSurvivesBugs(t *testing.T) {
	stderr := new(buffer)
	log.SetOutput(stderr)
	defer log.SetOutput(os.Stderr)
	p := start(t)
	p.cache.now = func() time.Time { panic("bad luck") }
	eq(t, "the client sees", p.say(request("http://a/", "")), "")
	eventually(t, "it is told", func() bool { return strings.Contains(stderr.String(), "serveClient") })
	match(t, "stderr", stderr.String(), `[^\n]*a bug, .*: bad luck\ngoroutine .*`)
}

func TestProgramLog(t *testing.T) {
	t.Parallel()
	p := start(t, "-block", "blocked.example")
	const page = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n" +
		"Cache-Control: max-age=60, stale-if-error=600\r\n"
	const renewed, failed = "HTTP/1.1 304 X\r\n\r\n", "HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n"
	o := script(t, page+"ETag: \"1\"\r\n\r\n", renewed, page+"ETag: \"2\"\r\n\r\n", failed, page+"\r\n")
	words := strings.NewReplacer("URL", "http://"+o.host, "HOST", o.host,
		"ASKED", "HIER_DIRECT/127.0.0.1 text/plain", "OWN", "HIER_NONE/- text/plain")
	for i, test := range []struct{ name, request, want string }{
		{"a miss", "GET URL/a", "TCP_MISS/200 GET URL/a - ASKED"},
		{"a hit", "GET URL/a", "TCP_(MEM_)?HIT/200 GET URL/a - OWN"},
		{"the client has it", `GET URL/a | If-None-Match: "1"`, "TCP_IMS_HIT/304 GET URL/a - OWN"},
		{"later, renewed", "GET URL/a", "TCP_REFRESH_UNMODIFIED/200 GET URL/a - ASKED"},
		{"later, replaced", "GET URL/a", "TCP_REFRESH_MODIFIED/200 GET URL/a - ASKED"},
		{"later, stale", "GET URL/a", "TCP_REFRESH_FAIL_OLD/200 GET URL/a - ASKED"},
		{"as a server", "GET /HOST/b", "TCP_MISS/200 GET URL/b - ASKED"},
		{"reloaded", "GET URL/b | Cache-Control: no-cache", "TCP_CLIENT_REFRESH_MISS/200 GET URL/b - ASKED"},
		{"only if cached", "GET URL/c | Cache-Control: only-if-cached", "TCP_MISS/504 GET URL/c - OWN"},
		{"denied", "GET http://blocked.example/", "TCP_DENIED/403 GET http://blocked.example/ - OWN"},
		{"no origin", "POST http://127.0.0.1:1/", "TCP_MISS/502 POST http://127.0.0.1:1/ - OWN"},
		{"no tunnel", "CONNECT 127.0.0.1:1", "TCP_MISS/502 CONNECT 127.0.0.1:1 - OWN"},
		{"a tunnel", "CONNECT HOST", "TCP_TUNNEL/200 CONNECT HOST - HIER_DIRECT/127.0.0.1 -"},
		{"a page of our own", "GET /proxy.pac", "NONE/200 GET /proxy.pac - HIER_NONE/- application/x-.*"},
		{"no HTTP", "nonsense", "NONE/400 nonsense error:invalid-request - OWN"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if strings.HasPrefix(test.name, "later") {
				p.move(time.Minute)
			}
			p.dial().Close() // who says nothing leaves no line
			w := p.dial()
			w.ask(words.Replace(test.request))
			w.Close()
			lines := p.lines(i + 1)
			eq(t, "lines", len(lines), i+1)
			outcome, subject, _ := strings.Cut(words.Replace(test.want), " ")
			match(t, "line", lines[i], `\d{10}\.\d{3} +\d+ 127\.0\.0\.1 `+outcome+` \d+ `+subject)
			seconds, _ := strconv.Atoi(lines[i][:10])
			eq(t, "it is of now", p.cache.now().Sub(time.Unix(int64(seconds), 0)).Abs() < patience, true)
		})
	}
	n := len(p.lines(0))
	sent := len(p.say(request("http://"+o.host+"/d", "")))
	eq(t, "bytes that the client was sent", strings.Fields(p.lines(n + 1)[n])[4], sent)

	large := script(t, "HTTP/1.1 200 OK\r\n\r\n"+strings.Repeat("x", 32<<20)+"\x00")
	w := p.dial()
	w.say(request("http://"+large.host+"/", ""))
	readHead(w.in)
	w.Close()
	match(t, "a client that leaves", p.lines(n + 2)[n+1], `.* TCP_MISS_ABORTED/200 .*`)
}

// What a client or an origin sends cannot make another field or line.
func TestProgramLogIsNotForged(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := script(t, "HTTP/1.1 200 OK\r\nContent-Type: a\"b c\u009b31m\xff;x\r\nContent-Length: 0\r\n\r\n")
	line := regexp.MustCompile(`^\d+\.\d+ +\d+ [\d.]+ \w+/\d{3} \d+ [!-~]+ [!-~]+ - \w+/[!-~]+ [!-~]+$`)
	for i, first := range []string{
		"GET http://HOST/\"\u009b31m\xff\u2028", "GET http://HOST/%0A%0D", "GET http://user:secret@HOST/",
		"GET http://HOST/\x1b[31m", "GET http://HOST/\r1 2 3", "GET http://HOST/ a b", "GET /\"\u009b",
		"GET\x1b[31m http://HOST/", "\"-\u009b http://HOST/", "CONNECT HOST\"\u009b:1",
	} {
		first = strings.ReplaceAll(first, "HOST", o.host)
		p.say(first + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		lines := p.lines(i + 1)
		if len(lines) != i+1 || !line.MatchString(lines[i]) || strings.Contains(lines[i], "secret") {
			t.Errorf("%q is logged as %q", first, lines[i:])
		}
	}
}

func TestProgramAuth(t *testing.T) {
	t.Parallel()
	p := start(t, "-auth", "me:pass:word")
	o := script(t, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nCache-Control: max-age=60\r\n\r\n")
	const right = "Authorization: Basic bWU6cGFzczp3b3Jk"
	const wrong = "Authorization: Basic bWU6cGFzczp3b3Jr"
	replies(t, p.dial, o.host,
		asked{"a proxy asks (RFC 9110 §11.7.1)", "407 .*", "GET URL/; POST URL/; CONNECT HOST; " +
			"GET URL/ | Proxy-" + wrong + "; CONNECT HOST | Proxy-" + wrong + "; GET URL/ | " + right + "; " +
			"GET URL/ | Proxy-Authorization: Basic; GET http://proxy.pac/; " +
			"GET URL/ | Proxy-Authorization: Bearer bWU6cGFzczp3b3Jk"},
		asked{"it is told", "200, miss", "GET URL/ | Proxy-" + right},
		asked{"in any case", "200, hit", "GET URL/ | Proxy-Authorization:  basic   bWU6cGFzczp3b3Jk"},
		asked{"what is stored is not for others", "407 .*", "GET URL/"},
		asked{"a tunnel", "200", "CONNECT HOST | Proxy-" + right},
		asked{"a server asks, this machine too (RFC 9110 §11.6.1)", "401 .*",
			"GET /; GET / | " + wrong + "; GET / | Proxy-" + right + "; GET /file; GET /HOST/"},
		asked{"it is told", "200.*", "GET / | " + right + "; GET /HOST/a | " + right},
		asked{"proxy.pac is for browsers that do not know yet", "200 .*", "GET /proxy.pac"})
	eq(t, "another machine", p.dialFrom("10.1.2.3").ask("GET / | "+right).status, 200)
	asProxy, asServer := p.dial().ask("GET http://a.example/"), p.dial().ask("GET /")
	challenges := asProxy.Get("Proxy-Authenticate") + ", " + asServer.Get("WWW-Authenticate")
	eq(t, "challenges", challenges, `Basic realm="proxy", Basic realm="proxy"`)
	eq(t, "requests to the origin", strings.Count(o.got.String(), "Host:"), 2)
	eq(t, "credentials in them", strings.Contains(o.got.String(), "uthorization"), false)
}

// A proxy that is open to the network keeps nothing from inner addresses.
func TestProgramInnerAddresses(t *testing.T) {
	t.Parallel()
	p := startOn(t, ":0", t.TempDir(), "-allow", "0.0.0.0/0,::/0")
	o, release := newOrigin(p), make(chan bool)
	o.put("/a", "Cache-Control: max-age=60", "inner")
	o.set("/slow", originPage{do: func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "max-age=60")
		w.(http.Flusher).Flush()
		<-release
		io.WriteString(w, "slow")
	}})
	local := strings.Replace(o.host, "127.0.0.1", "localhost", 1)
	slow := p.dialFrom("::1")
	slow.say(request("http://"+local+"/slow", ""))
	slow.in.Peek(1)
	for range 2 {
		got := p.dialFrom("127.0.0.1").ask("GET http://" + local + "/a")
		eq(t, "this machine", got, `200 "inner", miss`)
	}
	pages := o.requests("/a")
	eq(t, "requests for a", len(pages), 2)
	eq(t, "none over an idle connection", pages[0].RemoteAddr != pages[1].RemoteAddr, true)

	dials := []func() *wire{func() *wire { return p.dialFrom("10.1.2.3") }}
	addresses, _ := net.InterfaceAddrs()
	_, port, _ := net.SplitHostPort(p.addr)
	for _, address := range addresses { // real ones, if there are any
		ip := address.(*net.IPNet).IP
		if ip.To4() != nil && ip.IsGlobalUnicast() {
			far := net.JoinHostPort(ip.String(), port)
			dials = append(dials, (&testProxy{t: t, addr: far}).dial)
		}
	}
	for _, dial := range dials {
		const no = `403 ".* is for clients on this machine only\\n"`
		replies(t, dial, local,
			asked{"what this machine has asked for", no, "GET URL/a; POST URL/a; GET /localhost:PORT/a"},
			asked{"what it is asking for", no, "GET URL/slow"},
			asked{"anything else", no, "GET http://127.0.0.1:PORT/; GET http://[::ffff:7f00:1]:PORT/; " +
				"GET /127.0.0.1:PORT/; CONNECT 0.0.0.0:PORT; CONNECT HOST; GET http://169.254.169.254/a"},
			asked{"the status page without -auth", `403 "without -auth .*`, "GET /"},
			asked{"but proxy.pac", "200 .*", "GET /proxy.pac"})
	}
	eq(t, "requests to the origin", o.count("/a")+o.count("/slow")+o.count("/"), 3)
	close(release)
	eq(t, "the slow one", slow.reply("GET"), `200 "slow", miss`)
}

// RFC 4559 §6: a connection on which an origin asks for NTLM is not for others,
// nor is its answer. (Of credentials and cookies see the cache, and the wire.)
func TestProgramKeepsUsersApart(t *testing.T) {
	t.Parallel()
	p := start(t)
	const head = "HTTP/1.1 200 OK\r\nCache-Control: public, max-age=60\r\nContent-Length: 5\r\n"
	o := script(t, head+"WWW-Authenticate: Basic, NTLM\r\n\r\nalice", head+"\r\nbob's")
	eq(t, "alice", p.get("http://"+o.host+"/", ""), `200 "alice", miss`)
	eq(t, "bob", p.get("http://"+o.host+"/", ""), `200 "bob's", miss`)
	eq(t, "carol", p.get("http://"+o.host+"/", ""), `200 "bob's", hit`)
	eq(t, "connections", o.conns.Load(), 2)
}

func TestProgramBlocks(t *testing.T) {
	t.Parallel()
	o := script(t, "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: 0\r\n\r\n")
	before := start(t)
	eq(t, "stored", before.get("http://"+o.host+"/", ""), "200, miss")
	before.entry("http://" + o.host + "/")
	flags := []string{"-block", "Example.COM,::1,fd00::/8", "-block", "127.0.0.0/8"}
	p := startOn(t, "127.0.0.1:0", before.dir, flags...)
	const named = "example.com:80 eXample.COM:1 example.com.:80 a.b.example.com.:8080 127.0.0.1:PORT " +
		"127.9.9.9:PORT [0::1]:PORT [FD00:1::1]:PORT [::ffff:127.0.0.1]:PORT [0:0:0:0:0:FFFF:7f00:1]:PORT"
	const leadThere = " localhost:PORT 0.0.0.0:PORT [::]:PORT"
	const odd = "127.0.0.1.:PORT 2130706433:PORT 0177.0.0.1:PORT 0x7f.0.0.1:PORT 127.1:PORT"
	// What the odd ones mean, if anything, is left to the system.
	for hosts, want := range map[string]string{named + leadThere: "403 .*", odd: "(403|404|502) .*"} {
		for host := range strings.FieldsSeq(hosts) {
			requests := "GET http://" + host + "/; CONNECT " + host + "; GET /" + host + "/"
			replies(t, p.dial, o.host, asked{"blocked", want, requests})
		}
	}
	eq(t, "requests to the blocked", strings.Count(o.got.String(), "Host:"), 1)
}

// What a browser asks us as a server. A page elsewhere, at a name of its own
// that leads to this machine (DNS rebinding), must not read that.
func TestProgramServes(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "f")
	const makeFiles = `mkdir -m 700 sub .git sub/.d; umask 22; printf out >../out; ln -s ../out link
		printf page.html >page.html; TZ=UTC touch -t 200109090146.40 page.html; ln -s page.html inside
		printf x.txt | tee 'two words' private group sub/x.txt .hidden .git/config sub/.d/x
		chmod 600 private; chmod 640 group`
	os.Mkdir(dir, 0o700)
	sh := exec.Command("sh", "-ec", makeFiles)
	sh.Dir = dir
	eq(t, "error", sh.Run(), nil)
	p := start(t, "-files", dir)
	const none = `404 "there is neither a file nor a host for [^ ]*\\n"`
	replies(t, p.dial, p.addr,
		asked{"a file", `200 "page.html"`, "GET /page.html; GET /page.html?x; GET /inside"},
		asked{"a space, and a directory of mode 0700", `200 "x.txt"`, "GET /two%20words; GET /sub/x.txt"},
		asked{"a range", `206 "page" bytes 0-3/9`, "GET /page.html | Range: bytes=0-3"},
		asked{"unchanged", "304", "GET /page.html | If-Modified-Since: Sun, 09 Sep 2001 01:46:40 GMT"},
		asked{"no file", none, "POST /page.html; GET /sub; GET /sub/; GET /page%00.html; GET /page.htm%6; " +
			"GET /no!host/x"},
		asked{"not for everybody", none, "GET /private; GET /group; GET /" + dir + "/group; GET /.hidden; " +
			"GET /%2ehidden; GET /.git/config; GET /sub/.d/x"},
		asked{"no way up", none, "GET /sub/../page.html; GET /sub/..%2fpage.html; GET /sub/..%5cpage.html; " +
			"GET /../out; GET /%2e%2e/out; GET /sub/%2e%2e/%2e%2e/out; GET /link"},
		asked{"Host names us", "200.*", "GET / | Host: 127.0.0.1:PORT; GET / | Host: localhost:PORT; " +
			"GET / | Host: LocalHost:PORT; GET / | Host: [::1]:PORT; GET / | Host: 127.0.0.9:PORT"},
		asked{"Host does not", "403 .*", "GET / | Host: a.example:PORT; GET / | Host: 192.0.2.1:PORT; " +
			"GET / | Host: localhost.a.example:PORT; GET / | Host: localhost; GET / | Host: 127.0.0.1:1; " +
			"GET /proxy.pac | Host: a.example:PORT; OPTIONS * | Host: a.example:PORT"},
		asked{"Host is none", "400 .*", "GET / | Host: user@localhost:PORT; GET / | Host: localhost:PORT,x"})
	match(t, "no Host", p.say("GET / HTTP/1.0\r\n\r\n"), `HTTP/1.1 403 .*\r\n\r\n\S.*`)
	head := p.dial().ask("HEAD /page.html")
	eq(t, "HEAD", head.Get("Content-Length")+" "+head.Get("Content-Type"), "9 text/html; charset=utf-8")
	eq(t, "no script for others", head.Get("Cross-Origin-Resource-Policy"), "same-origin")
	eq(t, "a file, another machine", p.dialFrom("10.1.2.3").ask("GET /page.html").status, 404)
	eq(t, "-files=", start(t).dial().ask("GET /main.go").status, 404)
	pac := p.dial().ask("GET /proxy.pac")
	eq(t, "proxy.pac", pac.Get("Content-Type"), "application/x-ns-proxy-autoconfig")
	match(t, "proxy.pac", pac.body, `function FindProxyForURL\(url, host\) .*"PROXY `+p.addr+`".*`)

	o := newOrigin(p)
	o.put("/a", "Cache-Control: max-age=60", "stored")
	p.get(o.url("/a"), "")
	name := strings.ReplaceAll(filepath.Base(p.entry(o.url("/a"))), "%", "%25")
	eq(t, "the cache", start(t, "-files", p.dir).dial().ask("GET /"+name).status, 404)
}

// To a browser, a page of /host/path has the origin of ours and of all that
// runs on this machine. So it is sandboxed, and cookies go neither way.
func TestProgramHostPath(t *testing.T) {
	t.Parallel()
	p := start(t)
	const cookies = "Set-Cookie: session=2\r\nSet-Cookie2: a\r\nClear-Site-Data: b\r\n"
	o := script(t, "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n"+cookies+"\r\n"+
		"HTTP/1.1 200 OK\r\n"+cookies+"Cache-Control: max-age=60\r\nContent-Length: 4\r\n\r\npage")
	for _, request := range []string{"GET /HOST/a", "GET /HOST", "GET /user:pw@HOST?q=1#f", "POST /HOST/a",
		"GET http://HOST/b"} {
		t.Run(request, func(t *testing.T) {
			w, want := p.dial(), "sandbox .*"
			if strings.Contains(request, "http:") {
				want = "session=2session=2ab"
			}
			request = strings.Replace(request, "HOST", o.host, 1)
			early := w.ask(request + " | Cookie: session=1 | Authorization: Basic session")
			got := w.reply("GET")
			eq(t, "replies", fmt.Sprint(early, early.Get("Link"), " ", got), `103</x> 200 "page", miss`)
			told := early.Get("Set-Cookie") + got.Get("Set-Cookie") + got.Get("Set-Cookie2") +
				got.Get("Clear-Site-Data") + got.Get("Content-Security-Policy")
			match(t, "what the browser is told", told, want)
		})
	}
	match(t, "at the origin", o.got.String(), `GET /a HTTP.*GET / HTTP.*GET /\?q=1 HTTP.*POST /a HTTP.*`)
	direct, _, _ := strings.Cut(o.got.String(), "GET /b HTTP")
	eq(t, "what the origin is told", strings.Contains(direct, "session"), false)

	stored := newOrigin(p)
	stored.put("/a//b", "Cache-Control: max-age=60", "a and b")
	request := "GET /" + stored.host + "/a//b"
	eq(t, "first", p.dial().ask(request), `200 "a and b", miss`)
	eq(t, "it is stored for all", p.get(stored.url("/a//b"), ""), `200 "a and b", hit`)
	again := p.dial().ask(request)
	match(t, "again", again.String()+again.Get("Content-Security-Policy"), `200 "a and b", hitsandbox .*`)
}

func TestProgramStatusPage(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := newOrigin(p)
	o.put("/a", "Cache-Control: max-age=60", strings.Repeat("x", 3<<20))
	for range 4 {
		p.get(o.url("/a?secret"), "")
	}
	p.say(request(o.url("/<script>&\"'"), ""))
	for _, request := range []string{"GET /" + o.host + "/b", "GET /proxy.pac", "CONNECT " + o.host} {
		p.dial().ask(request)
	}
	p.lines(8)
	replies(t, p.dial, p.addr,
		asked{"views are not counted", "200.*", "HEAD /; GET /; GET /"},
		asked{"no page", "404 .*", "POST /"})
	page := p.dial().ask("GET /")
	eq(t, "type", page.Get("Content-Type"), "text/html; charset=utf-8")
	for _, want := range []string{
		`: 8 requests, 37% of them [^;]*, 1 tunnels, 2 errors; 12.0 MiB sent, 9.0 MiB [^<]*cache\.`,
		`The cache holds 1 files, 3.0 of at most 1024.0 MiB`,
		`<h2>Busiest hosts of the last 8 requests</h2><table><tr><td>7<td>` + o.host + `</table>`,
		`<tr><td>2<td>TCP_MISS/404<tr><td>1<td>NONE/200<tr>`, // equal counts in order
		`<tr><td>\d+s ago<td>127.0.0.1<td>TCP_(MEM_)?HIT/200<td>\d+ ms<td>[^<]*<td>GET ` + o.url("/a") + `<`,
		`<td>CONNECT ` + o.host + `<`,
		`<td>GET ` + o.url("/&lt;script&gt;&amp;%22&#39;<"),
	} {
		match(t, "page", page.body, `.*`+want+`.*`)
	}
	for _, not := range []string{"secret", "<script", "src=", "GET /<"} {
		eq(t, "it has "+not, strings.Contains(page.body, not), false)
	}
	for range 40 {
		p.say("GET http://x/" + strings.Repeat("x/", 9999) + " HTTP/1.1\r\nHost: 1 2\r\n\r\n")
	}
	eq(t, "it stays small", len(p.dial().ask("GET /").body) < 40<<10, true)
}

// RFC 9110 §9.3.6.
func TestProgramTunnels(t *testing.T) {
	t.Parallel()
	p, got := start(t), make(chan string, 1)
	o := listen(t, "127.0.0.1:0", func(c net.Conn, in *bufio.Reader) {
		early, _ := in.ReadString('\n')
		io.WriteString(c, "got "+early)
		c.(*net.TCPConn).CloseWrite()
		rest, _ := io.ReadAll(in)
		got <- string(rest)
	})
	w := p.dial()
	w.say("CONNECT " + o.host + " HTTP/1.1\r\nHost: " + o.host + "\r\n\r\nearly\n") // in one piece
	match(t, "head", readHead(w.in), `HTTP/1.1 200 [^\r]*\r\n\r\n`)
	eq(t, "the origin ends first", w.rest(), "got early\n")
	w.say("after that")
	w.Close()
	eq(t, "from the client", <-got, "after that")

	patient := listen(t, "127.0.0.1:0", func(c net.Conn, in *bufio.Reader) {
		io.Copy(io.Discard, in)
		io.WriteString(c, "bye")
	})
	replies(t, p.dial, patient.host,
		asked{"the client ends first", `200 "bye"`, "CONNECT HOST"},
		asked{"refused", `502 "127.0.0.1:1: [^"]*refused\\n"`, "CONNECT 127.0.0.1:1"},
		asked{"no host:port", "400 .*", "CONNECT a; CONNECT a:; CONNECT a:0; CONNECT a:65536; CONNECT :1; " +
			"CONNECT /; CONNECT http://a:1/; CONNECT user@a:1"})
}

func TestProgramHops(t *testing.T) {
	t.Parallel()
	p, second := start(t), start(t)
	replies(t, p.dial, p.addr,
		asked{"a loop (RFC 9110 §7.6.3)", "508 .*", "GET URL/HOST/x; GET /HOST/; GET /HOST/HOST/x; " +
			"GET http://localhost:PORT/localhost:PORT/x; GET http://[::ffff:127.0.0.1]:PORT/127.0.0.1:PORT/x"},
		// What comes back through a tunnel would seem to come from this machine.
		asked{"a tunnel to us", "508 .*", "CONNECT HOST; CONNECT localhost:PORT; CONNECT 0.0.0.0:PORT"})
	eq(t, "requests of loops", len(p.lines(13)), 13)
	o := script(t, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nend")
	replies(t, second.dial, o.host,
		asked{"two of ours (RFC 9110 §7.6.3)", `200 "end", miss`,
			"GET http://" + p.addr + "/HOST/0 | Via: 1.1 proxy, 1.0 b (proxy)"},
		asked{"it would echo cookies (RFC 9110 §9.3.8)", "405 .*", "TRACE URL/1"},
		asked{"the last hop (RFC 9110 §7.6.2)", "200", "OPTIONS URL/2 | Max-Forwards: 0; OPTIONS *"},
		asked{"before that", `200 "end", miss`,
			"OPTIONS URL | Max-Forwards: 10; OPTIONS URL/3 | Max-Forwards: x"},
		asked{"it does not count hops", `200 "end", miss`, "GET URL/4 | Max-Forwards: 0"},
		asked{"an unknown expectation (RFC 9110 §10.1.1)", "417 .*200-ok.*", "GET URL/5 | Expect: 200-ok"})
	seen := regexp.MustCompile(`(\S+) HTTP/|Max-Forwards: (\w+)`).FindAllString(o.got.String(), -1)
	const want = "[/0 HTTP/ * HTTP/ Max-Forwards: 9 /3 HTTP/ Max-Forwards: x /4 HTTP/ Max-Forwards: 0]"
	eq(t, "at the origin", seen, want)
	const via = `1\.1 proxy, 1\.0 b \(proxy\)\r\nVia: 1\.1 proxy-\w{6}\r\nVia: 1\.1 proxy-\w{6}\r\n`
	match(t, "Via", o.got.String(), `GET /0 HTTP/1\.1\r\nHost: [^\r]*\r\nVia: `+via+`.*`)
}

// A client is told in one sentence what failed (RFC 9110 §15.6.3, RFC 9110 §15.6.5).
func TestProgramErrorPages(t *testing.T) {
	t.Parallel()
	p := start(t)
	for want, err := range map[string]error{
		`502 "h:80: no such host\n"`:      &net.DNSError{IsNotFound: true},
		`502 "h:80: lookup h: bad\n"`:     &net.DNSError{Err: "bad", Name: "h"},
		`504 "h:80: lookup h: slow\n"`:    &net.DNSError{Err: "slow", Name: "h", IsTimeout: true},
		`504 "h:80: dial: i/o timeout\n"`: &net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded},
	} {
		x := &exchange{proxy: p.proxy, req: &Request{URL: URL{"h:80", "/"}}}
		res := x.errorPage(err)
		text, _ := io.ReadAll(res.Body)
		eq(t, "page", reply{status: res.Status, body: string(text)}, want)
		eq(t, "type", res.Get("Content-Type"), "text/plain; charset=utf-8")
	}
}
