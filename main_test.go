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
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
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
	config.now = func() time.Time { return time.Now().Add(time.Duration(p.ahead.Load())) }
	config.caching.now = config.now
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
	o := &origin{clock: p.now, pages: map[string]originPage{}, asked: map[string][]*http.Request{}}
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
	name := filepath.Join(p.dir, fileName(key{url: strings.TrimPrefix(url, "http://")}))
	eventually(p.t, name, func() bool { _, err := os.Stat(name); return err == nil })
	return name
}

func TestHarness(t *testing.T) {
	p := start(t)
	o := newOrigin(p)
	o.put("/a", "Cache-Control: max-age=60 | ETag: \"1\"", "hello")
	eq(t, "first", p.get(o.url("/a"), ""), `200 "hello", miss`)
	eq(t, "second", p.get(o.url("/a"), ""), `200 "hello", hit`)
	eq(t, "range", p.get(o.url("/a"), "Range: bytes=1-2"), `206 "el" bytes 1-2/5, hit`)
	p.move(61 * time.Second)
	eq(t, "renewed", p.get(o.url("/a"), ""), `200 "hello", renewed`)
	eq(t, "requests", o.count("/a"), 2)
	_ = runtime.NumGoroutine
}
