package main

// The tests, in the order of the RFCs: what is read from a connection and sent on one (TestWire...),
// the cache (TestCache...), and the program as a whole (TestProgram...). A rule is a table on plain
// values, behaviour is a short script over sockets, and net/http is the independent oracle on both
// sides. To find the test of a rule, search for "RFC 9111 §4.2" and the like.
//
// start starts a proxy in this process, and an origin for it. Requests are
// written "GET URL/a | Range: bytes=0-1", see message, and a reply is printed as
// `206 "01" bytes 0-1/10, hit`, so that a test reads like a transcript.

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

// TestMain runs the program itself where a test has started this binary again as one, see command.
func TestMain(m *testing.M) {
	if os.Getenv("PROXY_TEST_RUNS_MAIN") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// A testProxy is a proxy under test. Its clock stands still until the test moves it.
type testProxy struct {
	*proxy
	t     testing.TB
	addr  string        // host:port that it listens on
	dir   string        // of the cache
	log   *buffer       // the access log
	ahead *atomic.Int64 // by how much the clock has been moved
	host  string        // host:port that HOST means in a request
	peer  string        // where its clients seem to be; empty for where they are
}

// start starts a proxy on a free port of 127.0.0.1, with flags as on the command line, and an origin.
// At the end of the test the proxy must come to rest, with nothing left open or half done.
func start(t testing.TB, flags ...string) (*testProxy, *origin) {
	t.Helper()
	config, err := parseFlags(append([]string{"-cache", t.TempDir(), "-files", ""}, flags...))
	if err != nil {
		t.Fatal(err)
	}
	p := &testProxy{t: t, dir: config.caching.dir, log: new(buffer), ahead: new(atomic.Int64)}
	begun := time.Now()
	config.caching.now = func() time.Time { return begun.Add(time.Duration(p.ahead.Load())) }
	listener, err := net.Listen("tcp", strings.Replace(config.address, "8899", "0", 1))
	if err != nil {
		t.Fatal(err)
	}
	p.proxy, err = newProxy(config, listener.Addr(), p.log)
	if err != nil {
		t.Fatal(err)
	}
	p.addr = listener.Addr().String()
	go p.serve(listener)
	t.Cleanup(func() {
		p.closing.Store(true)
		listener.Close()
		eventually(t, "nothing is under way, open or half done", func() bool {
			return p.active.Load() == 0 && len(strays(p.dir))+openFiles(p.dir+"/") == 0
		})
	})
	o := newOrigin(p)
	p.host = o.host
	return p, o
}

// to returns the proxy as for clients for whom HOST means another origin.
func (p testProxy) to(host string) *testProxy {
	p.host = host
	return &p
}

// from returns the proxy as for clients that seem to be somewhere else.
func (p testProxy) from(peer string) *testProxy {
	p.peer = peer
	return &p
}

// move turns the proxy's clock on.
func (p *testProxy) move(d time.Duration) { p.ahead.Add(int64(d)) }

// lines returns the log, once it has n lines.
func (p *testProxy) lines(n int) []string {
	eventually(p.t, fmt.Sprintf("%d lines in the log", n), func() bool {
		p.journal.flush()
		return strings.Count(p.log.String(), "\n") >= n
	})
	return strings.Split(strings.TrimSuffix(p.log.String(), "\n"), "\n")
}

// file is the name of the entry for a path of the origin.
func (p *testProxy) file(path string) string {
	return filepath.Join(p.dir, fileName(p.host+path))
}

// message spells out what is written "GET URL/a | Range: bytes=0-1\n\nbody". A request gets a version
// and a Host where it has none. What has a CR already is left as it is.
func message(text string) string {
	head, body, _ := strings.Cut(text, "\n\n")
	if strings.Contains(head, "\r") {
		return text
	}
	line, rest, _ := strings.Cut(head, " | ")
	h := fields(rest)
	if !strings.HasPrefix(line, "HTTP/") && !h.Has("Host") {
		h = append(Header{{"Host", "HERE"}}, h...)
	}
	if !strings.Contains(line, "HTTP/") {
		line += " HTTP/1.1"
	}
	return line + "\r\n" + string(h.appendTo(nil)) + "\r\n" + body
}

// fields makes a header of "A: b | C: d". A field without a name is one of Cache-Control.
func fields(text string) (h Header) {
	for field := range strings.SplitSeq(text, " | ") {
		name, value, named := strings.Cut(field, ":")
		switch {
		case named:
			h = append(h, Field{name, strings.TrimSpace(value)})
		case field != "":
			h = append(h, Field{"Cache-Control", field})
		}
	}
	return h
}

// A wire is a connection to the proxy.
type wire struct {
	*net.TCPConn
	in    *bufio.Reader
	words *strings.Replacer
}

// dial connects to the proxy. In what is sent, HERE is where this leads, HOST the
// origin's host:port, $PORT that port alone, and URL is http://HOST.
func (p *testProxy) dial() *wire {
	addr := p.addr
	if p.peer != "" {
		addr = listen(p.t, func(nc net.Conn, _ *bufio.Reader) {
			c := newConn(nc)
			c.peer = netip.MustParseAddr(p.peer)
			p.serveClient(c)
		}).host
	}
	c, err := net.Dial("tcp", addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(2 * patience))
	_, port, _ := net.SplitHostPort(p.host)
	words := strings.NewReplacer("HERE", addr, "HOST", p.host, "$PORT", port, "URL", "http://"+p.host)
	return &wire{c.(*net.TCPConn), bufio.NewReader(c), words}
}

// send sends a message.
func (w *wire) send(text string) { io.WriteString(w, w.words.Replace(message(text))) }

// ask sends a request and reads the reply. A tunnel is ended at once.
func (w *wire) ask(request string) reply {
	method, _, _ := strings.Cut(request, " ")
	go func() { // the reply may come before all is sent
		w.send(request)
		if method == "CONNECT" {
			w.CloseWrite()
		}
	}()
	return w.reply(method)
}

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

// say sends a message on a new connection, and returns all that comes back.
func (p *testProxy) say(text string) string {
	w := p.dial()
	defer w.Close()
	go func() { // what is refused may not be read to its end
		w.send(text)
		w.CloseWrite()
	}()
	return w.rest()
}

// ask sends a request on a new connection, and reads the reply.
func (p *testProxy) ask(request string) reply {
	w := p.dial()
	defer w.Close()
	return w.ask(request)
}

// get asks for a path of the origin.
func (p *testProxy) get(path string) reply { return p.ask("GET URL" + path) }

// A reply is what a client got.
type reply struct {
	status int
	http.Header
	body string
	err  error // how it ended too early
}

func readReply(res *http.Response) reply {
	b, err := io.ReadAll(res.Body)
	res.Body.Close()
	return reply{res.StatusCode, res.Header, string(b), err}
}

// String prints a reply: its status, the body if that is short, the range, that
// it was cut, and the outcome by Cache-Status.
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
	for _, sign := range []struct{ part, outcome string }{
		{"; hit", ", hit"}, {"collapsed", ", collapsed"}, {"=304", ", renewed"}, {"; fwd=", ", miss"},
	} {
		if strings.Contains(r.Get("Cache-Status"), sign.part) {
			return text + sign.outcome
		}
	}
	return text
}

// An origin is a web server of net/http, which notes what it is asked.
type origin struct {
	*httptest.Server
	host  string
	now   func() time.Time
	mu    sync.Mutex
	pages map[string]http.HandlerFunc
	asked map[string][]*http.Request
}

func newOrigin(p *testProxy) *origin {
	o := &origin{now: p.cache.now}
	o.pages, o.asked = map[string]http.HandlerFunc{}, map[string][]*http.Request{}
	o.Server = httptest.NewServer(o)
	o.host = o.Listener.Addr().String()
	p.t.Cleanup(o.CloseClientConnections)
	return o
}

func (o *origin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, _ := io.ReadAll(r.Body)
	r.Body = io.NopCloser(bytes.NewReader(b))
	o.mu.Lock()
	page := o.pages[r.URL.Path]
	o.asked[r.URL.Path] = append(o.asked[r.URL.Path], r)
	o.mu.Unlock()
	if page == nil {
		page = http.NotFound
	}
	page(w, r)
}

// requests returns those for a path so far.
func (o *origin) requests(path string) []*http.Request {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.asked[path])
}

func (o *origin) count(path string) int { return len(o.requests(path)) }

// handle sets what the origin does for a path.
func (o *origin) handle(path string, page http.HandlerFunc) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pages[path] = page
}

// put sets a page, such as "404 max-age=60 | Expires: @60" with a body. The origin
// answers 304 to who has it already, and with status 0 it breaks off.
func (o *origin) put(path, head, body string) { o.putSlowly(path, head, body, len(body)) }

// putSlowly sets a page of which the origin sends n bytes, and the rest once the
// test closes the channel that is returned. Where n is 0, the head waits too.
func (o *origin) putSlowly(path, head, body string, n int) chan bool {
	rest := make(chan bool)
	status, header := parsePage(o.now(), head)
	o.handle(path, func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		for _, f := range header {
			h.Add(f.Name, f.Value)
		}
		if !header.Has("Date") {
			h.Set("Date", dateField("", o.now()).Value)
		}
		tag, date := r.Header.Get("If-None-Match"), r.Header.Get("If-Modified-Since")
		switch {
		case status == 0:
			panic(http.ErrAbortHandler)
		case tag != "" && tag == h.Get("ETag") || date != "" && date == h.Get("Last-Modified"):
			w.WriteHeader(304)
			return
		}
		w.WriteHeader(status)
		io.WriteString(w, body[:n])
		if n < len(body) {
			if n > 0 {
				w.(http.Flusher).Flush()
			}
			select {
			case <-rest:
			case <-r.Context().Done():
				return
			}
		}
		io.WriteString(w, body[n:])
	})
	return rest
}

// parsePage takes apart "404 A: b | C: d". The status is 200 where there is none,
// and @-60 becomes the date of a minute ago.
func parsePage(now time.Time, text string) (int, Header) {
	text = regexp.MustCompile(`@-?\d+`).ReplaceAllStringFunc(text, func(s string) string {
		seconds, _ := strconv.Atoi(s[1:])
		return dateField("", now.Add(time.Duration(seconds)*time.Second)).Value
	})
	first, rest, _ := strings.Cut(text, " ")
	status, err := strconv.Atoi(first)
	if err != nil {
		return 200, fields(text)
	}
	return status, fields(rest)
}

// A rawOrigin is an origin that speaks bytes.
type rawOrigin struct {
	host  string
	got   buffer // all that came
	conns atomic.Int64
}

// listen starts an origin that calls talk for each connection.
func listen(t testing.TB, talk func(c net.Conn, in *bufio.Reader)) *rawOrigin {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
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

// script starts an origin that answers one head after the other, of all connections, with one message
// after the other, and the last for good. After one that ends in "\x00" it closes the connection.
func script(t testing.TB, texts ...string) *rawOrigin {
	var n atomic.Int64
	return listen(t, func(c net.Conn, in *bufio.Reader) {
		for readHead(in) != "" {
			text, closes := strings.CutSuffix(texts[min(int(n.Add(1)), len(texts))-1], "\x00")
			io.WriteString(c, message(text))
			if closes {
				return
			}
		}
	})
}

// silent starts an origin that neither reads nor answers.
func silent(t testing.TB) *rawOrigin {
	return listen(t, func(net.Conn, *bufio.Reader) { <-t.Context().Done() })
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

// A rule says what is wanted in some cases, which have "; " between them. What is
// wanted is an expression that has to fit all of the verdict.
type rule struct{ name, want, cases string }

// rules checks the verdict on each case in a test of its own.
func rules(t *testing.T, verdict func(text string) any, table ...rule) {
	for _, rule := range table {
		for text := range strings.SplitSeq(rule.cases, "; ") {
			t.Run(fmt.Sprintf("%s: %.60s", rule.name, text), func(t *testing.T) {
				match(t, "verdict", fmt.Sprint(verdict(text)), rule.want)
			})
		}
	}
}

// replies checks the reply to each request.
func (p *testProxy) replies(t *testing.T, table ...rule) {
	rules(t, func(request string) any { return p.ask(request) }, table...)
}

// columns takes apart a case with several values, which have " / " between them.
func columns(text string) (a, b, c string) {
	a, rest, _ := strings.Cut(text, " / ")
	b, c, _ = strings.Cut(rest, " / ")
	return a, b, c
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

// patience is for what takes milliseconds, on a busy machine too.
const patience = 10 * time.Second

// eventually waits until something is done.
func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * patience); !done(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("not in time: %s", what)
			return
		}
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

// strays returns the temporary files of a cache.
func strays(dir string) []string {
	names, _ := filepath.Glob(filepath.Join(dir, temporary+"*"))
	return names
}

// openFiles counts the files and sockets of this process that are open, and whose
// names begin like that.
func openFiles(prefix string) (n int) {
	for _, fd := range files("/proc/self/fd") {
		name, _ := os.Readlink("/proc/self/fd/" + fd)
		if strings.HasPrefix(name, prefix) {
			n++
		}
	}
	return n
}

// The tests of request.go: what is read and what is refused, where bodies end,
// what arrives on the other side, and which connections are kept.

// A stub is a connection that has bytes to read, and notes its deadline.
type stub struct {
	net.Conn
	from     io.Reader
	deadline time.Time
}

func (s *stub) Read(p []byte) (int, error)    { return s.from.Read(p) }
func (s *stub) SetDeadline(d time.Time) error { s.deadline = d; return nil }
func (s *stub) RemoteAddr() net.Addr          { return &net.TCPAddr{} }
func (s *stub) Close() error                  { return nil }

// connOf is a connection on which text comes, and slowConnOf one on which it comes byte by byte.
func connOf(text string) *conn { return newConn(&stub{from: strings.NewReader(text)}) }
func slowConnOf(text string) *conn {
	return newConn(&stub{from: iotest.OneByteReader(strings.NewReader(text))})
}

// bodyOf prints the body of a message, that it was cut, and what follows it.
func bodyOf(c *conn) string {
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
	ok       = "HTTP/1.1 200 OK\r\n"
	coding   = "Transfer-Encoding: chunked\r\n"
	sentence = `([\w-]+: [ -~]+\r\n)+\r\n[ -~]{10,}\n` // as a page, behind its first line
)

// A wireRule is a rule about bytes: each case, with "|" between them, takes the place of CASE.
type wireRule struct{ name, want, where, cases string }

func wireRules(t *testing.T, check func(t *testing.T, text, want string), table []wireRule) {
	for _, rule := range table {
		for text := range strings.SplitSeq(rule.cases, "|") {
			t.Run(fmt.Sprintf("%s: %.50q", rule.name, text), func(t *testing.T) {
				check(t, strings.Replace(rule.where, "CASE", text, 1), rule.want)
			})
		}
	}
}

// RFC 9112 §11.2: what two programs could read in two ways is refused with one sentence, the
// connection ends, and the origin hears nothing of it, nor of a hidden request behind it.
func TestWireRefused(t *testing.T) {
	const line, get = "CASE\r\nHost: HOST\r\n\r\n", "GET URL/ HTTP/1.1\r\n"
	const post = "POST URL/ HTTP/1.1\r\nHost: HOST\r\n"
	long := strings.Repeat("a", 66<<10)
	p, _ := start(t)
	o := listen(t, func(c net.Conn, in *bufio.Reader) { readHead(in) })
	refuses := func(t *testing.T, text, status string) {
		got := p.to(o.host).say(text + "GET URL/hidden HTTP/1.1\r\nHost: HOST\r\n\r\n")
		match(t, "answer", got, `HTTP/1\.1 `+status+` [ \w]+\r\n`+sentence)
		eq(t, "at the origin", fmt.Sprintf("%d %q", o.conns.Load(), o.got.String()), `0 ""`)
	}
	wireRules(t, refuses, []wireRule{
		{"RFC 9112 §2.2: a control character", "400", post + "CASE\r\n\r\n",
			"X: b\rContent-Length: 5|X: b\r|X\x00A: b|X: b\x00c|X: \x1b[31m|X: \x7f"},
		{"RFC 9112 §2.2: one in the first line", "400", line,
			"GET /\ra HTTP/1.1|GET /\x00 HTTP/1.1|\x16\x03\x01"},
		{"RFC 9112 §2.3: not HTTP", "400", "GET URL/CASE\r\n\r\n", "| http/1.1| HTTPS/1.1"},
		{"RFC 9112 §2.3: a version", "505", "GET / HTTP/CASE\r\n\r\n", "0.9|2.0|1.10|1|1.x|1.1 "},
		{"RFC 9112 §3: not three parts, one space apart", "400", "CASE HTTP/1.1\r\nHost: HOST\r\n\r\n",
			"GET|GET |GET  /| GET /|GET / b|GET\t/|GET /\tb|GET: /"},
		{"RFC 9112 §3: a long line", "414", line, long + "|GET /" + long},
		{"RFC 9112 §3.2: a target", "400", "CASE HTTP/1.1\r\nHost: HOST\r\n\r\n",
			`GET http://a\@b/|GET http://a\b|GET http://a@b@c/|GET http:///|GET http:/a/|` +
				`GET https://a/|GET a/|GET *|CONNECT http://a:1/|CONNECT a@b:1|CONNECT a|CONNECT a:|` +
				`CONNECT a:0|CONNECT a:65536|CONNECT :1|CONNECT /`},
		{"RFC 9112 §3.2: not one Host", "400", get + "CASE\r\n\r\n",
			"X: y|Host:|Host: a, b|Host: a\r\nHost: a|Host: a\r\nHost: b"},
		{"RFC 9110 §4.2.3: no host", "400", get + "Host: CASE\r\n\r\n",
			"a/b|:80|a:0|a:65536|a:+80|a:http|a:1:2|user@a|a b|a%2eb|b\xfccher|\u212aelvin|::1|[::1|" +
				"[::1]a:80|[fe80::1%25lo]|[127.0.0.1]|[zz]"},
		{"RFC 9112 §5.1: no name, or a space behind it", "400", post + "CASE\r\n\r\n",
			"X : b|X\t: b|Transfer-Encoding : chunked|: b|X|X A: b|X\xe4: b"},
		{"RFC 9112 §5.2: a folded line", "400", get + "CASE\r\nHost: a\r\n\r\n",
			" X: b|X: b\r\n c|X: b\r\n\tc"},
		{"RFC 6585 §5: a large head", "431", post + "CASE\r\n\r\n",
			"X: " + long + "|" + long + "|" + strings.Repeat("a:\r\n", 260)},
		{"RFC 9112 §6.1: not chunked, once", "501", post + "Transfer-Encoding: CASE\r\n\r\n",
			"|,chunked|chunked, x|chunked, chunked|chunked\r\nTransfer-Encoding: chunked|" +
				"identity\r\nTransfer-Encoding: chunked|gzip, chunked|identity|xchunked|\"chunked\"|" +
				"chunked;q=1|\u00a0chunked|chun\u212aed"},
		{"RFC 9112 §6.1: HTTP/1.0", "501", "POST URL/ HTTP/1.0\r\nCASE\r\n", coding},
		{"RFC 9112 §6.2: not one length of digits", "400", post + "Content-Length: CASE\r\n\r\nhello",
			"5\r\nContent-Length: 6|5\r\nContent-Length: 5|5, 6|+5|-5|0x5|5 5|5.|1_0||" +
				"99999999999999999999|18446744073709551621"},
		{"RFC 9112 §6.3: a length beside a coding", "400", post + "CASE\r\n0\r\n\r\n",
			"Content-Length: 5\r\n" + coding + "|" + coding + "Content-Length: 5\r\n"},
		{"RFC 9112 §7.1: a malformed first chunk", "400", post + coding + "\r\nCASE",
			"5\nhello\r\n0\r\n\r\n|0\r\nX: y\n\r\n|0\r\nGET URL/ HTTP/1.1\r\n\r\n"},
		{"RFC 9112 §7.1.2: trailers", "431", post + coding + "\r\n0\r\nCASE",
			strings.Repeat("a: b\r\n", 260)},
	})
}

// RFC 9112 §3.2: whom a target asks for what. A host and port have one spelling.
func TestWireTarget(t *testing.T) {
	rules(t, func(line string) any {
		req, err := readRequest(connOf(message(line)))
		return fmt.Sprint(req.URL.Authority, " ", req.URL.Path, " ", req.Direct, " ", err)
	},
		rule{"RFC 9110 §4.2.3: names", "a_b:80 / false <nil>",
			"GET http://a_b; GET HTTP://A_b:/; GET http://a_b:0080"},
		rule{"IPv6", `\[2001:db8::1]:80 / false <nil>`,
			"GET http://[2001:DB8::0:1]; GET http://[2001:db8::1]:"},
		rule{"IPv4 in IPv6", `\[::ffff:127.0.0.1]:1 / false <nil>`, "GET http://[::FFFF:127.0.0.1]:1"},
		rule{"a query", `a:80 /\?x=http://b@c/ false <nil>`,
			"GET http://a/?x=http://b@c/; GET http://a?x=http://b@c/"},
		rule{"RFC 9110 §7.1: a fragment is dropped", "a:80 / false <nil>",
			"GET http://a/#d?e; GET http://a#/b@c"},
		rule{"RFC 9110 §4.2.4: userinfo is dropped", `\[::1]:81 /b false <nil>`,
			"GET http://user:pw@[::1]:81/b"},
		rule{"no path is repaired", `a:80 /b/\.\./%2e%2E//c\\d false <nil>`,
			`GET http://a/b/../%2e%2E//c\d`},
		rule{"RFC 9112 §3.2.1: a path asks us", ` /a/b\?c true <nil>`, "GET /a/b?c"},
		rule{"RFC 9112 §3.2.3: CONNECT", `\[::1]:80  false <nil>`, "CONNECT [::1]:80"},
		rule{"RFC 9112 §3.2.4: OPTIONS of a server", `a:80 \* false <nil>`, "OPTIONS http://a"},
		rule{"RFC 9112 §3.2.4: OPTIONS of us", ` \* true <nil>`, "OPTIONS *"},
		rule{"OPTIONS with a path", "a:80 / false <nil>", "OPTIONS http://a/"},
	)
}

// RFC 9112 §6.3, §7.1: where a body ends, and what follows it. More is forgiven
// in a response. Chunk extensions and trailers are dropped.
func TestWireBodies(t *testing.T) {
	const chunks = ok + coding + "\r\n"
	long := strings.Repeat("a", 66<<10)
	check := func(t *testing.T, text, want string) {
		eq(t, "body", bodyOf(connOf(text)), want)
		eq(t, "byte by byte", bodyOf(slowConnOf(text)), want)
	}
	wireRules(t, check, []wireRule{
		{"RFC 9112 §2.2, §2.3: LF alone, an empty line before, and a later version", `"a" then "b"`,
			"CASE", "PUT / HTTP/1.0\r\nContent-Length: 1\r\n\r\nab|" +
				"PUT / HTTP/1.7\nHost: a\nContent-Length: 1\n\nab|" +
				"\r\nPUT / HTTP/1.1\r\nHost: a\r\ncontent-length:01\r\n\r\nab"},
		{"RFC 9110 §9.3.6: CONNECT", `"ab" then ""`, "CONNECT a:1 HTTP/1.1\r\nHost: a\r\nCASE\r\n\r\nab",
			"Content-Length: 1"},
		{"RFC 9112 §4, §5.1: a response without a reason, or with a space", `"a" then "b"`,
			"HTTP/1.1 CASE\r\n\r\nab", "205 R\r\nContent-Length: 1|200\nContent-Length: 1|" +
				"200 OK\r\nContent-Length \t: 1|200 OK\r\nContent-Length: 1\r\nContent-Length: 1, 1"},
		{"RFC 9112 §7.1: chunks", `"ab" then "X"`, chunks + "CASE\r\n\r\nX", "2\r\nab\r\n0|" +
			"002 \t\r\nab\r\n000|1\r\na\r\n01\r\nb\r\n0|2;a=\"b\";c\r\nab\r\n0;d\r\nX-A: b\r\nY:"},
		{"RFC 9112 §7.1: a malformed size", `"" cut`, chunks + "CASEhello\r\n0\r\n\r\n",
			"|5|5\n|+5\r\n|-5\r\n|0x5\r\n|0_5\r\n| 5\r\n|\r\n|;a\r\n|5;a\rb\r\n|5;\x00\r\n|" +
				"10000000000000005\r\n|ffffffffffffffff\r\n|" + strings.Repeat("0", 9000) + "\r\n"},
		{"RFC 9112 §7.1: a malformed end", `"ab" cut`, chunks + "2\r\nabCASE",
			"|\r\n|\r\n0|\r\n0\r\n|\n0\r\n\r\n|\r0\r\n\r\n|X\r\n0\r\n\r\n|\r\n0\n\r\n|\r\n0\r\n\n|" +
				"\r\n0\r\nX: y\n\r\n|\r\n0\r\nX: y\r\n z\r\n\r\n|" +
				"\r\n0\r\nX : y\r\n\r\n|\r\n0\r\nX\r\n\r\n"},
		{"RFC 9112 §7.1.1: a long extension", `"" cut`, chunks + "CASE",
			"5;" + long + "\r\nhello|0;" + long + "\r\n\r\n"},
		{"RFC 9112 §7.1.1: extensions", `"xxx" cut`, chunks + "CASE",
			strings.Repeat("1;"+long[:20<<10]+"\r\nx\r\n", 9)},
		{"RFC 9112 §7.1.1: one behind small chunks", fmt.Sprintf("%q cut", strings.Repeat("x", 9999)),
			chunks + "CASE", strings.Repeat("1\r\nx\r\n", 9999) + "1;" + long + "\r\nx\r\n0\r\n\r\n"},
		{"RFC 9112 §7.1.2: trailers", `"" cut`, chunks + "0\r\nCASE",
			strings.Repeat("a: b\r\n", 20<<10)},
	})
}

// RFC 9112 §6: a body in any framing arrives in one that its client knows,
// stored or not, and each piece of it before the next is sent.
func TestWireFramings(t *testing.T) {
	proxy, _ := start(t)
	pieces := []string{"data: 1\n", bytesOf(50 << 10), "data: 3\n"}
	length := fmt.Sprintf("Content-Length: %d\r\n", len(strings.Join(pieces, "")))
	frame := func(t *testing.T, head, piece, end, to, caching string) {
		next := make(chan string)
		p := proxy.to(listen(t, func(c net.Conn, in *bufio.Reader) {
			readHead(in)
			io.WriteString(c, head+"Cache-Control: "+caching+"\r\n\r\n")
			for text := range next {
				fmt.Fprintf(c, piece, len(text), text)
			}
			io.WriteString(c, end)
		}).host)
		w := p.dial()
		w.send("GET URL/ " + to)
		res, err := http.ReadResponse(w.in, nil) // the head is there before any piece
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range pieces {
			next <- text
			got := make([]byte, len(text))
			io.ReadFull(res.Body, got)
			eq(t, "the piece has come", string(got) == text, true)
		}
		close(next)
		eq(t, "the rest", readReply(res), "200, miss")
		endless, old := res.ContentLength < 0, to != "HTTP/1.1"
		eq(t, "chunked", res.TransferEncoding != nil, endless && !old)
		eq(t, "closes", res.Close, to == "HTTP/1.0" || endless && old)
		eq(t, "is told otherwise", res.Header.Get("Connection") == "keep-alive", old && !res.Close)
		eq(t, "stored", strings.HasSuffix(p.get("/").String(), ", hit"), caching == "max-age=60")
	}
	for _, from := range []struct{ name, head, piece, end string }{
		{"a length", ok + length, "%[2]s", ""},
		{"chunks", ok + coding, "%X;a=b \r\n%s\r\n", "0;c\r\nX-T: z\r\n\r\n"},
		{"until close", ok, "%[2]s", ""},
		{"§6.1: an unknown coding", ok + "Transfer-Encoding: foo\r\n", "%[2]s", ""},
		{"HTTP/1.0, a length", "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n" + length, "%[2]s", ""},
		{"HTTP/1.0, until close", "HTTP/1.0 200 OK\r\n", "%[2]s", ""},
	} {
		for _, to := range []string{"HTTP/1.1", "HTTP/1.0", "HTTP/1.0 | Connection: keep-alive"} {
			t.Run(from.name+" to "+to, func(t *testing.T) {
				frame(t, from.head, from.piece, from.end, to, "no-store")
				frame(t, from.head, from.piece, from.end, to, "max-age=60")
			})
		}
	}
}

// RFC 9112 §6.3 and §9.3.2: what an origin gets of requests with and without
// a body, which come in one piece. They are answered in their order.
func TestWirePipelining(t *testing.T) {
	p, o := start(t)
	o.handle("/", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %d %s", r.Method, r.ContentLength, body)
	})
	large := strings.Repeat("x", 300000)
	tests := []struct{ request, want string }{
		{"GET URL/", "GET 0 "},
		{"POST URL/ | Content-Length: 0", "POST 0 "},
		{"GET URL/ | Content-Length: 5\n\nhello", "GET 5 hello"},
		{"PUT URL/ | Transfer-Encoding: chunked\n\n0\r\n\r\n", "PUT 0 "},
		{"M-SEARCH URL/ | Transfer-Encoding: chunked\n\n5;a=b \r\nhello\r\n0;c\r\nX: y\r\n\r\n",
			"M-SEARCH -1 hello"},
		{"PUT URL/ | Content-Length: 300000\n\n" + large, "PUT 300000 " + large},
	}
	all := ""
	for _, test := range tests {
		all += message(test.request)
	}
	w := p.dial()
	go w.send(all)
	for _, test := range tests {
		eq(t, test.request, w.reply("GET").body, test.want)
	}
}

// RFC 9112 §8: a body that breaks off, or turns out to be malformed, looks whole neither to an
// origin nor to any kind of client, and is not stored.
func TestWireCutBodies(t *testing.T) {
	p, _ := start(t)
	taker := listen(t, func(c net.Conn, in *bufio.Reader) {
		if req, err := http.ReadRequest(in); err == nil {
			body, err := io.ReadAll(req.Body)
			eq(t, fmt.Sprintf("%.50q looks whole", body), err == nil, false)
		}
	})
	check := func(t *testing.T, text, _ string) {
		upload := p.to(taker.host).say("POST URL/ HTTP/1.1\r\nHost: x\r\n" + text)
		match(t, "upload", upload, `HTTP/1.1 400 Bad Request\r\n`+sentence)
		public, private := ok+"Cache-Control: max-age=60\r\n"+text+"\x00", ok+text+"\x00"
		o := script(t, public, public, public, private)
		for i := range 6 {
			version := []string{"1.1", "1.0", "1.0 | Connection: keep-alive"}[i%3]
			r := p.to(o.host).ask("GET URL/ HTTP/" + version)
			eq(t, version+" cut", r.err != nil && strings.HasPrefix("hello", r.body), true)
			eq(t, "requests", strings.Count(o.got.String(), "GET "), i+1)
		}
		eventually(t, "no file is left", func() bool { return len(files(p.dir)) == 0 })
	}
	const hidden = "GET URL/hidden HTTP/1.1\r\nHost: HOST\r\n\r\n"
	wireRules(t, check, []wireRule{
		{"in a length", "", "Content-Length: 100\r\n\r\nCASE", "hello|"},
		{"in chunks", "", coding + "\r\nCASE", "|9\r\nhello|5\r\nhello\r\n|5\r\nhello\r\n0\r\n"},
		{"at malformed chunks", "", coding + "\r\nCASE" + hidden, "5\r\nhelloX\r\n0\r\n\r\n|" +
			"5\r\nhello\r\n+0\r\n\r\n|5\r\nhello\r\n0\r\nX : y z\r\n\r\n|" +
			"5;" + strings.Repeat("a", 99<<10)},
	})
}

// RFC 9110 §10.1.1, §15.2, RFC 9112 §9.5: what comes before the final response,
// and responses that come before the request's body.
func TestWireInterim(t *testing.T) {
	proxy, _ := start(t)
	hints := message("HTTP/1.1 103 Hi | Link: </a> | Connection: X | X: y | Content-Length: 9")
	final := message("HTTP/1.1 200 OK | max-age=60 | Content-Length: 5\n\nfinal")
	p := proxy.to(script(t, "HTTP/1.1 102 Processing\r\n\r\n"+hints+final).host)
	w := p.dial()
	eq(t, "first", w.ask("GET URL"), "102")
	match(t, "second", readHead(w.in), `HTTP/1.1 103 Hi\r\nLink: </a>\r\nVia: 1.1 proxy-\w+\r\n\r\n`)
	eq(t, "final", w.reply("GET"), `200 "final", miss`)
	eq(t, "stored", w.ask("GET URL"), `200 "final", hit`)
	match(t, "HTTP/1.0 gets none", p.say("GET URL/0 HTTP/1.0"), `HTTP/1.1 200 .*final`)
	text := proxy.to(script(t, strings.Repeat(hints, 2*maxInterim)+final).host).say("GET URL")
	eq(t, "without end", strings.Count(text, "HTTP/1.1 103 "), maxInterim)
	match(t, "and then", text, `HTTP/1.1 103 .*HTTP/1.1 502 .*`)

	w = proxy.to(listen(t, func(c net.Conn, in *bufio.Reader) {
		readHead(in)
		io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n")
		body, _ := in.ReadString('.')
		io.WriteString(c, message("HTTP/1.1 200 OK | Content-Length: 5\n\n"+body))
	}).host).dial()
	eq(t, "go on", w.ask("POST URL | Expect: 100-Continue | Content-Length: 5"), "100")
	io.WriteString(w, "body.")
	eq(t, "answer", w.reply("POST"), `200 "body.", miss`)

	p = proxy.to(listen(t, func(c net.Conn, in *bufio.Reader) {
		readHead(in)
		io.WriteString(c, message("HTTP/1.1 413 Too Large | Content-Length: 3\n\nbig"))
		<-t.Context().Done()
	}).host)
	for _, rest := range []string{"Expect: 100-continue | Content-Length: 5",
		"Transfer-Encoding: chunked", "Content-Length: 50000000\n\n" + strings.Repeat("a", 2e7)} {
		w := p.dial()
		eq(t, "early", w.ask("POST URL | "+rest), `413 "big", miss`)
		eq(t, "and then", w.rest(), "")
	}
}

// RFC 9110 §15.6.3, §15.6.5: what is wrong with an origin, or with the head of its response, is a
// 502 that names it, or a 504 where it took too long. None of it is stored.
func TestWireOriginFaults(t *testing.T) {
	p, _ := start(t)
	check := func(t *testing.T, host string) {
		answer := p.to(host).say("GET URL/") + p.to(host).say("GET URL/")
		page := `HTTP/1.1 502 Bad Gateway\r\n.*\r\n\r\n[ -~]*` + host + `[ -~]+\n`
		match(t, "two answers", answer, page+page)
	}
	check(t, "127.0.0.1:1")
	check(t, "nosuch.invalid")
	check(t, script(t, "\r\x00").host) // no answer
	check(t, script(t, ok+"\x00").host)
	for want, err := range map[string]error{
		`502 "h:80: no such host\n"`:      &net.DNSError{IsNotFound: true},
		`502 "h:80: lookup h: bad\n"`:     &net.DNSError{Err: "bad", Name: "h"},
		`504 "h:80: lookup h: slow\n"`:    &net.DNSError{Err: "slow", Name: "h", IsTimeout: true},
		`504 "h:80: dial: i/o timeout\n"`: &net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded},
	} {
		res := (&exchange{proxy: p.proxy, req: &Request{URL: URL{"h:80", "/"}}}).errorPage(err)
		text, _ := io.ReadAll(res.Body)
		eq(t, "page", reply{status: res.Status, body: string(text)}, want)
		eq(t, "type", res.Get("Content-Type"), "text/plain; charset=utf-8")
	}
	responds := func(t *testing.T, text, _ string) { check(t, script(t, text+"\r\n\r\nhello\x00").host) }
	wireRules(t, responds, []wireRule{
		{"RFC 9112 §4: no status line", "", "CASE",
			"HTTP/2.0 200 OK|HTTP/1.1 20 OK|HTTP/1.1 2000 OK|HTTP/1.1 +20 OK|HTTP/1.1 099 OK|" +
				"ICY 200 OK|<html>|HTTP/1.1 101 Switching Protocols\r\nUpgrade: x"},
		{"RFC 9112 §5: no fields", "", ok + "CASE",
			"X|X: a\r\n b|X: a\rY: b|" + strings.Repeat("X: y\r\n", 2e4)},
		{"RFC 9112 §6.1: a transfer coding", "", "HTTP/1.CASE",
			"1 200 OK\r\nTransfer-Encoding: chunked, chunked|" +
				"1 200 OK\r\nTransfer-Encoding: chunked, gzip|" +
				"1 200 OK\r\nTransfer-Encoding: \vchunked|" +
				"0 200 OK\r\nTransfer-Encoding: chunked"},
		{"RFC 9112 §6.3: a length", "", ok + "Content-Length:CASE", "| 5, 6| +5| 18446744073709551621"},
	})
}

// RFC 9112 §9.3: a connection to an origin carries another request if all of the response has come,
// and nothing more, and nobody has said otherwise. So stray bytes never answer anybody.
func TestWireKeptOrigins(t *testing.T) {
	p, _ := start(t)
	const ok, coding = "HTTP/1.1 200 OK | ", "Transfer-Encoding: chunked"
	const length, chunk = "Content-Length: 0", "5\r\nhello\r\n0\r\n\r\n"
	const evil = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
	for _, test := range []struct{ name, connections, answer string }{
		{"a length", "1", ok + "Connection: closed | Content-Length: 5\n\nhello"},
		{"chunked", "1", ok + coding + "\n\n" + chunk},
		{"HEAD", "1", ok + "Content-Length: 5"},
		{"HEAD, chunked", "1", ok + coding},
		{"204", "1", "HTTP/1.1 204 No Content | " + coding},
		{"304", "1", "HTTP/1.1 304 Not Modified | Content-Length: 42"},
		{"HTTP/1.0 kept", "1", "HTTP/1.0 200 | Proxy-Connection: keep-alive | " + length},
		{"HTTP/1.0 closed", "2", "HTTP/1.0 200 OK | Connection: keep-alive, close | " + length},
		{"close", "2", ok + "Connection: x, Close | " + length},
		{"close, by an old name", "2", ok + "Proxy-Connection: Close | " + length},
		{"until close", "2", ok + "\n\nhello\x00"},
		{"§6.3: a length and chunks", "2", ok + "Content-Length: 5 | " + coding + "\n\n" + chunk},
		{"more than a length", "2", ok + "Content-Length: 5\n\nhello" + evil},
		{"more than its chunks", "2", ok + coding + "\n\n" + chunk + evil},
		{"HEAD with a body", "2", ok + "Content-Length: 42\n\n" + evil},
		{"204 with a body", "2", "HTTP/1.1 204 No Content | Content-Length: 42\n\n" + evil},
		{"304 with a body", "2", "HTTP/1.1 304 Not Modified | Content-Length: 42\n\n" + evil},
		{"RFC 4559 §6: NTLM", "2", ok + `WWW-Authenticate: A x="\", ", NTLM | ` + length},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := script(t, test.answer, ok+"Content-Length: 4\n\ngood")
			w, method := p.to(o.host).dial(), "GET"
			if strings.HasPrefix(test.name, "HEAD") {
				method = "HEAD"
			}
			first := w.ask(method + ` URL/ | If-None-Match: "1"`)
			match(t, "answer", first.String(), `20[04]( "hello")?, miss|304, renewed`)
			eq(t, "next", w.ask("GET URL/2"), `200 "good", miss`)
			eq(t, "connections", o.conns.Load(), test.connections)
		})
	}
	for _, scheme := range []string{"NTLM", "Negotiate", "negotiate"} {
		t.Run("RFC 4559 §6: a user has a connection alone, "+scheme, func(t *testing.T) {
			alice := ok + "public, max-age=60 | Content-Length: 5\n\nalice"
			o := script(t, alice, ok+"Content-Length: 6\n\nnobody")
			w := p.to(o.host).dial()
			eq(t, "alice", w.ask("GET URL/ | Authorization: "+scheme+" alice"), `200 "alice", miss`)
			eq(t, "nobody", w.ask("GET URL/"), `200 "nobody", miss`)
			eq(t, "bob", w.ask("GET URL/ | Authorization: "+scheme+" bob"), `200 "nobody", miss`)
			eq(t, "connections", o.conns.Load(), 3)
		})
	}
}

// RFC 9110 §7.6: what arrives is what was sent, in bytes, case and order, but
// for Via and the fields that concern one connection only.
func TestWireArrivesExactly(t *testing.T) {
	p, _ := start(t)
	const sent = "X-Order: 1\r\nx-ORDER: 2\r\nCookie: a=\"b c\"; d\r\nCookie: e=f\r\nX-Empty: \r\n" +
		"X-8-Bit: caf\xe9 \xff\r\nAuthorization: Basic Zm9v\r\nX-Space: a  b\tc\r\nCache-Control: x\r\n"
	const back = "HTTP/1.1 299 Very Odd\r\nSet-Cookie: a=b; Path=/\r\nSet-Cookie: c=d\r\nx-ODD: v\r\n" +
		"WWW-Authenticate: Basic x=\"o\"\r\nX-8-Bit: caf\xe9 \xff\r\nX-Empty: \r\nServer: a (b)\r\n" +
		"Date: Mon, 02 Jan 2006 15:04:05 GMT\r\nVary: *\r\n"
	const hops = "Connection: X-Hop, Host, close\r\nConnection: Cache-Control, Vary\r\nX-Hop: 1\r\n" +
		"Keep-Alive: 5\r\nProxy-Connection: close\r\nTE: trailers\r\nUpgrade: h2c\r\nTrailer: X-T\r\n"
	for _, target := range []string{"/a%2Fb%2f//c/./../d/;p=1", "/%zz%?a?b&c==", "/\xff?[]{}|^`\"<>\\"} {
		o := script(t, back+hops+"Proxy-Authenticate: x\r\nContent-Length: 2\r\n\r\nok")
		line := "GET HTTP://u:p@HOST" + target + "#f HTTP/1.1\r\nHost: elsewhere\r\n"
		answer := p.to(o.host).say(line + sent + hops + "Proxy-Authorization: Basic eA==\r\n\r\n")
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
	proxy, _ := start(t)
	o := listen(t, func(c net.Conn, in *bufio.Reader) {
		if head := readHead(in); !strings.Contains(head, "/silent") {
			io.WriteString(c, ok+"Content-Length: 2\r\n\r\nok")
			readHead(in)
		}
	})
	p := proxy.to(o.host)
	for line, sent := range map[string]int{"GET /": 2, "OPTIONS /": 2, "PUT /": 2, "DELETE /": 2,
		"POST /": 1, "PATCH /": 1, "PUT /body": 1, "GET /silent": 2, "POST /silent": 1} {
		t.Run(line, func(t *testing.T) {
			w := p.dial()
			eq(t, "first", w.ask("GET URL/first"), `200 "ok", miss`)
			body := strings.Repeat("x", strings.Count(line, "body"))
			method, path, _ := strings.Cut(line, " ")
			fields := fmt.Sprint(" | Content-Length: ", len(body))
			got := w.ask(method + " URL" + path + fields + "\n\n" + body)
			eq(t, "fails", got.status == 502, path == "/silent")
			eq(t, "sent", strings.Count(o.got.String(), line+" HTTP/1.1\r\n"), sent)
		})
	}
}

// The pool holds a bounded number of connections, and none on which the origin
// has said something unasked, or that it has closed.
func TestWirePool(t *testing.T) {
	pool := new(originPool)
	for range maxIdle + 2 {
		pool.put(connOf(""), "a:80")
	}
	eq(t, "connections", len(pool.idle), maxIdle)
	for _, said := range []string{ok + "\r\nevil", "\r\x00"} {
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

// No read or write waits for longer than the limit of its connection, and a
// head has to be whole in time, however it trickles in.
func TestWireLimits(t *testing.T) {
	c := slowConnOf(message("PUT http://a/ | Content-Length: 5\n\nhello"))
	c.limit = time.Nanosecond // so each read would move the deadline
	stub := c.Conn.(*stub)
	req, _ := readRequest(c)
	eq(t, "a head", time.Until(stub.deadline).Round(10*time.Second), headWait)
	io.ReadAll(req.Body)
	eq(t, "its body", time.Until(stub.deadline).Round(10*time.Second), 0*time.Second)
	stub.from = io.MultiReader(strings.NewReader("GET /"), iotest.ErrReader(os.ErrDeadlineExceeded))
	_, err := readRequest(c)
	eq(t, "half a head", err, "the head has not come within 30s")

	c, _ = dial(silent(t).host, func(netip.Addr) error { return nil })
	defer c.Close()
	c.limit = 30 * time.Millisecond
	_, err = newBody(c, 5, false).Read(make([]byte, 5))
	eq(t, "who gives nothing", err, "the rest of the body has not come within 30ms")
	_, err = c.Write(make([]byte, 64<<20))
	eq(t, "who takes nothing", os.IsTimeout(err), true)
}

// Clients and origins that neither give nor take delay nobody, and cost some KiB each, whatever
// the size of the body. (Not parallel: memory is of all.)
func TestWireSlowOnes(t *testing.T) {
	p, o := start(t)
	body := strings.Repeat("x", 8<<20)
	o.put("/stored", "max-age=60", body)
	o.put("/passed", "no-store", body)
	host := silent(t).host
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for range 10 {
		for _, request := range []string{"GET URL/stored", "GET URL/passed", // and never reads
			"GET http://" + host, "POST URL/ | Content-Length: 9", "GET http://\r"} {
			p.dial().send(request)
		}
	}
	eventually(t, "all are under way", func() bool { return o.count("/passed") == 10 })
	for _, path := range []string{"/stored", "/passed", "/stored"} {
		eq(t, path, p.get(path).body == body, true)
	}
	eq(t, "requests", o.count("/stored"), 1)
	runtime.GC()
	runtime.ReadMemStats(&after)
	each := int64(after.HeapAlloc+after.StackInuse-before.HeapAlloc-before.StackInuse) / 50
	eq(t, fmt.Sprintf("a slow one costs %d bytes", each), each < 256<<10, true)
}

// A thousand rough exchanges leave no goroutine behind, and no file open. (Not parallel: these are
// of all.)
func TestWireNothingLeaks(t *testing.T) {
	p, o := start(t)
	o.put("/stored", "max-age=60", bytesOf(300000))
	o.put("/passed", "no-store", bytesOf(300000))
	bad := script(t, "what?\r\x00", "HTTP/1.1 200 OK | max-age=9 | Content-Length: 9\n\ncut\x00").host
	texts := []string{"GET URL/stored", "GET URL/passed", "GET http://" + bad + "/",
		"CONNECT HOST\n\nGET ", "POST URL/ | Content-Length: 1000\n\nhello", "GET URL/ HT\r"}
	p.get("/stored") // the proxy is under way now
	goroutines, open := runtime.NumGoroutine(), openFiles("")
	together(8, func(worker int) {
		for i := range 125 {
			w, kind := p.dial(), (i+worker)%len(texts)
			w.send(texts[kind])
			if kind < 4 && i%3 > 0 {
				w.in.Peek(1) // else the client is gone before the answer
			}
			if i%2 == 0 {
				w.SetLinger(0) // a reset
			}
			w.Close()
		}
	})
	eventually(t, "all is as it was", func() bool {
		for c := p.origins.take(o.host); c != nil; c = p.origins.take(o.host) {
			c.Close()
		}
		return runtime.NumGoroutine() <= goroutines && openFiles("") <= open
	})
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
			req, err := readRequest(slowConnOf(text))
			line := req.Method + " " + req.Target + " " + req.Proto
			return fmt.Sprintf("%s\r\n%s\r\n", line, req.appendTo(nil)), err
		}
		res, err := readResponse(slowConnOf(text), "GET")
		if err != nil {
			return "", err
		}
		line := fmt.Sprintf("%s %03d %s", res.Proto, res.Status, res.Reason)
		return fmt.Sprintf("%s\r\n%s\r\n", line, res.appendTo(nil)), nil
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
		text := ok + coding + "\r\n" + data
		got := bodyOf(connOf(text))
		eq(t, "byte by byte", bodyOf(slowConnOf(text)), got)
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

// The tests of cache.go: each rule as a table on plain values, the names of files,
// how a second request is answered, and downloads that many follow.

// noon is when the rules are tried.
var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// entryOf makes an entry of a page, see parsePage, that came at noon.
func entryOf(head string) *Entry { return entryAt(noon, head) }

// entryAt makes one, and assesses it at another time.
func entryAt(now time.Time, head string) *Entry {
	status, h := parsePage(noon, head)
	if !h.Has("Date") {
		h = append(h, dateField("Date", noon))
	}
	e := &Entry{Response: Response{Status: status, Header: h}, request: Header{dateField("Date", noon)}}
	e.assess(0, now)
	return e
}

// duration reads one, such as 10s.
func duration(text string) time.Duration {
	d, _ := time.ParseDuration(text)
	return d
}

func TestCacheDates(t *testing.T) {
	rules(t, func(text string) any { return httpDate(text).Unix() },
		rule{"RFC 9110 §5.6.7: three formats, in any case", "784111777",
			"Sun, 06 Nov 1994 08:49:37 GMT; Sunday, 06-Nov-94 08:49:37 GMT; Sun Nov  6 08:49:37 1994; " +
				"MON, 06 nov 1994 08:49:37 gmt"},
		rule{"RFC 9110 §5.6.7: nothing else", "-62135596800",
			"Sun, 06 Nov 1994 08:49:37 UTC; Sun, 06 Nov 1994 08:49:37 +0000; " +
				"Sun, 6 Nov 1994 08:49:37 GMT; Sun, 06 Nov 94 08:49:37 GMT; " +
				"Sun, 06 Nov 1994 8:49:37 GMT; " +
				"Sun, 31 Nov 1994 08:49:37 GMT; Sun 06 Nov 1994 08:49:37 GMT; ; 0; 784111777"},
	)
}

func TestCacheLifetime(t *testing.T) {
	const ever = " | Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT"
	rules(t, func(text string) any {
		return int(lifetime(&entryOf(text).Response, 9*time.Second).Seconds())
	},
		rule{"RFC 9111 §5.2.2.1: max-age", "60", `599 max-age=60; MAX-AGE="60"; ` +
			`x="max-age=1, y", max-age=60; ` + "public;max-age=60; public | max-age=60"},
		rule{"RFC 9111 §5.2.2.1: a malformed one", "0", "max-age=x; max-age; max-age=-60"},
		rule{"RFC 9111 §1.2.2: a large one", "2147483648", "max-age=99999999999999999999"},
		rule{"RFC 9111 §4.2.1: what goes before what", "60",
			"max-age=999, s-maxage=60; max-age=60 | Expires: @-60"},
		rule{"RFC 9111 §5.2.2.4: no-cache", "0", "max-age=60, no-cache"},
		rule{"RFC 9111 §5.3: Expires", "60", "Expires: @10 | Date: @-50"},
		rule{"RFC 9111 §5.3: a malformed one", "0",
			"Expires: 0" + ever + "; Expires: " + ever + "; Expires: Thu, 01 Jan 2099 00:00:00 UTC"},
		rule{"RFC 9111 §4.2.2: a tenth of the time since the last change", "100",
			"Last-Modified: @-1000; 302 public | Last-Modified: @-1000"},
		rule{"RFC 9111 §4.2.2: a week at most", "604800", "404" + ever[2:]},
		rule{"-ttl at least", "9", "Last-Modified: @1000; 200"},
		rule{"RFC 9110 §15.1: not heuristically", "0", "302" + ever[2:]},
	)
}

func TestCacheAge(t *testing.T) {
	rules(t, func(text string) any {
		head, wait, _ := columns(text)
		now := noon.Add(duration(wait))
		e := entryAt(now, "200 "+head)
		return int(now.Sub(e.born).Seconds())
	},
		rule{"RFC 9111 §4.2.3: it counts on", "10", " / 10s"},
		rule{"RFC 9111 §4.2.3: Age or Date, whichever says more", "60",
			"Age: 50 / 10s; Date: @-50 / 10s; Date: @-50 | Age: 20 / 10s"},
		rule{"RFC 9111 §4.2.3: odd ones", "10", "Date: @500 / 10s; Age: x / 10s; Age: -1 / 10s"},
		rule{"RFC 9111 §1.2.2: a large one", "2147483658", "Age: 99999999999999999999 / 10s"},
		rule{"the clock has been set back, and nobody knows", "9223372036", " / -50s"},
	)
}

func TestCacheSatisfies(t *testing.T) {
	rules(t, func(text string) any {
		stored, request, age := columns(text)
		if ok, why := entryOf(stored).satisfies(fields(request), noon.Add(duration(age))); !ok {
			return why
		}
		return "hit"
	},
		rule{"RFC 9111 §4.2: fresh, or newer than the request", "hit",
			"max-age=60 /  / 59s; max-age=1 /  / -5s"},
		rule{"RFC 9111 §4.2: stale", "stale", "max-age=60, immutable /  / 60s"},
		rule{"RFC 9111 §5.2.1.1: young enough", "hit", "max-age=60 / max-age=20 / 19s"},
		rule{"RFC 9111 §5.2.1.1: too old", "request", "max-age=60 / max-age=20 / 20s"},
		rule{"RFC 9111 §5.2.1.2: not too stale", "hit",
			"max-age=60 / max-stale=20 / 79s; max-age=60 / max-stale / 9999s"},
		rule{"RFC 9111 §5.2.1.2: too stale", "stale", "max-age=60 / max-stale=20 / 80s"},
		rule{"RFC 9111 §4.2.4: never stale", "stale", "max-age=60, must-revalidate / max-stale / 60s; " +
			"max-age=60, proxy-revalidate / max-stale / 60s; s-maxage=60 / max-stale / 60s; " +
			"max-age=60, no-cache / max-stale / 0s"},
		rule{"RFC 9111 §5.2.1.3: fresh for long enough", "hit", "max-age=60 / min-fresh=20 / 40s"},
		rule{"RFC 9111 §5.2.1.3: not for long enough", "request",
			"max-age=60 / min-fresh=20 / 41s; max-age=60 / max-stale, min-fresh=1 / 60s"},
		rule{"RFC 9111 §5.2.1.4, §5.4: a reload", "request",
			"max-age=60 / no-cache / 0s; max-age=60 / Pragma: no-cache / 0s"},
		rule{"RFC 9111 §5.4, §5.2.1.7: none", "hit",
			"max-age=60 / max-stale | Pragma: no-cache / 0s; max-age=60 / only-if-cached / 0s"},
	)
}

func TestCacheStorable(t *testing.T) {
	verdict := func(request string, e *Entry, config CacheConfig) any {
		method, rest, _ := strings.Cut(request, " | ")
		ok, why := storable(&Request{Method: method, Header: fields(rest)}, &e.Response, config)
		if !ok {
			return why
		}
		return "stored"
	}
	rules(t, func(text string) any {
		request, response, _ := columns(text)
		return verdict(request, entryOf(response), CacheConfig{})
	},
		rule{"RFC 9110 §9.3: only GET", "method", "POST / max-age=60; HEAD / max-age=60"},
		rule{"RFC 9111 §3: it tells its lifetime, or can be asked about", "stored",
			"GET / 299 max-age=60; " + `GET / 302 Expires: @60; GET / ETag: "1"; ` +
				`GET / 299 public | Last-Modified: @-9999`},
		rule{"RFC 9111 §3: it does not", "no-freshness",
			"GET / 200; GET / 302 Last-Modified: @-9999; GET / max-age=0"},
		rule{"RFC 9111 §5.2.2.5: no-store", "no-store", "GET / max-age=60, No-Store"},
		rule{"RFC 9111 §5.2: not an argument", "stored", `GET / max-age=60, x="no-store"`},
		rule{"RFC 9111 §5.2.1.5: no-store of the request", "request-no-store",
			"GET | no-store / max-age=60"},
		rule{"RFC 9111 §5.2.2.7: private", "private", "GET / private;max-age=60"},
		rule{"a hidden cookie", "set-cookie",
			"GET / max-age=60 | Set-Cookie: a=b | Connection: Set-Cookie"},
		rule{"RFC 9111 §4.1: Vary", "vary",
			"GET / max-age=60 | Vary: Accept, *; GET / max-age=60 | Vary: date"},
		rule{"RFC 9111 §3.3: a part", "status",
			"GET / 206 max-age=60; GET / 304 max-age=60; GET / 416 max-age=60"},
		rule{"RFC 9111 §5.2.2.3: understood", "stored", "GET / max-age=60, no-store, must-understand"},
		rule{"RFC 9111 §5.2.2.3: not understood", "status", "GET / 299 max-age=60, must-understand"},
		rule{"RFC 9111 §3.5: credentials", "authorization",
			"GET | Authorization: Basic eA== / max-age=60"},
		rule{"RFC 9111 §3.5: but for all", "stored",
			"GET | Authorization: Basic eA== / max-age=60, public; " +
				"GET | Authorization: Basic eA== / s-maxage=60; " +
				"GET | Authorization: Basic eA== / max-age=60, must-revalidate"},
		rule{"RFC 4559 §6: of a connection", "authorization",
			"GET / 401 max-age=60 | WWW-Authenticate: NTLM; " +
				"GET | Authorization: NTLM eA== / max-age=60, public"},
		rule{"too many to be read again", "too-large",
			"GET / max-age=60" + strings.Repeat(" | A: b", 300)},
	)
	for _, status := range []int{200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501} {
		e := entryOf(fmt.Sprint(status, " Last-Modified: @-9999"))
		eq(t, fmt.Sprint("RFC 9110 §15.1: ", status), verdict("GET", e, CacheConfig{}), "stored")
	}
	e := entryOf("max-age=60")
	e.Origin, e.Length = netip.MustParseAddr("127.0.0.1"), 1000
	eq(t, "as large as all", verdict("GET", e, CacheConfig{limit: 1000, shareInner: true}), "stored")
	eq(t, "larger", verdict("GET", e, CacheConfig{limit: 999, shareInner: true}), "too-large")
	eq(t, "an inner address", verdict("GET", e, CacheConfig{limit: 1000}), "inner-address")
}

func TestCacheVary(t *testing.T) {
	selects := func(text string) any {
		vary, first, second := columns(text)
		e := entryOf("Vary: " + vary)
		e.request = selectingFields(e.Header, fields(first))
		return e.selectedBy(fields(second))
	}
	rules(t, selects,
		rule{"RFC 9111 §4.1: what means the same", "true",
			"foo / FOO: 1 / Foo: 1 | Bar: 2; Foo /  / Bar: 1; " +
				"Foo, Bar / Foo: 1 | Bar: 2 / Bar: 2 | Foo: 1; Foo / Foo: 1 | Foo: 2 / Foo: 1 , 2; " +
				"Accept-Encoding / Accept-Encoding: gzip, br / Accept-Encoding: BR,gzip"},
		rule{"RFC 9111 §4.1: what differs", "false", "Foo / Foo: a / Foo: A; Foo / Foo: 1 / ; " +
			"Foo /  / Foo:; Foo, Bar / Foo: 1 / Bar: 1; Foo | Vary: Bar / Bar: 2 / Bar: 3; " +
			`Foo / Foo: "a,b" / Foo: "a, b"; Foo / Foo: 1, 2 / Foo: 2, 1; ` +
			"Accept-Language / Accept-Language: en, de / Accept-Language: en, de;q=0.5"},
	)
	began := time.Now()
	long := strings.Repeat("Foo,", 4000) + " / Foo: " + strings.Repeat(",", 2e4) + " / "
	eq(t, "a long one", selects(long), false)
	eq(t, "within a second, not minutes", time.Since(began) < time.Second, true)
}

// May an entry be used that has been stale for a while, where the origin answers
// with an error or, at 0, not at all?
func TestCacheMayStandIn(t *testing.T) {
	rules(t, func(text string) any {
		stored, request, failure := columns(text)
		wait, status, _ := strings.Cut(failure, " ")
		e, res := entryOf(stored), entryOf(status)
		var err error
		if res.Status == 0 {
			err = io.EOF
		}
		return e.mayStandIn(fields(request), &res.Response, err, noon.Add(duration(wait)+e.lifetime))
	},
		rule{"RFC 9111 §4.2.4: no answer", "true", "max-age=60 /  / 9999s 0"},
		rule{"RFC 9111 §4.2.4: it is forbidden", "false", "no-cache /  / 3s 0; " +
			"max-age=60, must-revalidate /  / 3s 0; max-age=60, proxy-revalidate /  / 3s 0; " +
			"s-maxage=60 /  / 3s 0; max-age=60 / no-cache / 3s 0; max-age=60 /  / 3s 503"},
		rule{"RFC 5861 §4: it is allowed", "true",
			"max-age=60, stale-if-error=600 /  / 599s 500; max-age=60 / stale-if-error=600 / 599s 504"},
		rule{"RFC 5861 §4: not any more, or not for that", "false",
			"max-age=60, stale-if-error=600 /  / 600s 502; " +
				"max-age=60, stale-if-error=600 /  / 600s 0; " +
				"max-age=60, stale-if-error=600 /  / 3s 404; " +
				"max-age=60, must-revalidate, stale-if-error=600 / stale-if-error=600 / 3s 503"},
	)
}

func TestCacheSameRepresentation(t *testing.T) {
	rules(t, func(text string) any {
		stored, validation, _ := columns(text)
		return sameRepresentation(fields(stored), fields(validation))
	},
		rule{"RFC 9111 §4.3.4: by its tag, or else by its date", "true", `ETag: "1" / ETag: "1"; ` +
			`ETag: "1" / ETag: W/"1"; ETag: "1" / ; Last-Modified: a / Last-Modified: a; ` +
			`Last-Modified: a / ; ETag: "1" | Last-Modified: a / ETag: "1" | Last-Modified: b`},
		rule{"RFC 9111 §4.3.4: another", "false",
			`ETag: "1" / ETag: "2"; Last-Modified: a / Last-Modified: b`},
	)
}

// No two of these share a name on any file system.
var cacheNames = []string{"h/a/b", "h/a_b", "h/a%2Fb", "h/a%2fb", "h/a%5fb", "h/A/b", "H/a/b", "h/a?b",
	"h/a%3fb", "h/a/b/", "h/a//b", "h:81/a", "h_81/a", "h%3a81/a", "h/a.", "h/a", "h/a%20", "h/..",
	"h/a+b", "h/a%2bb", "h/a%", "h/a:b", "h/a*b", "h/a\\b", "h/\xff", "h/%ff", "h/ü", "h/u\u0308", "h/ß",
	"con/", "con", "nul.txt/", "com1.de/a", "lpt9/", "aux./", "[::1]/", "h", "h/", ".h", "h/a~00000000",
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

// Memory answers for a second without a look at the file. Age (RFC 9111 §5.1) and
// ttl (RFC 9211 §2.4) count on.
func TestCacheMemory(t *testing.T) {
	p, o := start(t)
	n := 0
	ask := func(request string) string {
		r := p.get(request)
		n++
		outcome := strings.Fields(p.lines(n)[n-1])[3]
		return fmt.Sprintf("%.5q %s %s %s", r.body, outcome, r.Get("Age"), r.Get("Cache-Status"))
	}
	const missed = `"text" TCP_MISS/200 10 proxy; fwd=uri-miss; fwd-status=200; stored`
	const renewed = `"text" TCP_REFRESH_UNMODIFIED/200 10 proxy; fwd=stale; fwd-status=304; stored`
	o.put("/", `max-age=100 | Age: 10 | ETag: "1"`, "text")
	rules(t, func(text string) any { // a while, the request, and what has happened to the file
		wait, request, removed := columns(text)
		if removed != "" {
			os.Remove(p.file("/"))
		}
		p.move(duration(wait))
		return ask("/ | " + request)
	},
		rule{"at first", missed, ""},
		rule{"from the file", `"text" TCP_HIT/200 30 proxy; hit; ttl=70`, "20s"},
		rule{"from memory", `"text" TCP_MEM_HIT/200 31 proxy; hit; ttl=69`, "1s"},
		rule{"with a condition", `"" TCP_IMS_HIT/304 31 proxy; hit; ttl=69`, `0s / If-None-Match: "1"`},
		rule{"stale, but wanted", `"text" TCP_HIT/200 111 proxy; hit; ttl=-11`, "80s / max-stale"},
		rule{"stale", renewed, "0s"},
		rule{"from the new file", `"text" TCP_HIT/200 11 proxy; hit; ttl=89`, "1s"},
		rule{"a second later", `"text" TCP_MEM_HIT/200 12 proxy; hit; ttl=88`, "1s /  / removed"},
		rule{"more than a second later", missed, "1s"},
		rule{"after the clock was set back", renewed, "-1h"},
	)
	for size, want := range map[int]string{maxInMemory: "TCP_MEM_HIT", maxInMemory + 1: "TCP_HIT"} {
		path := fmt.Sprint("/", size)
		o.put(path, "max-age=100", bytesOf(size))
		ask(path)
		ask(path)
		match(t, path, ask(path+" | Range: bytes=0-2"), `"[^ ]*" `+want+"/206 .*")
	}
}

// Somebody asks, and the origin has "old". It has "new" when somebody asks 100
// seconds later, and another at once: so the body says where an answer is from.
func TestCacheSecondRequest(t *testing.T) {
	const stale, fresh = "max-age=60", "max-age=600"
	const tag, date = ` | ETag: "1"`, " | Last-Modified: Sunday, 06-Nov-94 08:49:37 GMT"
	const cookie = " | Set-Cookie: a=b"
	const hit, fetched, newHit = `200 "old", hit`, `200 "new", miss`, `200 "new", hit`
	const renewed, shared, stands = `200 "old", renewed`, `200 "old", (hit|collapsed)`, `200 "old", miss`
	p, o := start(t)
	for i, row := range []struct{ rule, first, old, second, new, want, third string }{
		{"RFC 9111 §4.2: fresh", "GET", fresh + " | Date: x", "GET", "", hit, hit},
		{"RFC 9111 §3: not stored", "GET", fresh + ", private", "GET", "", fetched, fetched},
		// A date is sent as it came, and a cookie is for one client alone.
		{"RFC 9111 §4.3: by tag", "GET", stale + tag, "GET", "", renewed, shared},
		{"by date", "GET", stale + date, "GET", "", renewed, shared},
		{"it has it", "GET", stale + tag, `GET | If-None-Match: "1"`, "", "304, renewed", shared},
		{"it is new", "GET", stale + tag, "GET", stale + ` | ETag: "2"`, fetched, newHit},
		{"a cookie", "GET", stale + tag, "GET", stale + tag + cookie, renewed + " a=b", shared},
		{"no-store of a 304", "GET", stale + tag, "GET", "no-store" + tag, renewed, fetched},
		{"no-store", "GET", stale + tag, "GET", "no-store", fetched, fetched},
		{"RFC 9111 §3.5", "GET", stale + tag, "GET | Authorization: Basic eA==", "", renewed, renewed},
		{"RFC 9111 §4.2.4: no origin", "GET", stale, "GET", "0", stands, stands},
		{"forbidden", "GET", stale + ", must-revalidate", "GET", "0", "502 .*", ""},
		{"RFC 5861 §4", "GET", stale + ", stale-if-error=99", "GET", "503", stands, stands},
		{"RFC 9111 §5.2.1.4", "GET", fresh + tag, "GET | no-cache", "", renewed, shared},
		{"without a validator", "GET", fresh, "GET | no-cache", "", fetched, newHit},
		{"RFC 9111 §5.2.1.7", "HEAD", fresh, "GET | only-if-cached", "", "504 .*", fetched},
		{"RFC 9111 §3.5: a hit", "GET", fresh, "GET | Authorization: Basic eA==", "", hit, hit},
		{"RFC 9111 §3.3", "GET | Range: bytes=0-3", "206 " + fresh, "GET", "", `206 "new", miss`, ""},
		{"a range of all", "GET | Range: bytes=1-2", fresh, "GET", "", hit, hit},
		{"two ranges", "GET", fresh, "GET | Range: bytes=0-1,3-3", "", fetched, hit},
		{"RFC 9110 §13.1.1", "GET", fresh, `GET | If-Match: "1"`, "", fetched, hit},
		{"RFC 9110 §13.1.4", "GET", fresh, "GET | If-Unmodified-Since: x", "", fetched, hit},
		{"RFC 9110 §9.3", "POST", fresh, "GET", "", fetched, newHit},
		{"HEAD", "GET", fresh, "HEAD", "", "200, hit", hit},
		{"no answer to HEAD", "GET", fresh + tag, "HEAD | no-cache", "405", "405, miss", hit},
		{"no-store of a 304 for a redirection", "GET", "302 " + stale + tag, "GET", "no-store" + tag,
			`302 "old", renewed`, fetched},
	} {
		t.Run(row.rule+": "+row.first+", "+row.old+", "+row.second+", "+row.new, func(t *testing.T) {
			ask := func(request string) string {
				method, rest, _ := strings.Cut(request, " ")
				r := p.ask(strings.TrimSpace(fmt.Sprint(method, " URL/", i, " ", rest)))
				return strings.TrimSpace(r.String() + " " + r.Get("Set-Cookie"))
			}
			o.put(fmt.Sprint("/", i), row.old, "old")
			match(t, "first", ask(row.first), ".*, miss")
			p.move(100 * time.Second)
			o.put(fmt.Sprint("/", i), cmp.Or(row.new, row.old), "new")
			match(t, "second", ask(row.second), row.want)
			match(t, "third", ask("GET"), cmp.Or(row.third, row.want))
		})
	}
	o.put("/", fresh, "key")
	eq(t, "a Host", p.get("/ | Host: evil.example"), `200 "key", miss`)
	eq(t, "it is no part of the key (RFC 9111 §2)", p.get("/"), `200 "key", hit`)
	eq(t, "but the query is", p.get("/?a"), `200 "key", miss`)

	const head = "max-age=60 | Content-Length: 3 | ETag: "
	p = p.to(script(t, "HTTP/1.1 200 OK | "+head+"\"1\"\n\nold",
		"HTTP/1.1 304 Not Modified | "+head+`W/"2"`, "HTTP/1.1 200 OK | "+head+"\"2\"\n\nnew").host)
	eq(t, "first", p.get("/"), `200 "old", miss`)
	p.move(100 * time.Second)
	eq(t, "a 304 for another tag (RFC 9111 §4.3.4)", p.get("/"), fetched)
	eq(t, "third", p.get("/"), newHit)
}

func TestCacheFlags(t *testing.T) {
	rules(t, func(text string) any { // two requests, and a while later three more
		flag, page, wait := columns(text)
		p, o := start(t, flag)
		o.put("/", page, "")
		got := ""
		for i := range 5 {
			if i == 2 {
				p.move(duration(wait))
			}
			got += p.get("/").String() + "; "
		}
		return strings.ReplaceAll(got, "200, ", "")
	},
		rule{"the third is stored", "miss; miss; miss; hit; hit; ", "-uses=3 / max-age=9999 / 0s"},
		rule{"of the last 10 minutes", "miss; miss; miss; miss; miss; ", "-uses=3 / max-age=9999 / 11m"},
		rule{"fresh for -ttl", "miss; hit; hit; hit; hit; ", "-ttl=10m / 200 / 9m"},
		rule{"and not longer", "miss; hit; miss; hit; hit; ", "-ttl=10m / 200 / 11m"},
	)
}

// Conditions and ranges, of an entry as it stands in the cache.
func TestCacheConditionsAndRanges(t *testing.T) {
	const date, before = "Mon, 02 Jan 2006 15:04:05 GMT", "Sun, 01 Jan 2006 15:04:05 GMT"
	const after = "Tuesday, 03-Jan-06 15:04:05 GMT"
	const all, first, has = `200 "0123456789", hit`, `206 "01" bytes 0-1/10, hit`, "304, hit"
	p, o := start(t)
	o.put("/", `max-age=6000 | ETag: "1" | Last-Modified: `+date, "0123456789")
	p.get("/")
	rules(t, func(request string) any { return p.get("/ | " + request) },
		rule{"RFC 9110 §13.1.2: the tag", has,
			`If-None-Match: W/"1"; If-None-Match: "0", "1"; If-None-Match: *; ` +
				`If-None-Match: "0" | If-None-Match: "1"; If-None-Match: "1" | Range: bytes=0-1`},
		rule{"RFC 9110 §13.1.2: another", all, `If-None-Match: "1,2"; If-None-Match: 1`},
		rule{"RFC 9110 §13.1.3: the date", has,
			"If-Modified-Since: " + date + "; If-Modified-Since: " + after},
		rule{"RFC 9110 §13.1.3: another", all,
			"If-Modified-Since: " + before + "; If-Modified-Since: garbage"},
		rule{"RFC 9110 §13.2.2: the tag counts", all,
			`If-None-Match: "2" | If-Modified-Since: ` + after},
		rule{"RFC 9110 §13.2.2: the tag counts", has,
			`If-None-Match: "1" | If-Modified-Since: ` + before},
		rule{"RFC 9110 §13.2.2: then a range", first, `If-None-Match: "2" | Range: bytes=0-1`},
		rule{"RFC 9110 §14.1.2: to the end", `206 "56789" bytes 5-9/10, hit`, "Range: bytes=5-"},
		rule{"RFC 9110 §14.1.2: the last", `206 "9" bytes 9-9/10, hit`,
			"Range: bytes=-1; Range: bytes=9-99999999999999999999"},
		rule{"RFC 9110 §14.1.2: more than all", `206 "0123456789" bytes 0-9/10, hit`,
			"Range: bytes=-30"},
		rule{"RFC 9110 §14.1.2: behind the end", `416 bytes \*/10, hit`,
			"Range: bytes=10-; Range: bytes=-0; Range: bytes=99999999999999999999-"},
		rule{"RFC 9110 §14.2: malformed", all,
			"Range: bytes=5-4; Range: bytes=-; Range: bytes=a-b; Range: bytes=+1-2; Range: lines=0-4"},
		rule{"RFC 9110 §13.1.5: of this one", first,
			`Range: bytes=0-1 | If-Range: "1"; Range: bytes=0-1 | If-Range: ` + date},
		rule{"RFC 9110 §13.1.5: of another", all, `Range: bytes=0-1 | If-Range: "2"; ` +
			`Range: bytes=0-1 | If-Range: W/"1"; Range: bytes=0-1 | If-Range: ` + after},
	)
	eq(t, "a condition of HEAD", p.ask(`HEAD URL/ | If-None-Match: "1"`), has)
	eq(t, "a range of HEAD (RFC 9110 §14.2)", p.ask("HEAD URL/ | Range: bytes=0-1"), "200, hit")
	eq(t, "tag of a 304 (RFC 9110 §15.4.5)", p.get("/ | If-None-Match: *").Get("ETag"), `"1"`)
}

// An entry is a transcript of the request and the response. Other processes may
// read it, and anybody may remove it.
func TestCacheTranscripts(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	p, o := start(t, "-cache", dir)
	other, _ := start(t, "-cache", dir) // as after a restart
	other = other.to(o.host)
	const miss, hit = "200 100000 bytes, miss", "200 100000 bytes, hit"
	image := bytesOf(100_000)
	for path, length := range map[string]string{"/known": " | Content-Length: 100000", "/chunked": ""} {
		o.put(path, `max-age=60 | Connection: X | X: y | ETag: "abc"`+length, image)
		eq(t, "first", p.get(path), miss)
		text, _ := os.ReadFile(p.file(path))
		heads := strings.TrimSuffix(string(text), image)
		match(t, "heads", heads, `GET http://`+o.host+path+` HTTP/1\.1\r\n`+
			`Date: [^\n]+ GMT\r\nInner: 127\.0\.0\.1\r\n\r\nHTTP/1\.1 200 OK\r\n`+
			`((Cache-Control: max-age=60|Content-Type: [^\n]+|Etag: "abc"|Date: [^\n]+ GMT)\r\n){4}`+
			`Content-Length: +100000\r\n\r\n`)
		info, _ := os.Stat(p.file(path))
		folder, _ := os.Stat(dir)
		eq(t, "modes", fmt.Sprint(info.Mode(), folder.Mode()), "-rw------- drwx------")
		got := other.get(path)
		eq(t, "by another proxy", fmt.Sprint(got, got.body == image, got.Header["X"]), hit+" true []")
		for _, name := range []string{p.file(path), dir} {
			os.RemoveAll(name)
			p.move(2 * time.Second)
			eq(t, "after rm "+name, p.get(path), miss)
			eq(t, "made anew", p.get(path), hit)
		}
		os.RemoveAll(dir)
		os.Mkdir(dir, 0o700) // another one in its place
		other.ahead.Store(p.ahead.Load())
		eq(t, "another directory", other.get(path), miss)
	}
}

// Whatever happens to a file, no answer is wrong.
func TestCacheDamagedEntries(t *testing.T) {
	t.Parallel()
	p, o := start(t)
	const ok, length = "HTTP/1.1 200 OK", "Content-Length: "
	outside, body := filepath.Join(t.TempDir(), "x"), bytesOf(2000)
	for _, row := range []struct{ what, old, new string }{ // which part of a file is replaced
		{"cut", body, body[1:]},
		{"cut in a head", length, "\x00"},
		{"longer", body, body + "x"},
		{"garbage", "GET ", body},
		{"another host", "http://", "http://x"},
		{"no status", "200 OK", "2OO OK"},
		{"another length", length + " ", length + "1"},
		{"a negative one", length + " ", length + "-"},
		{"a part", ok, "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/20"},
		{"a cookie", ok, ok + "\r\nSet-Cookie: a=b"},
		{"a directory", "", ""},
		{"a pipe", "", ""},
		{"a link out", "", ""},
	} {
		t.Run(row.what, func(t *testing.T) {
			path := "/" + strings.ReplaceAll(row.what, " ", "-")
			o.put(path, "max-age=600", body)
			p.get(path)
			text, _ := os.ReadFile(p.file(path))
			os.Rename(p.file(path), outside)
			switch row.what {
			case "a directory":
				os.MkdirAll(p.file(path)+"/full", 0o700)
			case "a pipe":
				exec.Command("mkfifo", p.file(path)).Run()
			case "a link out":
				os.Symlink(outside, p.file(path))
			default:
				damaged := strings.Replace(string(text), row.old, row.new, 1)
				os.WriteFile(p.file(path), []byte(damaged), 0o600)
			}
			p.move(2 * time.Second)
			got := p.get(path)
			eq(t, "reply", got, "200 2000 bytes, miss")
			eq(t, "all of it", got.body == body, true)
		})
	}
	o.put("/large", "max-age=600", bytesOf(24<<20))
	p.get("/large")
	w := p.dial()
	w.send("GET URL/large")
	w.in.Peek(1)
	os.Truncate(p.file("/large"), 1000)
	match(t, "cut while it is read", w.reply("GET").String(), `200 \d+ bytes cut, hit`)
}

// A process that is killed leaves no wrong file. What it was writing goes after
// an hour, as another may still be writing what is younger.
func TestCacheKilled(t *testing.T) {
	t.Parallel()
	p, o := start(t)
	for round := range 3 {
		cmd, stderr := command(t, "-cache", p.dir, "-files", "", "0"), new(buffer)
		cmd.Stderr = stderr
		cmd.Start()
		program := &testProxy{t: t, host: o.host, addr: listening(t, stderr)}
		for i := range 21 {
			length := []string{"", fmt.Sprint(" | Content-Length: ", i*20_000)}[i%2]
			rest := o.putSlowly(fmt.Sprint("/", i), "max-age=99999"+length, bytesOf(i*20_000), i*10_000)
			if i != 20 { // which is never finished
				time.AfterFunc(rand.N(10*time.Millisecond), func() { close(rest) })
			}
			program.dial().send(fmt.Sprint("GET URL/", i))
		}
		eventually(t, "some files", func() bool {
			return len(files(p.dir)) > 6*(round+1) && len(strays(p.dir)) > round
		})
		cmd.Process.Kill()
		cmd.Wait()
	}
	p.move(time.Minute) // behind all these
	for i := range 20 {
		got := p.get(fmt.Sprint("/", i))
		eq(t, fmt.Sprint("/", i, " is whole"), got.body == bytesOf(i*20_000) && got.err == nil, true)
	}
	p.cache.trim(false)
	eq(t, "young files stay", len(strays(p.dir)) >= 3, true)
	p.move(strayWait)
	p.cache.trim(false)
	eq(t, "files after an hour", len(files(p.dir)), 20)
}

// A 304 brings new fields (RFC 9111 §3.2), for a body in memory, in a file, and in one so large
// that it is copied in steps. That is finished though its client wants none of the body.
func TestCacheRenewal(t *testing.T) {
	p, o := start(t)
	other, _ := start(t, "-cache", p.dir)
	other = other.to(o.host)
	const fresh = `max-age=600 | ETag: W/"1" | `
	for _, size := range []int{100, 2 * maxInMemory, copyStep + 100} {
		path, body := fmt.Sprint("/", size), bytesOf(size)
		o.put(path, fresh+"X-A: 1 | X-B: 1", body)
		p.get(path)
		p.move(700 * time.Second)
		o.put(path, fresh+"X-A: 2 | X-A: 3 | Content-Encoding: gzip", "")
		got := p.get(path + ` | If-None-Match: "other" | Range: bytes=0-3 | If-Modified-Since: x`)
		eq(t, "a range", got, fmt.Sprintf("206 %q bytes 0-3/%d, renewed", body[:4], size))
		asked := o.requests(path)[1].Header
		eq(t, "asked", fmt.Sprint(asked["If-None-Match"], asked["If-Modified-Since"]), `[W/"1"] []`)
		eventually(t, "renewed", func() bool { return p.get(path).Get("X-A") == "2" })
		p.move(500 * time.Second)
		other.ahead.Store(p.ahead.Load())
		for _, p := range []*testProxy{p, other} {
			got = p.get(path)
			eq(t, "all of it", got.body == body && strings.HasSuffix(got.String(), ", hit"), true)
			fields := fmt.Sprint(got.Header["X-A"], got.Header["X-B"], got.Header["Content-Encoding"])
			eq(t, "fields", fields, "[2 3] [1] []")
		}
		p.move(700 * time.Second)
		has := path + ` | If-None-Match: W/"1"`
		eq(t, "a condition", p.get(has), "304, renewed")
		eventually(t, "a hit", func() bool { return p.get(has).String() == "304, hit" })
		eq(t, "requests", o.count(path), 3)
	}
}

func TestCacheInvalidation(t *testing.T) {
	p, o := start(t)
	elsewhere := newOrigin(p)
	other := p.to(elsewhere.host)
	paths := 0
	rules(t, func(text string) any { // the request, and its response
		paths++
		path := fmt.Sprint("/", paths)
		words := strings.NewReplacer("OTHER", other.host, "HOST", o.host, "/PATH", path)
		request, response, _ := columns(words.Replace(text))
		for _, o := range []*origin{o, elsewhere} {
			o.put(path, "max-age=600", "")
			p.to(o.host).get(path)
		}
		method, by, _ := strings.Cut(request, " ")
		o.put(by, response, "")
		p.ask(method + " URL" + by)
		o.put(path, "max-age=600", "")
		eq(t, "on another host", other.get(path), "200, hit")
		return p.get(path)
	},
		rule{"RFC 9111 §4.4: an unsafe method", "200, miss", "POST /PATH / 200; PUT /PATH / 204; " +
			"DELETE /PATH / 200; PATCH /PATH / 302; M-ODD /PATH / 200"},
		rule{"RFC 9111 §4.4: a safe one, or an error", "200, hit",
			"OPTIONS /PATH / 200; REPORT /PATH / 200; POST /PATH / 500; POST /PATH / 404"},
		rule{"RFC 9111 §4.4: what it names", "200, miss",
			"POST /x / 201 Location: http://HOST/PATH; POST /x / 200 Content-Location: /PATH"},
		rule{"RFC 9111 §4.4: but not elsewhere", "200, hit",
			"POST /x / 200 Location: http://OTHER/PATH; " +
				"POST /x / 200 Content-Location: http://HOST.evil/PATH; POST /x / 200 Location: ?x"},
	)
	got := p.crowd(o, "/late", "max-age=600", "old", 1, 2, func() {
		o.put("/late", "max-age=600", "new")
		p.ask("POST URL/late")
	})
	eq(t, "a download under way", got, `map[200 "old", miss:1]`)
	eq(t, "is not stored", p.get("/late"), `200 "new", miss`)
}

// -size is kept. The least recently used entries go, and nothing of others.
func TestCacheSize(t *testing.T) {
	p, o := start(t, "-size", "1M")
	foreign := filepath.Join(p.dir, "example.com_my_film.mkv")
	os.WriteFile(foreign, make([]byte, 2<<20), 0o600)
	os.Chtimes(foreign, time.Time{}, time.Unix(0, 0))
	long := "/" + strings.Repeat("_", 60) // so that the name of the file ends in a hash
	for i := range 12 {
		path := fmt.Sprint(long, i)
		o.put(path, "max-age=99999999", bytesOf(100_000))
		if i == 8 {
			p.move(2 * time.Second)
			eq(t, "used again", p.get(long+"0"), "200 100000 bytes, hit")
		}
		eq(t, "new", p.get(path), "200 100000 bytes, miss")
		if i < 8 {
			used := time.Now().Add(time.Duration(i-100) * time.Hour)
			os.Chtimes(p.file(path), used, used)
		}
	}
	eventually(t, "the limit is kept", func() bool { return len(files(p.dir)) <= 11 })
	eventually(t, "it is counted", func() bool {
		p.cache.trim(false) // what is stored while it counts may count twice
		n, size := p.cache.usage()
		return size > 500_000 && size <= 1<<20 && int(n)+1 == len(files(p.dir))
	})
	kept := files(p.dir)
	eq(t, "what is of others is kept", slices.Contains(kept, filepath.Base(foreign)), true)
	for i, want := range map[string]bool{"0": true, "1": false, "2": false, "10": true, "11": true} {
		eq(t, i+" is kept", slices.Contains(kept, filepath.Base(p.file(long+i))), want)
	}
	for path, length := range map[string]string{"/known": " | Content-Length: 5242880", "/chunked": ""} {
		got := p.crowd(o, path, "max-age=600"+length, bytesOf(5<<20), 1, 3<<20, func() {
			eq(t, "files", files(p.dir), kept) // it was given up after 1 MiB
		})
		eq(t, "what is larger than that", got, "map[200 5242880 bytes, miss:1]")
	}
}

// crowd asks n times at once for a body, of which the origin sends some bytes. When
// all have these it calls do, and the rest comes. It counts equal replies.
func (p *testProxy) crowd(o *origin, path, head, body string, n, some int, do func()) map[string]int {
	rest := o.putSlowly(path, head, body, some)
	clients, responses := make([]*wire, n), make([]*http.Response, n)
	for i := range n {
		clients[i] = p.dial()
		clients[i].send("GET URL" + path)
	}
	for i, w := range clients {
		res, err := http.ReadResponse(w.in, nil)
		if err != nil {
			p.t.Fatal(err)
		}
		begin := make([]byte, some)
		io.ReadFull(res.Body, begin)
		eq(p.t, "it begins right", string(begin) == body[:some], true)
		responses[i] = res
	}
	do()
	close(rest)
	count := map[string]int{}
	for _, res := range responses {
		r := readReply(res)
		r.body = body[:some] + r.body
		eq(p.t, "no byte is wrong", strings.HasPrefix(body, r.body), true)
		count[r.String()]++
	}
	return count
}

// A hundred clients at once are one request, whatever becomes of it.
func TestCacheCrowd(t *testing.T) {
	p, o := start(t)
	rules(t, func(text string) any {
		ends, length, _ := columns(text)
		path := fmt.Sprint("/", rand.Int())
		got := p.crowd(o, path, "max-age=600 | "+length, bytesOf(300_000), 100, 150_000, func() {
			if ends == "cut" {
				o.CloseClientConnections()
			}
		})
		eq(t, "requests", o.count(path), 1)
		o.put(path, "no-store", "new")
		return fmt.Sprint(got, " ", p.get(path))
	},
		rule{"it ends well",
			`map\[200 300000 bytes, collapsed:99 200 300000 bytes, miss:1] 200 300000 bytes, hit`,
			"whole; whole / Content-Length: 300000"},
		rule{"it breaks off",
			`map\[200 150000 bytes cut, collapsed:99 200 150000 bytes cut, miss:1] 200 "new", miss`,
			"cut; cut / Content-Length: 300000"},
	)
	hold := func() {}
	o.handle("/variants", func(w http.ResponseWriter, r *http.Request) {
		hold()
		r.URL.Path = "/" + r.Header.Get("Foo")
		o.ServeHTTP(w, r)
	})
	o.put("/a", `max-age=600 | Vary: Foo | ETag: "a"`, "a")
	o.put("/b", `max-age=600 | Vary: Foo | ETag: "b"`, "b")
	// RFC 9111 §4.1: what the first to ask for a variant gets, and the requests so far.
	variants := func(first string, requests int) {
		hold = sync.OnceFunc(func() {
			eventually(t, "all ask", func() bool { return p.active.Load() == 40 })
		})
		together(40, func(i int) {
			foo := "ab"[i%2 : i%2+1]
			got := p.get("/variants | Foo: " + foo).String()
			match(t, "reply", got, `200 "`+foo+`", (hit|collapsed|`+first+`)`)
		})
		eq(t, "requests for variants: "+first, o.count("/variants"), requests)
	}
	variants("miss", 2)
	p.move(2 * time.Second)
	variants("hit", 2)
	p.move(700 * time.Second)
	variants("renewed", 4)
	p.ask("POST URL/variants | Foo: a")
	variants("miss", 7)

	rest := o.putSlowly("/mine", "private", "mine", 1) // what may not be stored is fetched side by side
	go func() {
		eventually(t, "20 ask before one has an answer", func() bool { return o.count("/mine") == 20 })
		close(rest)
	}()
	together(20, func(int) { match(t, "reply", p.get("/mine").String(), `200 "mine", \w+`) })
}

// Another directory in the place of the cache is noticed within 0.1 s.
func TestCacheReplacedDirectory(t *testing.T) {
	p, o := start(t)
	o.put("/", "max-age=600", "text")
	p.get("/")
	os.Rename(p.dir, filepath.Join(t.TempDir(), "old"))
	os.Mkdir(p.dir, 0o700)
	p.cache.reopen()
	p.move(2 * time.Second) // which memory does not answer for
	eq(t, "its file has gone", p.get("/"), `200 "text", miss`)
	eq(t, "the new one is used", len(files(p.dir)), 1)
	eventually(t, "it is counted", func() bool { n, _ := p.cache.usage(); return n == 1 })
}

// What is of others in the directory does not count, however large or new it is.
func TestCacheForeignFiles(t *testing.T) {
	p, o := start(t, "-size", "1M")
	foreign := filepath.Join(p.dir, "my_backup.tar")
	os.WriteFile(foreign, []byte(bytesOf(3<<20)), 0o600)
	os.Chtimes(foreign, time.Now(), time.Now().Add(time.Hour))
	o.put("/", "max-age=600", bytesOf(100_000))
	p.get("/")
	p.cache.trim(false)
	_, size := p.cache.usage()
	eq(t, "bytes", size < 200_000, true)
	eq(t, "what is stored stays", len(files(p.dir)), 2)
}

// A response of unknown length that was larger than the limit cuts others once.
func TestCacheOversized(t *testing.T) {
	p, _ := start(t, "-size", "100K")
	page := "HTTP/1.1 200 OK | max-age=60\n\n" + bytesOf(300<<10) + "\x00"
	p = p.to(script(t, page, page).host)
	eq(t, "first", len(p.get("/").body), 300<<10)
	again := p.get("/")
	eq(t, "again", len(again.body), 300<<10)
	match(t, "it says why", again.Get("Cache-Status"), ".*; detail=too-large")
}

// What is stale at once is asked for by all who waited for the first, together and
// not one after another. The origin holds its answers back until all are there.
func TestCacheNobodyWaitsTwice(t *testing.T) {
	p, o := start(t)
	o.put("/a", `no-cache | ETag: "1"`, "a")
	var asked atomic.Int32
	o.handle("/slow", func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 1 {
			eventually(t, "all wait", func() bool { return p.active.Load() == 6 })
		} else {
			eventually(t, "all ask", func() bool { return asked.Load() == 6 })
		}
		r.URL.Path = "/a"
		o.ServeHTTP(w, r)
	})
	begun := time.Now()
	together(6, func(int) { match(t, "reply", p.get("/slow").String(), `200 "a", (miss|renewed)`) })
	eq(t, "without a wait", time.Since(begun) < joinWait/2, true)
}

// Nobody waits for what may not be for all, nor for too long.
func TestCacheWaits(t *testing.T) {
	p, o := start(t)
	// While the origin holds its first answer back, another client asks, and this is
	// what that one gets. The first has asked as long ago as it says.
	second := func(path, page, request string, ago time.Duration) string {
		rest, first, other := o.putSlowly(path, page, "text", 0), p.dial(), p.dial()
		await := func(what string, done func(d *download) bool) {
			eventually(t, what, func() bool {
				p.cache.Lock()
				defer p.cache.Unlock()
				d := p.cache.downloads[fileName(p.host+path)]
				return d != nil && done(d)
			})
		}
		first.send("GET URL" + path)
		await("the first asks", func(d *download) bool {
			d.began = d.began.Add(-ago)
			return true
		})
		other.send("GET URL" + path + " | " + request)
		await("the second asks", func(d *download) bool { return d.awaited })
		close(rest)
		first.reply("GET")
		return other.reply("GET").String()
	}
	const shared, own = `200 "text", (hit|collapsed)`, `200 "text", miss`
	rules(t, func(request string) any {
		return second(fmt.Sprint("/", rand.Int()), "max-age=60", request, 0)
	},
		rule{"who waits", shared, "; Foo: bar"},
		rule{"RFC 9111 §3.5, §5.2.1.4, RFC 9110 §14.2: who does not", own,
			"Authorization: Basic eA==; no-cache; Range: bytes=0-1"},
	)
	match(t, "not for longer than 5 s", second("/late", "max-age=60", "", joinWait), own)
	o.put("/alone", "private", "")
	p.get("/alone")
	match(t, "for what nobody has waited for", second("/alone", "max-age=60", "", 0), shared)
	match(t, "in vain", second("/a", "private", "", 0), own)
	match(t, "not for what was not stored", second("/a", "max-age=60", "", 0), own)
	p.move(61 * time.Second)
	match(t, "once it was stored", second("/a", "max-age=60", "", 0), shared)
	match(t, "in vain", second("/b", "private", "", 0), own)
	p.move(time.Hour)
	match(t, "an hour later", second("/b", "max-age=60", "", 0), shared)
}

// Who stalls or leaves hurts nobody. What nobody reads any more is finished if
// little is left, and else dropped.
func TestCacheWhoStallsOrLeaves(t *testing.T) {
	t.Parallel()
	const known = " | Content-Length: 33554432"
	body := bytesOf(32 << 20)
	leave := func(t *testing.T, length string, left, others int) string {
		p, o := start(t)
		rest := o.putSlowly("/", "max-age=600"+length, body, len(body)-left)
		clients := make([]*wire, 1+others)
		for i := range clients {
			clients[i] = p.dial()
			clients[i].send("GET URL/ | Connection: close")
			readHead(clients[i].in)
		}
		eventually(t, "all but what is left is here", func() bool {
			info, err := os.Stat(strays(p.dir)[0])
			return err == nil && info.Size() >= int64(len(body)-left)
		})
		clients[0].SetLinger(0) // so that it leaves by a reset
		clients[0].Close()
		eventually(t, "it is gone", func() bool { return int(p.active.Load()) == others })
		close(rest)
		for _, w := range clients[1:] { // while the next one stalls
			eq(t, "another has all", w.rest() == body, true)
		}
		eventually(t, "it is over", func() bool { return len(strays(p.dir)) == 0 })
		o.put("/", "max-age=600", body)
		return p.get("/").String()
	}
	const hit, miss = "200 33554432 bytes, hit", "200 33554432 bytes, miss"
	eq(t, "others stall, or read", leave(t, known, 8<<20, 3), hit)
	eq(t, "little is left", leave(t, known, maxUnread-1<<17, 0), hit)
	eq(t, "more is left", leave(t, known, maxUnread+1<<17, 0), miss)
	eq(t, "who knows how much", leave(t, "", 1000, 0), miss)
}

// Who comes after a download has been dropped, and before its origin knows, does
// not get a part of it, and begins another one.
func TestCacheDroppedDownloads(t *testing.T) {
	p, _ := start(t)
	ask := func(page string, from io.Reader) *Response {
		req := &Request{Method: "GET", URL: URL{"example.com:80", "/"}, Body: new(body)}
		res, _, _ := p.cache.roundTrip(req, func(*Request) (*Response, error) {
			e := entryOf(page)
			e.Length, e.Body = -1, io.NopCloser(from)
			return &e.Response, nil
		})
		return res
	}
	slow, origin := io.Pipe() // Close does not end it
	ask("max-age=60", slow).Body.Close()
	res := ask("max-age=60", strings.NewReader("another"))
	text, err := io.ReadAll(res.Body)
	eq(t, "the next one", fmt.Sprint(string(text), err), "another<nil>")
	res.Body.Close()
	origin.CloseWithError(io.ErrClosedPipe)
	eventually(t, "one file is left", func() bool { return len(files(p.dir)) == 1 })
}

// Who asks for a part, or has it already, while a download is under way.
func TestCacheRangesOfDownloads(t *testing.T) {
	p, o := start(t)
	rules(t, func(text string) any {
		request, length, _ := columns(text)
		path, w := fmt.Sprint("/", rand.Int()), p.dial()
		first := p.crowd(o, path, `max-age=600 | ETag: "1" | `+length, "0123456789", 1, 5, func() {
			w.send("GET URL" + path + " | " + request)
			w.in.Peek(1)
		})
		eq(t, "first", first, `map[200 "0123456789", miss:1]`)
		return w.reply("GET")
	},
		rule{"RFC 9110 §14.2: here", `206 "12" bytes 1-2/10, collapsed`,
			"Range: bytes=1-2 / Content-Length: 10"},
		rule{"RFC 9110 §14.2: to come", `206 "89" bytes 8-9/10, collapsed`,
			"Range: bytes=-2 / Content-Length: 10"},
		rule{"RFC 9110 §14.2: behind the end", `416 bytes \*/10, collapsed`,
			"Range: bytes=10- / Content-Length: 10"},
		rule{"RFC 9110 §14.2: of an unknown length", `200 "0123456789", collapsed`, "Range: bytes=1-2"},
		rule{"RFC 9110 §13.2.2: it has it", "304, collapsed", `If-None-Match: "1" / Content-Length: 10`},
	)
	p = p.to(listen(t, func(c net.Conn, in *bufio.Reader) {
		if strings.Contains(readHead(in), "Range") {
			io.WriteString(c, message("HTTP/1.1 206 Partial Content | Content-Length: 9\n\n0123"))
			<-t.Context().Done()
		}
		io.WriteString(c, message("HTTP/1.1 200 OK | Content-Length: 5\n\nwhole"))
	}).host)
	w := p.dial()
	w.send("GET URL/ | Range: bytes=0-8")
	match(t, "a part of the origin's (RFC 9111 §3.3)", readHead(w.in), "HTTP/1.1 206 .*")
	eq(t, "all beside it", p.get("/"), `200 "whole", miss`)
}

func TestCacheFullDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", dir).CombinedOutput()
	if err != nil {
		t.Skipf("no small disk to be had: %s", out)
	}
	t.Cleanup(func() { exec.Command("umount", "-l", dir).Run() })
	p, o := start(t, "-cache", dir)
	var told buffer
	p.cache.warn = func(err error) { fmt.Fprintln(&told, err, errors.Is(err, syscall.ENOSPC)) }
	const fresh = `max-age=60000 | ETag: "1"`
	large := bytesOf(100_000)
	for _, length := range []string{"", " | Content-Length: 20971520"} {
		got := p.crowd(o, "/large", fresh+length, bytesOf(20<<20), 6, 300_000, func() {})
		match(t, "the first has all, the others a part", fmt.Sprint(got),
			`map\[(200 \d+ bytes cut, collapsed:\d )+200 20971520 bytes, miss:1]`)
		eventually(t, "it is over", func() bool { return p.active.Load() == 0 && len(files(dir)) == 0 })
	}
	match(t, "told once", told.String(), "not stored: [^\n]*no space left on device true\n")
	for i := range 12 {
		p.move(2 * time.Minute)
		o.put(fmt.Sprint("/", i), fresh, large)
		eq(t, "all", p.get(fmt.Sprint("/", i)).body == large, true)
	}
	eventually(t, "room is made, and the last is stored", func() bool {
		p.move(2 * time.Minute)
		return strings.HasSuffix(p.get("/11").String(), "hit")
	})
	eventually(t, "it is counted", func() bool {
		p.cache.trim(false) // what is stored while it counts may count twice
		n, size := p.cache.usage()
		return n == int64(len(files(dir))) && size <= 1<<20
	})
	fill := func(name string) { // so that it stays full
		for i := range 20 {
			os.WriteFile(filepath.Join(dir, fmt.Sprint(name, i)), []byte(large), 0o600)
		}
	}
	fill("a")
	o.put("/small", fresh, "small")
	small := p.get("/small")
	match(t, "a small one", fmt.Sprint(small, small.Header["Cache-Status"]),
		`200 "small", miss \[.*; fwd-status=200; detail=disk-error]`)
	fill("b")
	eq(t, "a renewal", p.get("/11 | no-cache").body == large, true)
	o.put("/range", fresh+" | Content-Length: 600000", bytesOf(600_000))
	_, err = newCache(p.cache.CacheConfig)
	eq(t, "another can start there", err, nil)
	pad := filepath.Join(dir, "a0") // its room is enough for a head, but not for all of the body
	for range 5 {
		eventually(t, "what was before is over", func() bool { return p.active.Load() == 0 })
		os.WriteFile(pad, []byte(large), 0o600)
		fill("c")
		os.Remove(pad)
		eq(t, "its end", p.get("/range | Range: bytes=599990-").body == bytesOf(600_000)[599_990:], true)
	}
}

// All at once for as long as PROXY_SOAK says, with an oracle for every byte.
func TestCacheSoak(t *testing.T) {
	d, err := time.ParseDuration(os.Getenv("PROXY_SOAK"))
	if err != nil {
		t.Skip("PROXY_SOAK does not say for how long, as 60s")
	}
	end := time.Now().Add(d)
	p, o := start(t, "-size", "10M")
	pages := []string{"max-age=2", "200", "max-age=1, stale-if-error=9", `ETag: "1"`, "Vary: Z"}
	for i := range 100 {
		o.put(fmt.Sprint("/", i), pages[i%5], bytesOf(i*i*200))
	}
	cut := p.to(script(t, "HTTP/1.1 200 OK | max-age=60 | Content-Length: 9\n\nhello\x00").host)
	requests := []string{"", "no-cache", "Z: 1", "Z: 2", "max-age=0"}
	together(32, func(int) {
		for time.Now().Before(end) {
			p.move(rand.N(10 * time.Millisecond))
			i := rand.IntN(100)
			path, body := fmt.Sprint("/", i), bytesOf(i*i*200)
			from := rand.IntN(len(body) + 1)
			switch rand.IntN(10) {
			case 0:
				eq(t, "a cut answer is cut", cut.get("/").err != nil, true)
			case 1: // who leaves before the answer, or in its midst
				w := p.dial()
				w.send("GET URL" + path)
				w.SetReadDeadline(time.Now().Add(rand.N(3 * time.Millisecond)))
				io.CopyN(io.Discard, w.in, int64(from))
				w.Close()
			case 2:
				p.ask("POST URL" + path + " | Content-Length: 5\n\nhello")
			case 3:
				os.Remove(p.file(path))
			case 4:
				got := p.get(fmt.Sprintf("%s | Range: bytes=%d-", path, from))
				want := map[int]string{200: body, 206: body[from:]}[got.status]
				eq(t, "a range", got.body == want && got.err == nil, true)
			default:
				got := p.get(path + " | " + requests[rand.IntN(len(requests))])
				eq(t, path, got.status == 200 && got.body == body && got.err == nil, true)
			}
		}
	})
}

// The tests of main.go: the command line and the end, who may ask and for what,
// the life of a request, tunnels, and what is said of it all.

// command makes the program ready to run in a directory of its own: it is this binary, see TestMain.
func command(t testing.TB, args ...string) *exec.Cmd {
	name, _ := os.Executable()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "PROXY_TEST_RUNS_MAIN=1", "CACHE_DIRECTORY=here")
	t.Cleanup(func() { cmd.Wait() })
	return cmd
}

// listening returns the address that the program says it listens on.
func listening(t testing.TB, stderr *buffer) (addr string) {
	eventually(t, "it listens", func() bool {
		_, said, found := strings.Cut(stderr.String(), "listening on ")
		addr, _, _ = strings.Cut(said, ", ")
		return found
	})
	return addr
}

func TestProgramCommandLine(t *testing.T) {
	t.Parallel()
	taken := listen(t, nil).host
	for args, want := range map[string]string{ // exit status, stdout; stderr
		"0 -nonsense":   `2 ; proxy: flag [^\n]* not defined: -nonsense \(proxy -h lists the flags\)\n`,
		"0 -files no":   `2 ; proxy: -files: open no: no such [^\n]* \(proxy -h lists the flags\)\n`,
		taken:           `1 ; proxy: listen [^\n]*: address already in use\n`,
		"-cache none":   `1 ; proxy: mkdir none: not a directory\n`,
		"-cache none/a": `1 ; proxy: mkdir none.*`,
		"0 -uses 2 -h":  `0 usage: proxy \[flags] \[port \| host:port]\n.*-allow .*-block .*-uses .*; `,
		"-version":      `0 proxy \S+ go\S+\n; `,
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
	dir := t.TempDir()
	os.WriteFile(filepath.Join(dir, "none"), []byte("# a:b\n\n"), 0o600)
	os.WriteFile(filepath.Join(dir, "one"), []byte("# who\n\nme:pass:word\n"), 0o600)
	os.WriteFile(filepath.Join(dir, "two"), []byte("a:b\nc:d\n"), 0o600)
	rules(t, func(args string) any {
		c, err := parseFlags(strings.Fields("-files= " + strings.ReplaceAll(args, "DIR", dir)))
		if err != nil {
			return err
		}
		store := c.caching
		return fmt.Sprint(c.address, " ", store.limit, " ", store.uses, " ", store.ttl, " ", c.auth)
	},
		rule{"defaults", "127.0.0.1:8899 1073741824 1 0s ", ""},
		rule{"behind the port too", "127.0.0.1:80 524288000 3 1h30m0s ",
			"-uses=3 80 -ttl 1h30m -size 500M"},
		rule{"IPv6", `\[::1]:80 5000 1 0s `, "[::1]:80 -size 5000"},
		rule{"nothing is kept", ":80 0 1 0s ", ":80 -size 0"},
		rule{"-auth", ":80 1073741824 1 0s bWU6cGFzczp3b3Jk",
			":80 -auth me:pass:word; -auth @DIR/one :80"},
		rule{"no flag", `flag .* not defined: -.*`, "-nonsense; -1"},
		rule{"no address", `neither a port nor host:port: .*`, "1.2.3.4; localhost:; http; 65536; +80"},
		rule{"two", `two addresses: 0 and 1`, "0 -uses 2 1"},
		rule{"no size", `.* -size: a size looks like 5000, 500M or 10G`,
			"-size 1X; -size 5KM; -size -1; -size 99999999999G; -size="},
		rule{"no number", `.*-uses.*`, "0 -uses 0; 0 -uses 1.5; 0 -uses"},
		rule{"no duration", `.* -ttl: a duration looks like 90s, 10m or 1h30m`, "-ttl 60 0; -ttl -1s"},
		rule{"no cache", `-cache must name a directory`, "-cache="},
		rule{"nobody", `.* -auth: it must .*`, "-auth=; -auth nobody; -auth @DIR/two; -auth @DIR/none"},
		rule{"no file", `.*: open no: no such file or directory`, "-auth @no; -files no; -deny @no"},
		rule{"no directory", `-files: open .*/none: not a directory`, "-files DIR/none"},
		rule{"no host", `.* -block: ".*" is .*`,
			"-block http://a/; -block 10.0.0.0/99; -block *.a; -block a:80"},
		rule{"no client", `.*-(allow|deny): ".*" is .*`, "-allow a.example; -deny @DIR/two"},
	)
}

// Who may ask, and for what. Inner addresses are for clients on this machine: services on it trust
// these, and at 169.254.169.254 are the credentials that a cloud has for the machine.
func TestProgramAdmits(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list")
	const list = "A.Example, ::ffff:192.0.2.7\r\n# b.example\n\n  # b.example\nd.example 10.0.0.0/8"
	os.WriteFile(file, []byte(list), 0o600)
	admits := func(name, flags, from, may, mayNot string) {
		c, err := parseFlags(strings.Fields("-files= -cache " + t.TempDir() + " " + flags))
		eq(t, "error", err, nil)
		p, err := newProxy(c, &net.TCPAddr{}, io.Discard)
		eq(t, "error", err, nil)
		for word := range strings.FieldsSeq(may + " " + mayNot) {
			t.Run(name+": "+word, func(t *testing.T) {
				req := &Request{Target: "/", Direct: true}
				if from != "" {
					req = &Request{Target: "/", URL: URL{net.JoinHostPort(word, "80"), "/"}}
				}
				client := &conn{peer: netip.MustParseAddr(cmp.Or(from, word))}
				err := (&exchange{proxy: p, client: client, req: req}).admit()
				eq(t, "admitted", err == nil, slices.Contains(strings.Fields(may), word))
			})
		}
	}
	// Without from, these are clients.
	admits("private networks may ask (RFC 1918, RFC 4193)", "", "",
		"127.0.0.1 127.9.9.9 ::1 10.1.2.3 172.16.0.1 172.31.9.9 192.168.0.1 169.254.7.7 fd00::1 fe80::1",
		"172.32.0.1 192.0.2.1 100.64.0.1 2001:db8::1 0.0.0.0")
	admits("-allow replaces these, not this machine", "-allow 192.0.2.0/24,2001:db8::/32", "",
		"192.0.2.1 2001:db8::1 127.0.0.1", "10.1.2.3 192.0.3.1 fd00::1")
	admits("-deny beats -allow", "-allow 10.0.0.0/8 -deny 10.1.0.0/16", "",
		"10.2.0.1", "10.1.0.1 192.168.0.1")
	admits("-deny beats the defaults, and this machine", "-deny 127.0.0.0/8 -deny 10.0.0.0/8", "",
		"::1 192.168.0.1", "127.0.0.1 10.1.2.3")
	admits("-block is not about clients", "-block 127.0.0.0/8,10.0.0.0/8", "", "127.0.0.1 10.1.2.3", "")
	// With it, they are what a client asks for.
	admits("a name, and all below it", "-block .A.example.", "::1", "example ba.example a.example.org",
		"a.example a.example. x.y.a.example x.a.example.")
	admits("several", "-block e.example,192.0.2.9 -block @"+file, "::1", "b.example 192.0.2.1",
		"a.example d.example e.example 192.0.2.7 192.0.2.9 10.9.9.9")
	admits("networks", "-block 192.0.2.0/24 -block [2001:DB8:0::1] -block fe80::1%eth0", "::1",
		"192.0.3.1 ::1 2001:db8::2", "192.0.2.1 192.0.2.255 2001:db8::1 fe80::1")
	admits("mapped ones", "-block ::ffff:192.0.2.0/120", "::1",
		"192.0.3.1", "192.0.2.1 ::ffff:192.0.2.1")
	admits("unspecified ones lead to this machine", "-block ::1", "::1", "127.0.0.1", "::1 0.0.0.0 ::")
	const inner = "127.0.0.1 127.9.9.9 ::1 0.0.0.0 :: 169.254.169.254 fe80::1 fd00:ec2::254 " +
		"100.100.100.200 168.63.129.16"
	const others = " 10.0.0.1 198.51.100.1 fd00::1 2001:db8::1"
	admits("this machine", "", "127.0.0.1", inner+others, "")
	admits("this machine by IPv6", "", "::1", inner+others, "")
	admits("another machine", "", "10.1.2.3", others, inner)
	admits("a neighbour", "", "fe80::1", others, inner)
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
			o := listen(t, func(c net.Conn, in *bufio.Reader) {
				readHead(in)
				io.WriteString(c, ok+coding+"\r\n6\r\nfirst \r\n")
				<-release
				io.WriteString(c, "4\r\nlast\r\n0\r\n\r\n")
			})
			cmd, stdout, stderr := command(t), new(buffer), new(buffer)
			cmd.Args = []string{"sh", "-c", strings.ReplaceAll(test.run, "PROXY", cmd.Path)}
			cmd.Path, cmd.Stdout, cmd.Stderr = "/bin/sh", stdout, stderr
			eq(t, "error", cmd.Start(), nil)
			p := &testProxy{t: t, addr: listening(t, stderr), host: o.host}
			match(t, "address", p.addr, test.address)
			p.dial()
			w := p.dial()
			w.send("GET URL/ HTTP/1.0")
			res, err := http.ReadResponse(w.in, nil)
			if err != nil {
				t.Fatal(err)
			}
			io.CopyN(io.Discard, res.Body, int64(len("first ")))
			for signal := range strings.FieldsSeq(test.signals) {
				exec.Command("sh", "-c", fmt.Sprint("kill -", signal, " ", cmd.Process.Pid)).Run()
				eventually(t, "it has stopped listening", func() bool {
					_, err := net.Dial("tcp", p.addr)
					return err != nil || test.name == "nohup" && signal == "HUP"
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
			logged := strings.Count(stdout.String(), "TCP_MISS/200")
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
	p, _ := start(t)
	p.cache.trimming.Lock() // the count at the start reads the clock, too
	p.cache.now = func() time.Time { panic("bad luck") }
	p.cache.trimming.Unlock()
	eq(t, "the client sees", p.say("GET URL/"), "")
	eventually(t, "it is told", func() bool { return strings.Contains(stderr.String(), "serveClient") })
	match(t, "stderr", stderr.String(), `[^\n]*a bug, .*: bad luck\ngoroutine .*`)
}

// A pausedWriter takes nothing until it is closed.
type pausedWriter chan bool

func (w pausedWriter) Write(p []byte) (int, error) {
	<-w
	return len(p), nil
}

// A terminal that is paused, or a full pipe, holds up nobody, and takes no memory.
func TestProgramPausedLog(t *testing.T) {
	p, _ := start(t)
	paused := make(pausedWriter)
	p.journal.writing.Lock()
	p.journal.to = paused
	p.journal.writing.Unlock()
	path := strings.Repeat("x", 60_000)
	for range maxUnwritten/60_000 + 20 {
		eq(t, "an answer", p.ask("GET http://127.0.0.1:1/"+path).status, 502)
	}
	p.journal.Lock()
	eq(t, "what waits is bounded", len(p.journal.out) < maxUnwritten+100_000, true)
	p.journal.Unlock()
	close(paused)
	eventually(t, "it goes on", func() bool {
		p.journal.Lock()
		defer p.journal.Unlock()
		return len(p.journal.out) == 0
	})
}

// A line of the log, as HOST's. What a client or an origin sends can't make another field or line.
func TestProgramLog(t *testing.T) {
	const page = "HTTP/1.1 200 OK | Content-Type: text/plain | Content-Length: 0 | " +
		"max-age=60, stale-if-error=600"
	proxy, _ := start(t, "-block", "blocked.example")
	o := script(t, page+` | ETag: "1"`, "HTTP/1.1 304 X", page+` | ETag: "2"`,
		"HTTP/1.1 503 X | Content-Length: 0", page)
	p := proxy.to(o.host)
	n := 0
	const asked, own = " - HIER_DIRECT/127.0.0.1 text/plain", " - HIER_NONE/- text/plain"
	rules(t, func(text string) any {
		request, wait, _ := columns(text)
		p.move(duration(wait))
		p.dial().Close() // who says nothing leaves no line
		p.ask(request)
		n++
		lines := p.lines(n)
		eq(t, "lines", len(lines), n)
		eq(t, "it is of now", lines[n-1][:10], p.cache.now().Unix())
		front := regexp.MustCompile(`^\d{10}\.\d{3} +\d+ 127\.0\.0\.1 (\S+) \d+ `)
		return strings.ReplaceAll(front.ReplaceAllString(lines[n-1], "$1 "), o.host, "HOST")
	},
		rule{"a miss", "TCP_MISS/200 GET http://HOST/a" + asked, "GET URL/a"},
		rule{"a hit", "TCP_(MEM_)?HIT/200 GET http://HOST/a" + own, "GET URL/a"},
		rule{"the client has it", "TCP_IMS_HIT/304 GET http://HOST/a" + own,
			`GET URL/a | If-None-Match: "1"`},
		rule{"renewed", "TCP_REFRESH_UNMODIFIED/200 GET http://HOST/a" + asked, "GET URL/a / 1m"},
		rule{"replaced", "TCP_REFRESH_MODIFIED/200 GET http://HOST/a" + asked, "GET URL/a / 1m"},
		rule{"stale", "TCP_REFRESH_FAIL_OLD/200 GET http://HOST/a" + asked, "GET URL/a / 1m"},
		rule{"as a server", "TCP_MISS/200 GET http://HOST/b" + asked, "GET /HOST/b"},
		rule{"reloaded", "TCP_CLIENT_REFRESH_MISS/200 GET http://HOST/b" + asked,
			"GET URL/b | no-cache"},
		rule{"only if cached", "TCP_MISS/504 GET http://HOST/c" + own, "GET URL/c | only-if-cached"},
		rule{"denied", "TCP_DENIED/403 GET http://blocked.example/" + own,
			"GET http://blocked.example/"},
		rule{"no origin", "TCP_MISS/502 POST http://127.0.0.1:1/" + own, "POST http://127.0.0.1:1/"},
		rule{"no tunnel", "TCP_MISS/502 CONNECT 127.0.0.1:1" + own, "CONNECT 127.0.0.1:1"},
		rule{"a tunnel", "TCP_TUNNEL/200 CONNECT HOST - HIER_DIRECT/127.0.0.1 -", "CONNECT HOST"},
		rule{"a page of our own", "NONE/200 GET /proxy.pac - HIER_NONE/- application/x-.*",
			"GET /proxy.pac"},
		rule{"no HTTP", "NONE/400 nonsense error:invalid-request" + own, "nonsense"},
	)
	sent := len(p.say("GET URL/d"))
	eq(t, "bytes that the client was sent", strings.Fields(p.lines(n + 1)[n])[4], sent)
	w := p.to(script(t, ok+"\r\n"+strings.Repeat("x", 32<<20)+"\x00").host).dial()
	w.send("GET URL/")
	readHead(w.in)
	w.Close()
	match(t, "a client that leaves", p.lines(n + 2)[n+1], `.* TCP_MISS_ABORTED/200 .*`)

	odd, _ := start(t)
	odd = odd.to(script(t, ok+"Content-Type: a\"b c\u009b31m\xff;x\r\nContent-Length: 0\r\n\r\n").host)
	for i, first := range []string{
		"GET URL/\"\u009b31m\xff\u2028", "GET URL/%0A%0D", "GET http://user:secret@HOST/",
		"GET URL/\x1b[31m", "GET URL/\r1 2 3", "GET URL/ a b", "GET /\"\u009b", "GET\x1b[31m URL/",
		"\"-\u009b URL/", "CONNECT HOST\"\u009b:1",
	} {
		odd.say(first + " HTTP/1.1\r\nHost: x\r\n\r\n")
		lines := odd.lines(i + 1)
		eq(t, first+" leaves lines", len(lines), i+1)
		match(t, first, lines[i], `\d+\.\d+ +\d+ [\d.]+ \w+/\d{3} \d+ [!-~]+ [!-~]+ - \w+/[!-~]+ [!-~]+`)
		eq(t, first+" leaves the password", strings.Contains(lines[i], "secret"), false)
	}
}

func TestProgramAuth(t *testing.T) {
	proxy, _ := start(t, "-auth", "me:pass:word")
	o := script(t, "HTTP/1.1 200 OK | max-age=60 | Content-Length: 0")
	p := proxy.to(o.host)
	const right, wrong = "Authorization: Basic bWU6cGFzczp3b3Jk", "Authorization: Basic bWU6cGFzczp3b3Jr"
	p.replies(t,
		rule{"a proxy asks (RFC 9110 §11.7.1)", "407 .*",
			"GET URL/; POST URL/; CONNECT HOST; GET URL/ | Proxy-" + wrong + "; CONNECT HOST | Proxy-" +
				wrong + "; GET URL/ | " + right + "; GET URL/ | Proxy-Authorization: Basic; " +
				"GET http://proxy.pac/; GET URL/ | Proxy-Authorization: Bearer bWU6cGFzczp3b3Jk"},
		rule{"it is told", "200, miss", "GET URL/ | Proxy-" + right},
		rule{"in any case", "200, hit", "GET URL/ | Proxy-Authorization:  basic   bWU6cGFzczp3b3Jk"},
		rule{"what is stored is not for others", "407 .*", "GET URL/"},
		rule{"a tunnel", "200", "CONNECT HOST | Proxy-" + right},
		rule{"a server asks, this machine too (RFC 9110 §11.6.1)", "401 .*",
			"GET /; GET / | " + wrong + "; GET / | Proxy-" + right + "; GET /file; GET /HOST/"},
		rule{"it is told", "200.*", "GET / | " + right + "; GET /HOST/a | " + right},
		rule{"proxy.pac is for browsers that do not know yet", "200 .*",
			"GET /proxy.pac; GET /proxy.pac?v=2"})
	eq(t, "another machine", p.from("10.1.2.3").ask("GET / | "+right).status, 200)
	asProxy, asServer := p.ask("GET http://a.example/"), p.ask("GET /")
	challenges := asProxy.Get("Proxy-Authenticate") + ", " + asServer.Get("WWW-Authenticate")
	eq(t, "challenges", challenges, `Basic realm="proxy", Basic realm="proxy"`)
	eq(t, "requests to the origin", strings.Count(o.got.String(), "Host:"), 2)
	eq(t, "credentials in them", strings.Contains(o.got.String(), "uthorization"), false)
}

// A proxy that is open to the network keeps nothing from inner addresses.
func TestProgramInnerAddresses(t *testing.T) {
	before, o := start(t)
	o.put("/a", "max-age=60", "inner")
	host := strings.Replace(o.host, "127.0.0.1", "localhost", 1)
	eq(t, "stored when it was not open", before.to(host).get("/a"), `200 "inner", miss`)
	proxy, _ := start(t, ":0", "-allow", "0.0.0.0/0,::/0", "-cache", before.dir)
	p := proxy.to(host)
	release := o.putSlowly("/slow", "max-age=60", "slow", 1)
	slow := p.from("::1").dial()
	slow.send("GET URL/slow")
	slow.in.Peek(1)
	for range 2 {
		eq(t, "this machine", p.from("127.0.0.1").get("/a"), `200 "inner", miss`)
	}
	pages := o.requests("/a")
	eq(t, "requests for a", len(pages), 3)
	eq(t, "none over an idle connection", pages[1].RemoteAddr != pages[2].RemoteAddr, true)

	const no = `403 ".* is for clients on this machine only\\n"`
	p.from("10.1.2.3").replies(t,
		rule{"what this machine has asked for", no, "GET URL/a; POST URL/a; GET /localhost:$PORT/a"},
		rule{"what it is asking for", no, "GET URL/slow"},
		rule{"anything else", no, "GET http://127.0.0.1:$PORT/; GET http://[::ffff:7f00:1]:$PORT/; " +
			"GET /127.0.0.1:$PORT/; CONNECT 0.0.0.0:$PORT; CONNECT HOST; GET http://169.254.169.254/a"},
		rule{"the status page without -auth", `403 "without -auth .*`, "GET /"},
		rule{"but proxy.pac", "200 .*", "GET /proxy.pac"})
	eq(t, "requests to the origin", o.count("/a")+o.count("/slow")+o.count("/"), 4)
	close(release)
	eq(t, "the slow one", slow.reply("GET"), `200 "slow", miss`)
}

func TestProgramBlocks(t *testing.T) {
	o := script(t, "HTTP/1.1 200 OK | max-age=60 | Content-Length: 0")
	before, _ := start(t)
	eq(t, "stored", before.to(o.host).get("/"), "200, miss")
	block := []string{"-block", "Example.COM,::1,fd00::/8", "-block", "127.0.0.0/8"}
	proxy, _ := start(t, append(block, "-cache", before.dir)...)
	p := proxy.to(o.host)
	rules(t, func(host string) any {
		asked, byPath := p.ask("GET http://"+host+"/"), p.ask("GET /"+host+"/")
		return fmt.Sprint(asked.status, byPath.status, p.ask("CONNECT "+host).status)
	},
		rule{"blocked by name", "403 403 403",
			"example.com:80; eXample.COM:1; example.com.:80; a.b.example.com.:8080"},
		rule{"blocked by address", "403 403 403", "127.0.0.1:$PORT; 127.9.9.9:$PORT; [0::1]:$PORT; " +
			"[FD00:1::1]:$PORT; [::ffff:127.0.0.1]:$PORT; [0:0:0:0:0:FFFF:7f00:1]:$PORT"},
		rule{"it leads there", "403 403 403", "localhost:$PORT; 0.0.0.0:$PORT; [::]:$PORT"},
		rule{"what it means is left to the system", "(403|404|502| )+",
			"127.0.0.1.:$PORT; 2130706433:$PORT; 0177.0.0.1:$PORT; 0x7f.0.0.1:$PORT; 127.1:$PORT"},
	)
	eq(t, "requests to the blocked", strings.Count(o.got.String(), "Host:"), 1)
}

// What a browser asks us as a server. A page elsewhere, at a name of its own
// that leads to this machine (DNS rebinding), must not read that.
func TestProgramServes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "f")
	const makeFiles = `mkdir -m 700 sub .git sub/.d; umask 22; printf out >../out; ln -s ../out link
		printf page.html >page.html; TZ=UTC touch -t 200109090146.40 page.html; ln -s page.html inside
		printf x.txt | tee 'two words' private group sub/x.txt .hidden .git/config sub/.d/x
		chmod 600 private; chmod 640 group`
	os.Mkdir(dir, 0o700)
	sh := exec.Command("sh", "-ec", makeFiles)
	sh.Dir = dir
	eq(t, "error", sh.Run(), nil)
	proxy, o := start(t, "-files", dir)
	p := proxy.to(proxy.addr)
	const none = `404 "there is neither a file nor a host for [^ ]*\\n"`
	p.replies(t,
		rule{"a file", `200 "page.html"`, "GET /page.html; GET /page.html?x; GET /inside"},
		rule{"a space, and a directory of mode 0700", `200 "x.txt"`, "GET /two%20words; GET /sub/x.txt"},
		rule{"a range", `206 "page" bytes 0-3/9`, "GET /page.html | Range: bytes=0-3"},
		rule{"unchanged", "304", "GET /page.html | If-Modified-Since: Sun, 09 Sep 2001 01:46:40 GMT"},
		rule{"no file", none,
			"POST /page.html; GET /sub; GET /sub/; GET /page%00.html; GET /page.htm%6; GET /no!host/x"},
		rule{"not for everybody", none, "GET /private; GET /group; GET /" + dir + "/group; " +
			"GET /.hidden; GET /%2ehidden; GET /.git/config; GET /sub/.d/x"},
		rule{"no way up", none,
			"GET /sub/../page.html; GET /sub/..%2fpage.html; GET /sub/..%5cpage.html; GET /../out; " +
				"GET /%2e%2e/out; GET /sub/%2e%2e/%2e%2e/out; GET /link"},
		rule{"Host names us", "200.*", "GET / | Host: 127.0.0.1:$PORT; GET / | Host: localhost:$PORT; " +
			"GET / | Host: LocalHost:$PORT; GET / | Host: [::1]:$PORT; GET / | Host: 127.0.0.9:$PORT"},
		rule{"it does not", "403 .*", "GET / | Host: a.example:$PORT; GET / | Host: 192.0.2.1:$PORT; " +
			"GET / | Host: localhost.a.example:$PORT; GET / | Host: localhost; " +
			"GET / | Host: 127.0.0.1:1; GET /proxy.pac | Host: a.example:$PORT; " +
			"OPTIONS * | Host: a.example:$PORT"},
		rule{"Host is none", "400 .*",
			"GET / | Host: user@localhost:$PORT; GET / | Host: localhost:$PORT,x"})
	match(t, "no Host", p.say("GET / HTTP/1.0\r\n\r\n"), `HTTP/1.1 403 .*\r\n\r\n\S.*`)
	head := p.ask("HEAD /page.html")
	eq(t, "HEAD", head.Get("Content-Length")+" "+head.Get("Content-Type"), "9 text/html; charset=utf-8")
	eq(t, "no script for others", head.Get("Cross-Origin-Resource-Policy"), "same-origin")
	eq(t, "a file, another machine", p.from("10.1.2.3").ask("GET /page.html").status, 404)
	pac := p.ask("GET /proxy.pac")
	eq(t, "proxy.pac", pac.Get("Content-Type"), "application/x-ns-proxy-autoconfig")
	match(t, "proxy.pac", pac.body, `function FindProxyForURL\(url, host\) .*"PROXY `+p.addr+`".*`)

	o.put("/a", "max-age=60", "stored")
	proxy.get("/a")
	name := strings.ReplaceAll(filepath.Base(proxy.file("/a")), "%", "%25")
	bare, _ := start(t)
	eq(t, "-files=", bare.ask("GET /main.go").status, 404)
	sharing, _ := start(t, "-files", proxy.dir)
	eq(t, "the cache", sharing.ask("GET /"+name).status, 404)
}

// To a browser, a page of /host/path has the origin of ours and of all that
// runs on this machine. So it is sandboxed, and cookies go neither way.
func TestProgramHostPath(t *testing.T) {
	proxy, o := start(t)
	const cookies = "Set-Cookie: session=2 | Set-Cookie2: a | Clear-Site-Data: b"
	raw := script(t, message("HTTP/1.1 103 Early Hints | Link: </x> | "+cookies)+
		message("HTTP/1.1 200 OK | max-age=60 | Content-Length: 4 | "+cookies+"\n\npage"))
	for _, request := range []string{
		"GET /HOST/a", "GET /HOST", "GET /user:pw@HOST?q=1#f", "POST /HOST/a", "GET URL/b",
	} {
		t.Run(request, func(t *testing.T) {
			w, want := proxy.to(raw.host).dial(), "sandbox .*"
			if request == "GET URL/b" {
				want = "session=2session=2ab"
			}
			early := w.ask(request + " | Cookie: session=1 | Authorization: Basic session")
			got := w.reply("GET")
			eq(t, "replies", fmt.Sprint(early, early.Get("Link"), " ", got), `103</x> 200 "page", miss`)
			told := early.Get("Set-Cookie") + got.Get("Set-Cookie") + got.Get("Set-Cookie2") +
				got.Get("Clear-Site-Data") + got.Get("Content-Security-Policy")
			match(t, "what the browser is told", told, want)
		})
	}
	const paths = `GET /a HTTP.*GET / HTTP.*GET /\?q=1 HTTP.*POST /a HTTP.*`
	match(t, "at the origin", raw.got.String(), paths)
	direct, _, _ := strings.Cut(raw.got.String(), "GET /b HTTP")
	eq(t, "what the origin is told", strings.Contains(direct, "session"), false)

	o.put("/a//b", "max-age=60", "a and b")
	eq(t, "first", proxy.ask("GET /HOST/a//b"), `200 "a and b", miss`)
	eq(t, "it is stored for all", proxy.get("/a//b"), `200 "a and b", hit`)
	again := proxy.ask("GET /HOST/a//b")
	eq(t, "again", again, `200 "a and b", hit`)
	match(t, "sandboxed too", again.Get("Content-Security-Policy"), "sandbox .*")
}

func TestProgramStatusPage(t *testing.T) {
	p, o := start(t)
	o.put("/a", "max-age=60", strings.Repeat("x", 3<<20))
	for range 4 {
		p.get("/a?secret")
	}
	p.get(`/<script>&"'`)
	for _, request := range []string{"GET /HOST/b", "GET /proxy.pac", "CONNECT HOST"} {
		p.ask(request)
	}
	p.lines(8)
	p.replies(t,
		rule{"views are not counted", "200.*", "HEAD /; GET /; GET /"},
		rule{"no page", "404 .*", "POST /"})
	page := p.ask("GET /")
	eq(t, "type", page.Get("Content-Type"), "text/html; charset=utf-8")
	for _, want := range []string{
		`: 8 requests, 37% of them [^;]*, 1 tunnels, 2 errors; 12.0 MiB sent, 9.0 MiB [^<]*cache\.`,
		`The cache holds 1 files, 3.0 of at most 1024.0 MiB`,
		`<h2>Busiest hosts of the last 8 requests</h2><table><tr><td>7<td>` + o.host + `</table>`,
		`<tr><td>2<td>TCP_MISS/404<tr><td>1<td>NONE/200<tr>`, // equal counts in order
		`<tr><td>\d+s ago<td>127.0.0.1<td>TCP_(MEM_)?HIT/200<td>\d+ ms<td>[^<]*<td>GET ` + o.URL + `/a<`,
		`<td>CONNECT ` + o.host + `<`,
		`<td>GET ` + o.URL + "/&lt;script&gt;&amp;%22&#39;<",
	} {
		match(t, "page", page.body, `.*`+want+`.*`)
	}
	for _, not := range []string{"secret", "<script", "src=", "GET /<"} {
		eq(t, "it has "+not, strings.Contains(page.body, not), false)
	}
	for range 40 {
		p.say("GET http://x/" + strings.Repeat("x/", 9999) + " HTTP/1.1\r\nHost: 1 2\r\n\r\n")
	}
	eq(t, "it stays small", len(p.ask("GET /").body) < 40<<10, true)
}

// RFC 9110 §9.3.6.
func TestProgramTunnels(t *testing.T) {
	p, _ := start(t)
	got := make(chan string, 1)
	w := p.to(listen(t, func(c net.Conn, in *bufio.Reader) {
		early, _ := in.ReadString('\n')
		io.WriteString(c, "got "+early)
		c.(*net.TCPConn).CloseWrite()
		rest, _ := io.ReadAll(in)
		got <- string(rest)
	}).host).dial()
	w.send("CONNECT HOST\n\nearly\n") // in one piece
	match(t, "head", readHead(w.in), `HTTP/1.1 200 [^\r]*\r\n\r\n`)
	eq(t, "the origin ends first", w.rest(), "got early\n")
	io.WriteString(w, "after that")
	w.Close()
	eq(t, "from the client", <-got, "after that")

	p.to(listen(t, func(c net.Conn, in *bufio.Reader) {
		io.Copy(io.Discard, in)
		io.WriteString(c, "bye")
	}).host).replies(t,
		rule{"the client ends first", `200 "bye"`, "CONNECT HOST"},
		rule{"refused", `502 "127.0.0.1:1: [^"]*refused\\n"`, "CONNECT 127.0.0.1:1"})
}

func TestProgramHops(t *testing.T) {
	p, _ := start(t)
	second, _ := start(t)
	p.to(p.addr).replies(t,
		rule{"a loop (RFC 9110 §7.6.3)", "508 .*", "GET URL/HOST/x; GET /HOST/; GET /HOST/HOST/x; " +
			"GET http://localhost:$PORT/localhost:$PORT/x; " +
			"GET http://[::ffff:127.0.0.1]:$PORT/127.0.0.1:$PORT/x"},
		// What comes back through a tunnel would seem to come from this machine.
		rule{"a tunnel to us", "508 .*", "CONNECT HOST; CONNECT localhost:$PORT; CONNECT 0.0.0.0:$PORT"})
	eq(t, "requests of loops", len(p.lines(13)), 13)
	o := script(t, "HTTP/1.1 200 OK | Content-Length: 3\n\nend")
	second.to(o.host).replies(t,
		rule{"two of ours (RFC 9110 §7.6.3)", `200 "end", miss`,
			"GET http://" + p.addr + "/HOST/0 | Host: " + p.addr + " | Via: 1.1 proxy, 1.0 b (proxy)"},
		rule{"it would echo cookies (RFC 9110 §9.3.8)", "405 .*", "TRACE URL/1"},
		rule{"the last hop (RFC 9110 §7.6.2)", "200", "OPTIONS URL/2 | Max-Forwards: 0; OPTIONS *"},
		rule{"before that", `200 "end", miss`,
			"OPTIONS URL | Max-Forwards: 10; OPTIONS URL/3 | Max-Forwards: x"},
		rule{"it does not count hops", `200 "end", miss`, "GET URL/4 | Max-Forwards: 0"},
		rule{"an unknown expectation (RFC 9110 §10.1.1)", "417 .*200-ok.*",
			"GET URL/5 | Expect: 200-ok"})
	seen := regexp.MustCompile(`(\S+) HTTP/|Max-Forwards: (\w+)`).FindAllString(o.got.String(), -1)
	const want = "[/0 HTTP/ * HTTP/ Max-Forwards: 9 /3 HTTP/ Max-Forwards: x /4 HTTP/ Max-Forwards: 0]"
	eq(t, "at the origin", seen, want)
	const via = `1\.1 proxy, 1\.0 b \(proxy\)\r\nVia: 1\.1 proxy-\w{6}\r\nVia: 1\.1 proxy-\w{6}\r\n`
	match(t, "Via", o.got.String(), `GET /0 HTTP/1\.1\r\nHost: [^\r]*\r\nVia: `+via+`.*`)
}

func BenchmarkHit(b *testing.B)  { benchCache(b, "max-age=9999", "/") }
func BenchmarkMiss(b *testing.B) { benchCache(b, "no-store", "/") }
func BenchmarkFill(b *testing.B) { benchCache(b, "max-age=9999", "/%d") }

// benchCache asks for 1,000 bytes on lasting connections over loopback, at the
// same path or at new ones.
func benchCache(b *testing.B, directive, path string) {
	p, _ := start(b)
	page := "HTTP/1.1 200 OK | " + directive + " | Content-Type: text/html | Content-Length: 1000\n\n"
	o := script(b, page+strings.Repeat("x", 1000))
	var n atomic.Int64
	head := strings.TrimSuffix("GET http://"+o.host+path, "%d")
	p.to(o.host).get("/")
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
			io.WriteString(w, head+anew+" HTTP/1.1\r\nHost: "+o.host+"\r\n\r\n")
			if readHead(w.in) == "" {
				b.Error("no answer")
				return
			}
			w.in.Discard(1000)
		}
	})
}
