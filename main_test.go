package main

// Most tests see the program as its users do. The test binary runs itself again as the proxy, with a
// clock that the test moves, and stands on both sides of it: as clients and as origins, with net/http
// where that is enough and with bytes where those matter. The order is that of the code: the law, the
// program, the wire, the cache; then fuzzing and benchmarks. A soak and the long waits run only if
// PROXY_SOAK says for how long, as in PROXY_SOAK=60s go test -race -run 'Soak|Waits'.

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"go/format"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/textproto"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime/debug"
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

const patience = 10 * time.Second // for what takes milliseconds, on a busy machine too

func TestMain(m *testing.M) {
	if os.Getenv("PROXY_TEST_708") == "" {
		os.Exit(m.Run())
	}
	now = func() time.Time {
		offset, _ := os.ReadFile(os.Getenv("PROXY_TEST_CLOCK"))
		d, _ := time.ParseDuration(string(offset))
		return time.Now().Add(d)
	}
	main()
	os.Exit(0)
}

// A proxy is the program in a process of its own.
type proxy struct {
	t         testing.TB
	dir       string // where it runs
	cache     string // and keeps its files
	addr      string
	cmd       *exec.Cmd
	out, errs buffer
	offset    atomic.Int64 // of its clock
	transport *http.Transport
	ended     bool
}

// A buffer is what a process writes, to be read meanwhile.
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

func command(dir string, args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Dir = dir
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(s string) bool {
		return strings.HasPrefix(s, "CACHE_DIRECTORY=")
	}), "PROXY_TEST_708=1", "PROXY_TEST_CLOCK="+filepath.Join(dir, ".clock"))
	return cmd
}

func start(t testing.TB, flags ...string) *proxy { return startIn(t, t.TempDir(), flags...) }

func startIn(t testing.TB, dir string, flags ...string) *proxy {
	t.Helper()
	p := &proxy{t: t, dir: dir, cache: filepath.Join(dir, "cache"), cmd: command(dir, append(flags, "0")...)}
	if b, err := os.ReadFile(filepath.Join(dir, ".clock")); err == nil { // goes on where it was
		d, _ := time.ParseDuration(string(b))
		p.offset.Store(int64(d))
	}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.errs
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.stop)
	listening := regexp.MustCompile(`listening on (127\.0\.0\.1:\d+)`)
	eventually(t, "listening", func() bool {
		m := listening.FindStringSubmatch(p.errs.String())
		if m != nil {
			p.addr = m[1]
		}
		return m != nil
	})
	p.transport = &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 100,
		Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: p.addr})}
	t.Cleanup(p.transport.CloseIdleConnections)
	return p
}

// end sends a signal and waits: for a clean end, if it is one that asks for that.
func (p *proxy) end(sig os.Signal) {
	p.t.Helper()
	p.cmd.Process.Signal(sig)
	err := p.cmd.Wait()
	p.ended = true
	asked := sig == syscall.SIGTERM || sig == os.Interrupt
	if said := p.errs.String(); asked && err != nil || strings.Contains(said, "DATA RACE") {
		p.t.Errorf("%v ended by %v:\n%.8000s", err, sig, said)
	}
}

func (p *proxy) stop() {
	if !p.ended {
		p.end(syscall.SIGTERM)
	}
}

// restart ends the proxy and starts it again where it was.
func (p *proxy) restart(sig os.Signal, flags ...string) *proxy {
	p.t.Helper()
	p.end(sig)
	return startIn(p.t, p.dir, flags...)
}

// move turns the proxy's clock on; now and at tell its time, the latter with @ in the place of dates:
// @-60 is a minute ago.
func (p *proxy) move(seconds int) {
	d := time.Duration(p.offset.Add(int64(seconds) * int64(time.Second)))
	temp := filepath.Join(p.dir, ".clock.new")
	if err := os.WriteFile(temp, []byte(d.String()), 0o600); err != nil {
		p.t.Fatal(err)
	}
	os.Rename(temp, filepath.Join(p.dir, ".clock"))
}

func (p *proxy) now() time.Time { return time.Now().Add(time.Duration(p.offset.Load())) }

var dates = regexp.MustCompile(`@-?\d+`)

func (p *proxy) at(text string) string {
	return dates.ReplaceAllStringFunc(text, func(s string) string {
		seconds, _ := strconv.Atoi(s[1:])
		return p.now().Add(time.Duration(seconds) * time.Second).UTC().Format(http.TimeFormat)
	})
}

// split makes of "A: b | C: d" its fields.
func split(fields string) (list [][2]string) {
	for field := range strings.SplitSeq(fields, " | ") {
		if name, value, ok := strings.Cut(field, ":"); ok {
			list = append(list, [2]string{name, strings.TrimSpace(value)})
		}
	}
	return list
}

// An answer is what a client got; err says how it ended too early.
type answer struct {
	status int
	http.Header
	body string
	err  error
}

func (p *proxy) ask(method, url, fields, body string) (a answer) {
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return answer{err: err}
	}
	for _, f := range split(p.at(fields)) {
		req.Header.Add(f[0], f[1])
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	res, err := p.transport.RoundTrip(req.WithContext(ctx))
	if err != nil {
		return answer{err: err}
	}
	return whole(res)
}

func (p *proxy) get(url, fields string) answer { return p.ask("GET", url, fields, "") }

// whole reads an answer to its end.
func whole(res *http.Response) answer {
	b, err := io.ReadAll(res.Body)
	res.Body.Close()
	return answer{res.StatusCode, res.Header, string(b), err}
}

// A wire is a connection on which the test speaks itself.
type wire struct {
	net.Conn
	r *bufio.Reader
	t testing.TB
}

func (p *proxy) dial() *wire {
	p.t.Helper()
	return p.dialFrom("127.0.0.1")
}

func (p *proxy) dialFrom(ip string) *wire {
	p.t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
	c, err := d.Dial("tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(2 * patience))
	return &wire{c, bufio.NewReader(c), p.t}
}

func (w *wire) say(text string) { io.WriteString(w, text) }

// answer reads one answer to a request of a method.
func (w *wire) answer(method string) answer {
	res, err := http.ReadResponse(w.r, &http.Request{Method: method})
	if err != nil {
		return answer{err: err}
	}
	return whole(res)
}

func (w *wire) rest() string {
	b, _ := io.ReadAll(w.r)
	return string(b)
}

// say sends text on a new connection and returns all that comes back until it is closed.
func (p *proxy) say(text string) string {
	p.t.Helper()
	w := p.dial()
	defer w.Close()
	go w.say(text) // what is refused may not be read to its end
	return w.rest()
}

// A reply is what a site answers to a path: do, or the fields and the body, or 304 where that is asked.
type reply struct {
	status       int
	fields, body string
	do           http.HandlerFunc
}

// A site is an origin that counts who asks for what.
type site struct {
	*httptest.Server
	p     *proxy
	host  string
	mu    sync.Mutex
	pages map[string]reply
	asked map[string][]*http.Request
	last  map[string]int // status
}

func serve(p *proxy) *site {
	s := &site{p: p, pages: map[string]reply{}, asked: map[string][]*http.Request{}, last: map[string]int{}}
	s.Server = httptest.NewServer(s)
	s.host = s.Listener.Addr().String()
	p.t.Cleanup(s.CloseClientConnections)
	return s
}

func (s *site) put(path, fields, body string) { s.set(path, reply{200, fields, body, nil}) }

func (s *site) set(path string, r reply) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.fields = s.p.at(r.fields)
	s.pages[path] = r
}

func (s *site) url(path string) string { return "http://" + s.host + path }

func (s *site) count(path string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.asked[path])
}

// request is the latest for a path.
func (s *site) request(path string) *http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked[path][len(s.asked[path])-1]
}

func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, _ := io.ReadAll(r.Body)
	r.Body = io.NopCloser(bytes.NewReader(b))
	s.mu.Lock()
	page, path := s.pages[r.URL.Path], r.URL.Path
	s.asked[path] = append(s.asked[path], r)
	s.mu.Unlock()
	if page.do != nil {
		page.do(w, r)
		return
	}
	h := w.Header()
	h.Set("Date", s.p.at("@0"))
	h.Set("Content-Type", "text/plain")
	for i, f := range split(page.fields) {
		if name := http.CanonicalHeaderKey(f[0]); i == 0 || name == "Date" {
			h.Set(name, f[1])
		} else {
			h.Add(name, f[1])
		}
	}
	etag, changed := h.Get("ETag"), h.Get("Last-Modified")
	status := cmp.Or(page.status, 404)
	if inm := r.Header.Get("If-None-Match"); inm != "" && inm == etag ||
		inm == "" && changed != "" && r.Header.Get("If-Modified-Since") == changed {
		status = 304
	}
	s.mu.Lock()
	s.last[path] = status
	s.mu.Unlock()
	if w.WriteHeader(status); status != 304 {
		io.WriteString(w, page.body)
	}
}

// outcome asks for a path and tells where the answer came from: "hit", "304" if the origin was asked
// whether it is still good, "miss" if it was asked for all of it.
func (s *site) outcome(path, fields string) (string, answer) {
	before := s.count(path)
	a := s.p.get(s.url(path), fields)
	switch s.mu.Lock(); {
	case len(s.asked[path]) == before:
		defer s.mu.Unlock()
		return "hit", a
	case s.last[path] == 304:
		defer s.mu.Unlock()
		return "304", a
	}
	s.mu.Unlock()
	return "miss", a
}

// A rawSite is an origin that speaks bytes.
type rawSite struct {
	host  string
	got   buffer // all that came
	conns atomic.Int64
}

// listen starts an origin that calls talk for each connection.
func listen(t testing.TB, address string, talk func(c net.Conn, r *bufio.Reader)) *rawSite {
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { l.Close() })
	s := &rawSite{host: l.Addr().String()}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.conns.Add(1)
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(3 * patience))
				talk(c, bufio.NewReader(io.TeeReader(c, &s.got)))
			}()
		}
	}()
	return s
}

// script starts an origin that answers one head after the other, of all connections, with one text
// after the other, and the last for good. After one that ends in "\x00" it closes the connection.
func script(t testing.TB, texts ...string) *rawSite {
	var n atomic.Int64
	return listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) {
		for head(r) != "" {
			text := texts[min(int(n.Add(1)), len(texts))-1]
			text, closes := strings.CutSuffix(text, "\x00")
			if io.WriteString(c, text); closes {
				return
			}
		}
	})
}

// head reads up to an empty line.
func head(r *bufio.Reader) (text string) {
	for !strings.HasSuffix(text, "\r\n\r\n") {
		line, err := r.ReadString('\n')
		if err != nil {
			return ""
		}
		text += line
	}
	return text
}

// request is the head of a GET that ends its connection, with more fields.
func request(url, fields string) string {
	host, _, _ := strings.Cut(strings.TrimPrefix(url, "http://"), "/")
	return "GET " + url + " HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n" + fields + "\r\n"
}

func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * patience); !done(); time.Sleep(3 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func eq[T any](t testing.TB, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: got %.2000s, want %.2000s", what, fmt.Sprint(got), fmt.Sprint(want))
	}
}

// match checks a text against an expression that has to fit all of it.
func match(t testing.TB, what, text, expr string) {
	t.Helper()
	if !regexp.MustCompile(`^(?s:` + expr + `)$`).MatchString(text) {
		t.Errorf("%s: %.2000q does not match %s", what, text, expr)
	}
}

// together runs f n times at once and waits for all.
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

// racing tells whether the race detector is on: it takes memory and time.
var racing = sync.OnceValue(func() bool {
	info, _ := debug.ReadBuildInfo()
	return slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
})

// The law.

func TestLaw(t *testing.T) {
	law := []string{"cache.go", "go.mod", "main.go", "main_test.go", "README.md", "request.go"}
	here := list(".")
	for _, name := range law {
		eq(t, name+" is there", slices.Contains(here, name), true)
	}
	packages, _ := filepath.Glob("*/*.go")
	code := slices.DeleteFunc(append(here, packages...), func(name string) bool {
		return !strings.HasSuffix(name, ".go") || strings.HasPrefix(name, "cache/")
	})
	tracked, _ := exec.Command("git", "ls-files").Output() // what else lies about is nobody's business
	for _, name := range append(code, strings.Fields(string(tracked))...) {
		if name[0] != '.' && !slices.Contains(append(law, "LICENSE"), name) {
			t.Errorf("%s is not one of the files", name)
		}
	}
	// The law is less than 1,000 lines in all and 400 a file at most. The code does not keep it: until it
	// does, these ceilings keep it from growing.
	ceilings := map[string]int{"main.go": 730, "cache.go": 599, "request.go": 510}
	total := 0
	for _, name := range []string{"main.go", "request.go", "cache.go", "main_test.go"} {
		source, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if formatted, err := format.Source(source); err != nil || !bytes.Equal(source, formatted) {
			t.Errorf("%s: not as gofmt has it (%v)", name, err)
		}
		for i, line := range strings.Split(string(source), "\n") {
			if n := len([]rune(strings.ReplaceAll(line, "\t", "    "))); n > 110 {
				t.Errorf("%s:%d: %d columns", name, i+1, n)
			}
		}
		if name == "main_test.go" {
			continue
		}
		lines := bytes.Count(source, []byte("\n"))
		if total += lines; lines > ceilings[name] {
			t.Errorf("%s: %d lines, more than it had", name, lines)
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, source, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range file.Imports {
			forbidden(t, strings.Trim(i.Path.Value, `"`))
		}
	}
	t.Logf("%d lines in all", total)
	if mod, _ := os.ReadFile("go.mod"); bytes.Contains(mod, []byte("require")) {
		t.Error("go.mod requires something")
	}
	deps, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Skip("go list: ", err)
	}
	for path := range strings.FieldsSeq(string(deps)) {
		forbidden(t, path)
	}
}

func forbidden(t *testing.T, path string) {
	dotted := strings.Contains(strings.Split(path, "/")[0], ".")
	if dotted || slices.Contains([]string{"net/http", "net/url", "net/textproto"}, path) {
		t.Errorf("imports %s", path)
	}
}

// The program.

func TestExitStatus(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	dir := t.TempDir()
	os.WriteFile(filepath.Join(dir, "file"), nil, 0o600)
	for _, test := range []struct {
		args   string
		status int
		names  string // what the message names
	}{
		{"-h", 0, "-cache"},
		{"-help", 0, "-uses"},
		{"-nonsense", 2, "nonsense"},
		{"http", 2, "http"},
		{"65536", 2, "65536"},
		{"+80", 2, `\+80`},
		{"-1", 2, "1"},
		{"1.2.3.4", 2, "1.2.3.4"},
		{"localhost:", 2, "localhost"},
		{"0 0", 2, "address"},
		{"-size 1X 0", 2, "1X"},
		{"-size 5KM 0", 2, "5KM"},
		{"-size -1 0", 2, "-1"},
		{"-size 99999999999G 0", 2, "99999999999G"},
		{"0 -uses 0", 2, "uses"},
		{"0 -uses", 2, "uses"},
		{"-ttl -1s 0", 2, "ttl"},
		{"-ttl 5 0", 2, "ttl"},
		{"-cache= 0", 2, "cache"},
		{"-auth nobody 0", 2, "auth"},
		{"-auth @file 0", 2, "auth"},
		{"-block a/b 0", 2, "a/b"},
		{"-block 10.0.0.0/99 0", 2, "-block .*10.0.0.0/99"},
		{"-block *.example 0", 2, `-block .*\*.example`},
		{taken.Addr().String(), 1, "in use"},
		{"-cache file/cache 0", 1, "mkdir file"},
		{"-cache file 0", 1, "file"},
	} {
		cmd := command(dir, strings.Fields(test.args)...)
		var said bytes.Buffer
		cmd.Stderr = &said
		timer := time.AfterFunc(patience, func() { cmd.Process.Kill() })
		out, _ := cmd.Output()
		timer.Stop()
		eq(t, test.args+": status", cmd.ProcessState.ExitCode(), test.status)
		eq(t, test.args+": stdout", string(out), "")
		if match(t, test.args, said.String(), `.*`+test.names+`.*`); test.status > 0 {
			match(t, test.args+": one sentence", said.String(), `proxy: [^\n]+\n`)
		}
	}
}

func TestFlagsBeforeAndAfterThePort(t *testing.T) {
	t.Parallel()
	for _, args := range []string{"-cache here -uses 2 0", "0 -cache here -uses 2", "-cache=here 0 -uses=2",
		":0 -cache here -uses 2", "-cache here localhost:0 -uses 2"} {
		dir, said := t.TempDir(), new(buffer)
		cmd := command(dir, strings.Fields(args)...)
		cmd.Stderr = said
		cmd.Start()
		eventually(t, args, func() bool { return strings.Contains(said.String(), "listening on ") })
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v: %s", args, err, said)
		}
		address := `127\.0\.0\.1:`
		if args[0] == ':' {
			address = `\[::\]:` // a bare port is for this machine only, this one is for all
		}
		match(t, args, said.String(), `.*listening on `+address+`.*`)
		if info, err := os.Stat(filepath.Join(dir, "here")); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s: cache directory %v, %v", args, info, err)
		}
	}
}

func TestStopLetsExchangesFinish(t *testing.T) {
	t.Parallel()
	for _, sig := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		p := start(t)
		o := serve(p)
		release := make(chan bool)
		o.set("/slow", reply{do: func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "first ")
			w.(http.Flusher).Flush()
			<-release
			io.WriteString(w, "last")
		}})
		idle := p.dial() // does not hold it up
		defer idle.Close()
		w := p.dial()
		w.say("GET " + o.url("/slow") + " HTTP/1.1\r\nHost: x\r\n\r\n")
		eventually(t, "under way", func() bool { return o.count("/slow") == 1 })
		p.cmd.Process.Signal(sig)
		eventually(t, "no longer listening", func() bool {
			c, err := net.Dial("tcp", p.addr)
			if err == nil {
				c.Close()
			}
			return err != nil
		})
		close(release)
		began := time.Now()
		a := w.answer("GET")
		eq(t, "body", a.body, "first last")
		p.end(sig)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("it took %v to stop", took)
		}
		match(t, "totals", p.errs.String(), `.*\nproxy: 1 request[^\n]*\n`)
		match(t, "log", p.out.String(), `[^\n]*TCP_MISS/200[^\n]*\n`)
	}
	p := start(t)
	o := listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) {
		head(r)
		io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
		r.ReadByte()
	})
	w := p.dial()
	w.say("GET http://" + o.host + "/ HTTP/1.0\r\n\r\n")
	head(w.r)
	w.r.Discard(5)
	p.end(syscall.SIGKILL)
	if _, err := w.r.ReadByte(); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a client of HTTP/1.0 sees no cut where the proxy was killed, but %v", err)
	}
}

var logLine = regexp.MustCompile(
	`^(\d+\.\d{3}) +\d+ 127\.0\.0\.1 ([A-Z_]+/\d{3}) (\d+) ([!-~]+ [!-~]+) - ([A-Z_]+/[!-~]+ [!-~]+)$`)

// logged waits for the nth line of the access log.
func (p *proxy) logged(n int) []string {
	p.t.Helper()
	var lines []string
	eventually(p.t, fmt.Sprintf("line %d of the log", n), func() bool {
		lines = strings.Split(p.out.String(), "\n")
		return len(lines) > n
	})
	m := logLine.FindStringSubmatch(lines[n-1])
	if m == nil || len(lines) > n+1 {
		p.t.Fatalf("malformed line %d of %d: %q", n, len(lines)-1, lines[n-1])
	}
	return m
}

func TestAccessLog(t *testing.T) {
	t.Parallel()
	p := start(t, "-block", "blocked.example")
	o := serve(p)
	b, dead := o.url("/b"), refusing(t)
	const plain = "Cache-Control: max-age=60"
	o.put("/a", plain+`, stale-if-error=600 | ETag: "1"`, "a")
	o.put("/b", plain, "b")
	o.set("/endless", reply{do: func(w http.ResponseWriter, r *http.Request) {
		for err := error(nil); err == nil; _, err = w.Write(make([]byte, 64<<10)) {
		}
	}})
	get := func(path, fields string) func() { return func() { p.get(o.url(path), fields) } }
	say := func(text string) func() { return func() { p.say(text) } }
	stored := `(HIT|MEM_HIT)/200 GET URL/a HIER_NONE/- text/plain`
	asked := ` HIER_DIRECT/127.0.0.1 `
	for i, step := range []struct {
		do   func()
		want string
	}{
		{get("/a", ""), `TCP_MISS/200 GET URL/a` + asked + `text/plain`},
		{get("/a", ""), `TCP_` + stored},
		{get("/a", `If-None-Match: "1"`), `TCP_IMS_HIT/304 GET URL/a HIER_NONE/- text/plain`},
		{func() { p.move(62); get("/a", "")() }, `TCP_REFRESH_UNMODIFIED/200 GET URL/a` + asked +
			`text/plain`},
		{func() { p.move(62); o.put("/a", plain+`, stale-if-error=600 | ETag: "2"`, "A"); get("/a", "")() },
			`TCP_REFRESH_MODIFIED/200 GET URL/a` + asked + `text/plain`},
		{func() { p.move(62); o.set("/a", reply{503, "", "", nil}); get("/a", "")() },
			`TCP_REFRESH_FAIL_OLD/200 GET URL/a` + asked + `text/plain`},
		{get("/b", ""), `TCP_MISS/200 GET URL/b` + asked + `text/plain`},
		{get("/b", "Cache-Control: no-cache"), `TCP_CLIENT_REFRESH_MISS/200 GET URL/b` + asked +
			`text/plain`},
		{get("/c", "Cache-Control: only-if-cached"), `TCP_MISS/504 GET URL/c HIER_NONE/- text/plain`},
		{func() { p.ask("POST", b, "", "x") }, `TCP_MISS/200 POST URL/b` + asked + `text/plain`},
		{say(request("http://"+dead+"/", "")), `TCP_MISS/502 GET http://DEAD/ HIER_NONE/- text/plain`},
		{say("CONNECT " + dead + " HTTP/1.1\r\nHost: x\r\n\r\n"),
			`TCP_MISS/502 CONNECT DEAD HIER_NONE/- text/plain`},
		{func() {
			w := p.dial()
			w.say("CONNECT " + o.host + " HTTP/1.1\r\nHost: x\r\n\r\n")
			head(w.r)
			w.Close()
		},
			`TCP_TUNNEL/200 CONNECT HOST HIER_DIRECT/127.0.0.1 -`},
		{get("//../b c\"", ""), `TCP_MISS/404 GET URL//../b%20c%22` + asked + `text/plain`},
		{say(request("http://blocked.example/", "")),
			`TCP_DENIED/403 GET http://blocked.example/ HIER_NONE/- text/plain`},
		{say("GET / HTTP/1.1\r\nHost: " + p.addr + "\r\nConnection: close\r\n\r\n"),
			`NONE/200 GET / HIER_NONE/- text/html`},
		{say("nonsense\r\n\r\n"), `NONE/400 (-|nonsense) error:invalid-request HIER_NONE/- text/plain`},
		{func() { w := p.dial(); w.say(request(o.url("/endless"), "")); head(w.r); w.Close() },
			`TCP_MISS_ABORTED/200 GET URL/endless` + asked + `[a-z/-]+`},
		{func() { p.dial().Close(); p.get(b, "") }, `TCP_MISS/200 GET URL/b` + asked + `text/plain`},
		// one line
	} {
		step.do()
		m := p.logged(i + 1)
		want := strings.NewReplacer("URL", "http://"+o.host, "HOST", o.host, "DEAD", dead).Replace(step.want)
		match(t, "line", m[2]+" "+m[4]+" "+m[5], want)
		stamp, _ := strconv.ParseFloat(m[1], 64)
		if ago := p.now().Sub(time.UnixMilli(int64(stamp * 1000))); ago < -time.Second || ago > patience {
			t.Errorf("%s is logged %v ago", step.want, ago)
		}
	}
	n := strings.Count(p.out.String(), "\n")
	size := len(p.say(request(b, "")))
	eq(t, "bytes sent", p.logged(n + 1)[3], strconv.Itoa(size))
}

// refusing is an address where nobody listens.
func refusing(t testing.TB) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestLogLinesCannotBeForged(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := script(t, "HTTP/1.1 200 OK\r\nContent-Type: a\"b c\u009b31m\xff;x\r\nContent-Length: 0\r\n\r\n")
	for i, line := range []string{
		"GET http://ORIGIN/\"\u009b31m\xff\u2028 HTTP/1.1",
		"GET http://ORIGIN/%0A%0D HTTP/1.1",
		"GET\x1b[31m http://ORIGIN/ HTTP/1.1",
		"GET http://ORIGIN/\x1b[31m HTTP/1.1",
		"GET http://ORIGIN/\r1 2 3 HTTP/1.1",
		"GET http://ORIGIN/ a b HTTP/1.1",
		"\"-\u009b http://ORIGIN/ HTTP/1.1",
		"GET http://user:secret@ORIGIN/ HTTP/1.1",
		"CONNECT ORIGIN\"\u009b:1 HTTP/1.1",
		"GET /\"\u009b HTTP/1.1",
	} {
		p.say(strings.ReplaceAll(line, "ORIGIN", o.host) + "\r\nHost: x\r\nConnection: close\r\n\r\n")
		p.logged(i + 1)
	}
}

func TestAuth(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	os.WriteFile(filepath.Join(dir, "secret"), []byte("me:pass:word\n"), 0o600)
	p := startIn(t, dir, "-auth", "@secret")
	o := script(t, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nCache-Control: max-age=60\r\n\r\n")
	const right, wrong = ": Basic bWU6cGFzczp3b3Jk\r\n", ": Basic bWU6cGFzczp3b3Jr\r\n" // me:pass:word, work
	const Proxy, Own = "Proxy-Authorization", "Authorization"
	for _, test := range []struct {
		line, fields string
		status       int
	}{
		{"GET http://ORIGIN/ HTTP/1.1", "", 407},
		{"GET http://ORIGIN/ HTTP/1.1", Proxy + wrong, 407},
		{"GET http://ORIGIN/ HTTP/1.1", Proxy + ": Basic\r\n", 407},
		{"GET http://ORIGIN/ HTTP/1.1", Proxy + ": Bearer bWU6cGFzczp3b3Jk\r\n", 407},
		{"GET http://ORIGIN/ HTTP/1.1", Own + right, 407},
		{"POST http://ORIGIN/ HTTP/1.1", "Content-Length: 0\r\n", 407},
		{"CONNECT ORIGIN HTTP/1.1", "", 407},
		{"CONNECT ORIGIN HTTP/1.1", Proxy + wrong, 407},
		{"GET / HTTP/1.1", "", 401},
		{"GET / HTTP/1.1", Own + wrong, 401},
		{"GET / HTTP/1.1", Proxy + right, 401},
		{"GET /secret HTTP/1.1", "", 401},
		{"GET /ORIGIN/ HTTP/1.1", "", 401},
		{"GET /proxy.pac HTTP/1.1", "", 200},
		{"POST /proxy.pac HTTP/1.1", "", 200}, // and not the like of http://proxy.pac/
		{"GET / HTTP/1.1", Own + right, 200},
		{"GET /ORIGIN/a HTTP/1.1", Own + right, 200},
		{"GET http://ORIGIN/ HTTP/1.1", Proxy + right, 200},
		{"GET http://ORIGIN/ HTTP/1.1", Proxy + ":   basic bWU6cGFzczp3b3Jk\r\n", 200},
		{"GET http://ORIGIN/ HTTP/1.1", "", 407}, // what is stored is not for others
		{"CONNECT ORIGIN HTTP/1.1", Proxy + right, 200},
	} {
		before := o.got.String()
		w := p.dial()
		w.say(strings.ReplaceAll(test.line, "ORIGIN", o.host) + "\r\nHost: " + p.addr + "\r\n" +
			test.fields + "\r\n")
		res, err := http.ReadResponse(w.r, nil)
		if err != nil || res.StatusCode != test.status {
			t.Errorf("%s %s: %v %v, want %d", test.line, test.fields, res, err, test.status)
			continue
		}
		challenge := map[int]string{401: "WWW-Authenticate", 407: "Proxy-Authenticate"}[test.status]
		if challenge != "" {
			match(t, test.line, res.Header.Get(challenge), `Basic realm=.+`)
			eq(t, test.line+test.fields+": bytes at the origin", o.got.String(), before)
		}
		w.Close()
	}
	if got := o.got.String(); !strings.Contains(got, "GET") || strings.Contains(got, "bWU6") {
		t.Errorf("what reached the origin: %q", got)
	}
}

func TestBlock(t *testing.T) {
	t.Parallel()
	stored := start(t)
	o := script(t, "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: 0\r\n\r\n")
	other := listen(t, "127.0.0.2:0", func(c net.Conn, r *bufio.Reader) { head(r) })
	_, port, _ := net.SplitHostPort(o.host)
	_, port2, _ := net.SplitHostPort(other.host)
	stored.get("http://localhost:"+port+"/", "")
	os.WriteFile(filepath.Join(stored.dir, "list"),
		[]byte("Example.COM, ::ffff:127.0.0.2/128\n127.0.0.1/32\r\n\n::1 fd00::/8 127.0.1.0/24"), 0o600)
	p := stored.restart(syscall.SIGTERM, "-block", "@list")
	reached := o.got.String()
	for host, want := range map[string]string{
		"example.com": "403", "EXAMPLE.com": "403", "example.com.": "403", "a.b.eXample.com": "403",
		"example.com:8080": "403", "a.example.com.": "403",
		"notexample.com": "502", "example.com.invalid": "502", // 502: asked for in vain, but asked
		"127.0.0.2": "403", "127.0.1.77": "403", "127.0.2.77": "502",
		"127.0.0.2.": "403|400|502", "[::ffff:127.0.0.2]": "403", "[::ffff:7f00:2]": "403",
		"[::FFFF:7F00:0002]":      "403",
		"[0:0:0:0:0:ffff:7f00:2]": "403", "[::1]": "403", "[0::1]": "403", "[fd00::1]": "403",
		"[::ffff:127.0.1.7]": "403",
		"2130706434":         "403|400|502", "0177.0.0.2": "403|400|502", "127.2": "403|400|502",
		"0x7f.0.0.2":         "403|400|502",
		"localhost:" + port:  "403",         // leads to a blocked address, and is in the cache
		"LocalHost.:" + port: "403|400|502", // likewise
	} {
		full := host
		if !regexp.MustCompile(`:\d+$`).MatchString(host) || strings.HasSuffix(host, "]") {
			full += ":" + port2
		}
		for _, head := range []string{"GET http://%s/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
			"CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\n", "GET /%s/ HTTP/1.1\r\nHost: " + p.addr +
				"\r\nConnection: close\r\n\r\n"} {
			w := p.dialFrom("127.0.0.3")
			w.say(fmt.Sprintf(head, full))
			expect := want
			if head[5] == '%' {
				expect = strings.Replace(want, "502", "502|404", 1)
			}
			if a := w.answer("GET"); !slices.Contains(strings.Split(expect, "|"), strconv.Itoa(a.status)) {
				t.Errorf(head+": %d %s, want %s", full, a.status, a.body, expect)
			}
		}
	}
	eq(t, "connections to a blocked address", other.conns.Load(), 0)
	eq(t, "bytes to a blocked address", o.got.String(), reached)
	eq(t, "a blocked client", p.dial().answerTo(request("http://127.0.2.77/", "")).status, 403)
}

func (w *wire) answerTo(text string) answer {
	w.say(text)
	return w.answer(strings.Fields(text)[0])
}

func TestDirectRequests(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, sub := range []string{"sub", ".git", "sub/.hidden", "127.0.0.1:1"} {
		os.Mkdir(filepath.Join(dir, sub), 0o700)
	}
	for _, name := range []string{"hello.html", "two words", ".secret", "sub/x.txt", ".git/config",
		"sub/.hidden/x"} {
		os.WriteFile(filepath.Join(dir, name), []byte("file "+name), 0o600)
	}
	outside := filepath.Join(t.TempDir(), "outside")
	os.WriteFile(outside, []byte("outside"), 0o600)
	os.Symlink(outside, filepath.Join(dir, "link"))
	p := startIn(t, dir)
	bare := start(t, "-files", "")
	o := serve(p)
	o.put("/", "", "root")
	o.put("/a//b", "Cache-Control: max-age=60", "a and b")
	_, port, _ := net.SplitHostPort(p.addr)
	for _, test := range []struct {
		path, host string
		status     int
		body       string
	}{
		{"/", "HOST", 200, `<!DOCTYPE html>.*`},
		{"/", "localhost:" + port, 200, `<!DOCTYPE html>.*`},
		{"/", "[::1]:" + port, 200, `<!DOCTYPE html>.*`},
		{"/proxy.pac", "localhost:" + port, 200, `function FindProxyForURL\(.*PROXY localhost:` + port +
			`.*`},
		{"/hello.html", "HOST", 200, `file hello.html`},
		{"/hello.html?x", "HOST", 200, `file hello.html`},
		{"/two%20words", "HOST", 200, `file two words`},
		{"/sub/x.txt", "HOST", 200, `file sub/x.txt`},
		{"/sub", "HOST", 404, `[^\n]+\n`},
		{"/sub/", "HOST", 404, `[^\n]+\n`},
		{"/.secret", "HOST", 404, `[^\n]+\n`},
		{"/%2esecret", "HOST", 404, `[^\n]+\n`},
		{"/.git/config", "HOST", 404, `[^\n]+\n`},
		{"/sub/.hidden/x", "HOST", 404, `[^\n]+\n`},
		{"/sub/../.secret", "HOST", 404, `[^\n]+\n`},
		{"/sub/..%2f.secret", "HOST", 404, `[^\n]+\n`},
		{"/sub/..%5c.secret", "HOST", 404, `[^\n]+\n`},
		{"/../../../../../../../etc/passwd", "HOST", 404, `[^\n]+\n`},
		{"/sub/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "HOST", 404, `[^\n]+\n`},
		{"//etc/passwd", "HOST", 404, `[^\n]+\n`},
		{"/link", "HOST", 404, `[^\n]+\n`},
		{"/no!host/x", "HOST", 404, `[^\n]+\n`},
		{"/nosuch.invalid/x", "HOST", 404, `[^\n]+\n`},
		{"/hello%00.html", "HOST", 404, `[^\n]+\n`},
		{"/hello.html", "evil.example:" + port, 403, `[^\n]+\n`},
		{"/", "evil.example", 403, `[^\n]+\n`},
		{"/", "localhost", 403, `[^\n]+\n`},
		{"/", "127.0.0.1:1", 403, `[^\n]+\n`},
		{"/", "192.0.2.1:" + port, 403, `[^\n]+\n`},
		{"/", "localhost.evil.example:" + port, 403, `[^\n]+\n`},
		{"/proxy.pac", "evil.example:" + port, 403, `[^\n]+\n`},
		{"/ORIGIN", "HOST", 200, `root`},
		{"/ORIGIN/", "HOST", 200, `root`},
		{"/ORIGIN/a//b?q=1", "HOST", 200, `a and b`},
		{"/ORIGIN/../a", "HOST", 404, ``},
		{"/ORIGIN/", "evil.example:" + port, 403, `[^\n]+\n`},
	} {
		sub := strings.NewReplacer("ORIGIN", o.host, "HOST", p.addr)
		text := sub.Replace("GET " + test.path + " HTTP/1.1\r\nHost: " + test.host +
			"\r\nConnection: close\r\n\r\n")
		a := p.dial().answerTo(text)
		eq(t, text, a.status, test.status)
		match(t, text, a.body, test.body)
	}
	for path, want := range map[string]bool{"/" + o.host + "/a//b?q=1": true, "/hello.html": false,
		"/": false} {
		a := p.dial().answerTo("GET " + path + " HTTP/1.1\r\nHost: " + p.addr + "\r\n\r\n")
		alone := strings.HasPrefix(a.Get("Content-Security-Policy"), "sandbox ")
		eq(t, path+": is kept apart from what is ours", alone, want)
		eq(t, path+": is nothing for it", a.Get("Cross-Origin-Resource-Policy") == "same-origin", !want)
	}
	a := p.get("http://"+o.host+"/a//b?q=1", "")
	eq(t, "but not through the proxy", a.Get("Content-Security-Policy"), "")
	eq(t, "a /host/path is stored for all", a.body+a.Get("Cache-Status")[:10], "a and bproxy; hit")
	eq(t, "requests", o.count("/a//b"), 1)
	name := strings.ReplaceAll(filepath.Base(p.entry("http://"+o.host+"/a//b?q=1")), "%", "%25")
	a = p.dial().answerTo("GET /cache/" + name + " HTTP/1.1\r\nHost: " + p.addr + "\r\n\r\n")
	eq(t, "the cache's own files", a.status, 404)
	inside := startIn(t, p.cache, "-cache", p.cache)
	a = inside.dial().answerTo("GET /" + name + " HTTP/1.1\r\nHost: " + inside.addr + "\r\n\r\n")
	eq(t, "the cache's own files, by another path", a.status, 404)
	w := bare.dial()
	eq(t, "no files", w.answerTo("GET /.clock HTTP/1.1\r\nHost: "+bare.addr+"\r\n\r\n").status, 404)
	w = p.dial()
	a = w.answerTo("HEAD /hello.html HTTP/1.1\r\nHost: " + p.addr + "\r\n\r\n")
	eq(t, "HEAD", a.Get("Content-Length")+a.Get("Content-Type"), "15text/html; charset=utf-8")
	a = w.answerTo("GET /proxy.pac HTTP/1.0\r\nHost: " + p.addr + "\r\n\r\n")
	eq(t, "type", a.Get("Content-Type"), "application/x-ns-proxy-autoconfig")

	evil := script(t, "HTTP/1.1 200 OK\r\nSet-Cookie: session=2\r\nClear-Site-Data: \"cookies\"\r\n"+
		"Cache-Control: max-age=60\r\nContent-Length: 4\r\n\r\nevil")
	for _, method := range []string{"GET", "GET", "POST"} {
		a = p.dial().answerTo(method + " /" + evil.host + "/ HTTP/1.1\r\nHost: " + p.addr +
			"\r\nCookie: session=1\r\nAuthorization: Basic session\r\nUser-Agent: x\r\n" +
			"Content-Length: 0\r\n\r\n")
		got := fmt.Sprint(a.body, a.Header["Set-Cookie"], a.Header["Clear-Site-Data"])
		eq(t, method+": nor does it touch the cookies of what else runs here", got, "evil[] []")
	}
	eq(t, "nor get them", strings.Contains(evil.got.String(), "session"), false)
	eq(t, "as others do", p.get("http://"+evil.host+"/other", "").Get("Set-Cookie"), "session=2")
}

func TestStatusPage(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	o.put("/a", "Cache-Control: max-age=60", strings.Repeat("x", 3<<20))
	for range 4 {
		p.get(o.url("/a"), "")
	}
	p.get(o.url("/%3Cb%3E<script>&\"'"), "")
	w := p.dial()
	a := w.answerTo("GET / HTTP/1.1\r\nHost: " + p.addr + "\r\n\r\n")
	eq(t, "type", a.Get("Content-Type"), "text/html; charset=utf-8")
	match(t, "requests", a.body, `.*5 requests, 3 hits.*; 9 MiB of them came from the cache:`+
		`<i style="width:\d\d%"></i>.*`)
	match(t, "share of hits", a.body, `.*60% of 5 requests were hits.*`)
	match(t, "the cache", a.body, `.*The cache has 1 files, 3.0 of 1024 MiB.*`)
	match(t, "outcomes", a.body, `.*<td>TCP_HIT<td>3<td><i style="width:100%"></i><tr>.*`)
	match(t, "hosts", a.body, `.*<td>`+o.host+`<td>5<td>.*`)
	match(t, "latest", a.body, `.*TCP_HIT/200<td>\d+ ms<td><div>GET http://`+o.host+`/a.*`)
	if strings.Contains(a.body, "<script") || strings.Contains(a.body, "src=") {
		t.Error("a URL has become markup, or the page needs something from elsewhere")
	}
	eq(t, "HEAD", w.answerTo("HEAD / HTTP/1.1\r\nHost: "+p.addr+"\r\n\r\n").status, 200)
	a = w.answerTo("POST / HTTP/1.1\r\nHost: " + p.addr + "\r\nContent-Length: 0\r\n\r\n")
	eq(t, "POST", a.status, 404)
	for _, long := range []string{strings.Repeat("X", 9999) + " http://x/",
		"GET http://x/" + strings.Repeat("x/", 9999)} {
		p.say(long + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		a = p.dial().answerTo("GET / HTTP/1.1\r\nHost: " + p.addr + "\r\n\r\n")
		if a.status != 200 || len(a.body) > 15000 {
			t.Errorf("after a long one: %d, %d bytes", a.status, len(a.body))
		}
	}
}

func TestConnect(t *testing.T) {
	t.Parallel()
	p := start(t)
	t.Run("the client ends first", func(t *testing.T) {
		o := listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) {
			line, _ := r.ReadString('\n')
			io.WriteString(c, "got "+line)
			all, _ := io.ReadAll(r)
			io.WriteString(c, "all "+string(all))
		})
		w := p.dial()
		w.say("CONNECT " + o.host + " HTTP/1.1\r\nHost: " + o.host + "\r\n\r\nearly\n") // in one piece
		match(t, "head", head(w.r), `HTTP/1.1 200 [^\r]*\r\n\r\n`)
		line, _ := w.r.ReadString('\n')
		eq(t, "early bytes", line, "got early\n")
		w.say("late")
		w.Conn.(*net.TCPConn).CloseWrite()
		eq(t, "rest", w.rest(), "all late")
	})
	t.Run("the origin ends first", func(t *testing.T) {
		got := make(chan string, 1)
		o := listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) {
			io.WriteString(c, "first")
			c.(*net.TCPConn).CloseWrite()
			all, _ := io.ReadAll(r)
			got <- string(all)
		})
		w := p.dial()
		w.say("CONNECT " + o.host + " HTTP/1.0\r\n\r\n")
		head(w.r)
		eq(t, "all of the origin's", w.rest(), "first")
		w.say("after")
		w.Close()
		eq(t, "all of the client's", <-got, "after")
	})
	t.Run("TLS", func(t *testing.T) {
		body := bytesOf(1 << 20)
		o := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter,
			r *http.Request) {
			io.WriteString(w, body)
		}))
		defer o.Close()
		client := o.Client()
		client.Transport.(*http.Transport).Proxy = p.transport.Proxy
		res, err := client.Get(o.URL)
		if err != nil {
			t.Fatal(err)
		}
		eq(t, "body", whole(res).body == body, true)
	})
	t.Run("faults", func(t *testing.T) {
		dead := refusing(t)
		for target, want := range map[string]string{
			dead: "502 .*" + dead + ".*refused.*", "nosuch.invalid:443": "502 .*no such host.*",
			"localhost":           "400 .*",
			"http://localhost:1/": "400 .*", "localhost:0": "400 .*", "localhost:65536": "400 .*",
			":1":               "400 .*",
			"user@localhost:1": "400 .*", "/": "400 .*", "localhost:": "400 .*"} {
			match(t, target, p.say("CONNECT "+target+" HTTP/1.1\r\nHost: x\r\n\r\n"), "HTTP/1.1 "+want)
		}
	})
}

func TestLoopEnds(t *testing.T) {
	t.Parallel()
	p := start(t)
	_, port, _ := net.SplitHostPort(p.addr)
	for _, host := range []string{p.addr, "localhost:" + port, "[::ffff:127.0.0.1]:" + port, "127.0.0.7:" +
		port} {
		began := strings.Count(p.out.String(), "\n")
		text := p.say(request("http://"+host+"/"+host+"/x", ""))
		if host != "127.0.0.7:"+port { // nobody listens there
			match(t, host, text, `HTTP/1.1 508 .*`)
		}
		match(t, host, text, `HTTP/1.1 50[28] .*`)
		eventually(t, "log", func() bool { return strings.Count(p.out.String(), "\n") > began })
		if n := strings.Count(p.out.String(), "\n") - began; n > 3 {
			t.Errorf("%s: %d requests until it ended", host, n)
		}
	}
	for _, host := range []string{"127.0.0.1:", "localhost:", "0.0.0.0:"} { // it would seem to come from here
		match(t, host, p.say("CONNECT "+host+port+" HTTP/1.1\r\nHost: x\r\n\r\n"), `HTTP/1.1 508 .*`)
	}
	match(t, "direct", p.say("GET /"+p.addr+"/ HTTP/1.1\r\nHost: "+p.addr+"\r\nConnection: close\r\n\r\n"),
		`HTTP/1.1 508 .*`)
	second := start(t) // but two of ours may stand in a row
	o := serve(p)
	o.put("/", "", "far")
	req := "GET http://" + o.host + "/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" +
		"Via: 1.1 proxy, 1.1 other (proxy)\r\n\r\n"
	match(t, "a row", second.say(strings.Replace(req, "//", "//"+p.addr+"/", 1)), `HTTP/1.1 200 .*far`)
	match(t, "Via", strings.Join(o.request("/").Header["Via"], ", "),
		`1.1 proxy, 1.1 other \(proxy\), 1.1 proxy-\w+, 1.1 proxy-\w+`)
}

func TestMaxForwards(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := script(t, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nend")
	for _, test := range []struct{ method, hops, arrives string }{
		{"TRACE", "0", ""}, {"OPTIONS", "0", ""}, {"TRACE", "1", "0"}, {"OPTIONS", "10", "9"}, {"GET", "0",
			"0"},
	} {
		before := len(o.got.String())
		text := p.say(test.method + " http://" + o.host + "/ HTTP/1.1\r\nHost: x\r\nMax-Forwards: " +
			test.hops +
			"\r\nAuthorization: secret\r\nCookie: secret\r\nX-Mine: kept\r\nConnection: close\r\n\r\n")
		got := o.got.String()[before:]
		match(t, test.method, text, `HTTP/1.1 200 .*`)
		if test.arrives == "" {
			eq(t, test.method+" at the origin", got, "")
			if strings.Contains(text, "secret") {
				t.Errorf("%s echoes credentials: %s", test.method, text)
			}
			eq(t, test.method+" shows what came", strings.Contains(text, "X-Mine: kept"),
				test.method == "TRACE")
		} else {
			match(t, test.method, got, `.*\r\nMax-Forwards: `+test.arrives+`\r\n.*`)
		}
	}
}

// The wire.

// A second request follows each head that must be refused: it must not be answered.
var answers = regexp.MustCompile(`HTTP/1\.\d \d{3} `)

const hidden = "GET http://ORIGIN/hidden HTTP/1.1\r\nHost: ORIGIN\r\n\r\n"

func TestRefusedRequests(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) { head(r) })
	get := func(fields string) string {
		return "GET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\n" + fields +
			"\r\n"
	}
	post := func(fields string) string {
		return "POST http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\n" + fields + "\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
	}
	line := func(line string) string { return line + "\r\nHost: ORIGIN\r\n\r\n" }
	for name, test := range map[string]struct{ text, want string }{
		"length and coding":         {post("Content-Length: 5\r\nTransfer-Encoding: chunked"), "400"},
		"coding and length":         {post("Transfer-Encoding: chunked\r\nContent-Length: 5"), "400"},
		"two lengths":               {post("Content-Length: 5\r\nContent-Length: 6"), "400"},
		"two lengths, one line":     {post("Content-Length: 5, 6"), "400"},
		"length with a plus":        {post("Content-Length: +5"), "400"},
		"length below zero":         {post("Content-Length: -5"), "400"},
		"length in hex":             {post("Content-Length: 0x5"), "400"},
		"length with a space":       {post("Content-Length: 5 5"), "400"},
		"length with a point":       {post("Content-Length: 5."), "400"},
		"length with an underscore": {post("Content-Length: 1_0"), "400"},
		"no length":                 {post("Content-Length:"), "400"},
		"length beyond all":         {post("Content-Length: 99999999999999999999"), "400"},
		"length that wraps":         {post("Content-Length: 18446744073709551621"), "400"},
		"chunked twice":             {post("Transfer-Encoding: chunked, chunked"), "400|501"},
		"chunked on two lines": {post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
			"400|501"},
		"identity, chunked": {post("Transfer-Encoding: identity\r\nTransfer-Encoding: chunked"),
			"400|501"},
		"gzip, chunked":            {post("Transfer-Encoding: gzip, chunked"), "400|501"},
		"chunked, identity":        {post("Transfer-Encoding: chunked, identity"), "400|501"},
		"identity":                 {post("Transfer-Encoding: identity"), "400|501"},
		"xchunked":                 {post("Transfer-Encoding: xchunked"), "400|501"},
		"chunked quoted":           {post(`Transfer-Encoding: "chunked"`), "400|501"},
		"chunked with a parameter": {post("Transfer-Encoding: chunked;q=1"), "400|501"},
		"chunked with VT":          {post("Transfer-Encoding: \vchunked"), "400|501"},
		"chunked with NBSP":        {post("Transfer-Encoding: \u00a0chunked"), "400|501"},
		"no coding":                {post("Transfer-Encoding:"), "400|501"},
		"coding, comma":            {post("Transfer-Encoding: ,chunked"), "400|501"},
		"coding with a space":      {post("Transfer-Encoding : chunked"), "400"},
		"coding in HTTP/1.0": {strings.Replace(post("Transfer-Encoding: chunked"), "HTTP/1.1",
			"HTTP/1.0", 1), "400|501"},
		"space before the colon":  {get("X-A : b\r\n"), "400"},
		"tab before the colon":    {get("X-A\t: b\r\n"), "400"},
		"obs-fold":                {get("X-A: b\r\n c\r\n"), "400"},
		"obs-fold with a tab":     {get("X-A: b\r\n\tc\r\n"), "400"},
		"fold in the first field": {"GET http://ORIGIN/ HTTP/1.1\r\n Host: ORIGIN\r\n\r\n", "400"},
		"no name":                 {get(": b\r\n"), "400"},
		"no colon":                {get("X-A\r\n"), "400"},
		"a name with a space":     {get("X A: b\r\n"), "400"},
		"a name with a quote":     {get("X\"A: b\r\n"), "400"},
		"a name with 8 bits":      {get("X\xe4: b\r\n"), "400"},
		"NUL in a name":           {get("X\x00A: b\r\n"), "400"},
		"NUL in a value":          {get("X-A: b\x00c\r\n"), "400"},
		"a bare CR in a value":    {get("X-A: b\rContent-Length: 5\r\n"), "400"},
		"a bare CR at the end":    {get("X-A: b\r\r\n"), "400"},
		"ESC in a value":          {get("X-A: \x1b[31m\r\n"), "400"},
		"DEL in a value":          {get("X-A: \x7f\r\n"), "400"},
		"a long field":            {get("X-A: " + strings.Repeat("a", 65<<10) + "\r\n"), "431"},
		"a long name":             {get(strings.Repeat("a", 70<<10)), "400|431"},
		"many short fields":       {get(strings.Repeat("a:\r\n", 20000)), "431"},
		"a long target": {line("GET http://ORIGIN/" + strings.Repeat("a", 70<<10) +
			" HTTP/1.1"), "414"},
		"a long method": {line(strings.Repeat("A", 70<<10) + " http://ORIGIN/ HTTP/1.1"),
			"400|414|431|501"},
		"no version":                {line("GET http://ORIGIN/"), "400|505"},
		"no target":                 {line("GET HTTP/1.1"), "400"},
		"an empty target":           {line("GET  HTTP/1.1"), "400"},
		"two spaces":                {line("GET  http://ORIGIN/ HTTP/1.1"), "400"},
		"a space in the target":     {line("GET http://ORIGIN/a b HTTP/1.1"), "400"},
		"a tab":                     {line("GET\thttp://ORIGIN/ HTTP/1.1"), "400"},
		"a space in front":          {line(" GET http://ORIGIN/ HTTP/1.1"), "400"},
		"a space behind":            {line("GET http://ORIGIN/ HTTP/1.1 "), "400|505"},
		"NUL in the target":         {line("GET http://ORIGIN/\x00 HTTP/1.1"), "400"},
		"a bare CR in the target":   {line("GET http://ORIGIN/\ra HTTP/1.1"), "400"},
		"a method with a colon":     {line("GET: http://ORIGIN/ HTTP/1.1"), "400|501"},
		"HTTP/2.0":                  {line("GET http://ORIGIN/ HTTP/2.0"), "505"},
		"HTTP/0.9":                  {line("GET http://ORIGIN/ HTTP/0.9"), "505"},
		"HTTP/1.10":                 {line("GET http://ORIGIN/ HTTP/1.10"), "400|505"},
		"HTTP/1":                    {line("GET http://ORIGIN/ HTTP/1"), "400|505"},
		"HTTP/1.x":                  {line("GET http://ORIGIN/ HTTP/1.x"), "400|505"},
		"http/1.1":                  {line("GET http://ORIGIN/ http/1.1"), "400|505"},
		"HTTPS/1.1":                 {line("GET http://ORIGIN/ HTTPS/1.1"), "400|505"},
		"the preface of HTTP/2":     {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400|505"},
		"TLS":                       {"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", "400"},
		"two Hosts":                 {get("Host: ORIGIN\r\n"), "400"},
		"two different Hosts":       {get("Host: other\r\n"), "400"},
		"an empty Host":             {"GET http://ORIGIN/ HTTP/1.1\r\nHost: \r\n\r\n", "400"},
		"an empty authority":        {"GET http:///x HTTP/1.1\r\nHost: ORIGIN\r\n\r\n", "400"},
		"no Host":                   {"GET http://ORIGIN/ HTTP/1.1\r\n\r\n", "400"},
		"no Host, direct":           {"GET /ORIGIN/ HTTP/1.1\r\n\r\n", "400"},
		"Host with a space":         {"GET http://ORIGIN/ HTTP/1.1\r\nHost: a b\r\n\r\n", "400"},
		"Host with a path":          {"GET http://ORIGIN/ HTTP/1.1\r\nHost: a/b\r\n\r\n", "400"},
		"Host with userinfo":        {"GET http://ORIGIN/ HTTP/1.1\r\nHost: a@b\r\n\r\n", "400"},
		"Host with two ports":       {"GET http://ORIGIN/ HTTP/1.1\r\nHost: a:1:2\r\n\r\n", "400"},
		"Host that is a list":       {"GET http://ORIGIN/ HTTP/1.1\r\nHost: a, b\r\n\r\n", "400"},
		"userinfo":                  {line("GET http://user:pass@ORIGIN/ HTTP/1.1"), "400"},
		"an empty host":             {line("GET http:///ORIGIN/ HTTP/1.1"), "400"},
		"a port alone":              {line("GET http://:80/ HTTP/1.1"), "400"},
		"port 0":                    {line("GET http://127.0.0.1:0/ HTTP/1.1"), "400"},
		"port 65536":                {line("GET http://127.0.0.1:65536/ HTTP/1.1"), "400"},
		"a port with a sign":        {line("GET http://127.0.0.1:+80/ HTTP/1.1"), "400"},
		"a port that is none":       {line("GET http://127.0.0.1:http/ HTTP/1.1"), "400"},
		"two ports":                 {line("GET http://ORIGIN:80/ HTTP/1.1"), "400"},
		"half an address":           {line("GET http://[::1/ HTTP/1.1"), "400"},
		"an address with a zone":    {line("GET http://[fe80::1%25lo]/ HTTP/1.1"), "400"},
		"no address":                {line("GET http://[zz]/ HTTP/1.1"), "400"},
		"v4 in brackets":            {line("GET http://[127.0.0.1]/ HTTP/1.1"), "400"},
		"an escape in the host":     {line("GET http://127%2e0.0.1/ HTTP/1.1"), "400"},
		"8 bits in the host":        {line("GET http://b\xfccher.example/ HTTP/1.1"), "400"},
		"a backslash in the host":   {line("GET http://ORIGIN\\@evil/ HTTP/1.1"), "400"},
		"a fragment":                {line("GET http://ORIGIN/#a HTTP/1.1"), "400"},
		"https":                     {line("GET https://ORIGIN/ HTTP/1.1"), "400|501"},
		"ftp":                       {line("GET ftp://ORIGIN/ HTTP/1.1"), "400|501"},
		"one slash":                 {line("GET http:/ORIGIN/ HTTP/1.1"), "400"},
		"no scheme":                 {line("GET ORIGIN/ HTTP/1.1"), "400"},
		"an asterisk":               {line("GET * HTTP/1.1"), "400"},
		"a chunk with LF":           {chunks("5\nhello\r\n0\r\n\r\n"), "400"},
		"a chunk size with a plus":  {chunks("+5\r\nhello\r\n0\r\n\r\n"), "400"},
		"a chunk size below zero":   {chunks("-5\r\nhello\r\n0\r\n\r\n"), "400"},
		"a chunk size with 0x":      {chunks("0x5\r\nhello\r\n0\r\n\r\n"), "400"},
		"a chunk size with _":       {chunks("0_5\r\nhello\r\n0\r\n\r\n"), "400"},
		"a space before a size":     {chunks(" 5\r\nhello\r\n0\r\n\r\n"), "400"},
		"an empty chunk size":       {chunks("\r\nhello\r\n0\r\n\r\n"), "400"},
		"only an extension":         {chunks(";a=b\r\nhello\r\n0\r\n\r\n"), "400"},
		"a chunk size that wraps":   {chunks("10000000000000005\r\nhello\r\n0\r\n\r\n"), "400"},
		"a huge chunk":              {chunks("ffffffffffffffff\r\nhello\r\n0\r\n\r\n"), "400"},
		"a bare CR in an extension": {chunks("5;a\rb\r\nhello\r\n0\r\n\r\n"), "400"},
		"NUL in an extension":       {chunks("5;\x00\r\nhello\r\n0\r\n\r\n"), "400"},
		"a Kelvin sign in Host":     {"GET http://ORIGIN/ HTTP/1.1\r\nHost: \u212aelvin\r\n\r\n", "400"},
		"a Kelvin sign in the host": {line("GET http://\u212aelvin/ HTTP/1.1"), "400"},
		"an endless extension": {chunks("5;" + strings.Repeat("a", 200<<10) +
			"\r\nhello\r\n0\r\n\r\n"), "400|431"},
		"trailers with LF":       {chunks("0\r\nX: y\n\r\n"), "400"},
		"folded trailers":        {chunks("0\r\nX: y\r\n z\r\n\r\n"), "400"},
		"trailers that are none": {chunks("0\r\nGET http://ORIGIN/hidden HTTP/1.1\r\n\r\n"), "400"},
		"endless trailers":       {chunks("0\r\n" + strings.Repeat("a: b\r\n", 50<<10)), "400|431"},
	} {
		text := strings.ReplaceAll(test.text+hidden, "ORIGIN", o.host)
		got := p.say(text)
		status, _, _ := strings.Cut(strings.TrimPrefix(got, "HTTP/1.1 "), " ")
		if !slices.Contains(strings.Split(test.want, "|"), status) ||
			len(answers.FindAllString(got, -1)) != 1 {
			t.Errorf("%s: %.300q, want one answer, %s", name, got, test.want)
		}
		_, body, _ := strings.Cut(got, "\r\n\r\n")
		match(t, name+": one sentence", body, `[ -~]{10,}\n`)
		if n := o.conns.Load(); n > 0 || o.got.String() != "" {
			t.Fatalf("%s: %d connections, %.300q at the origin", name, n, o.got.String())
		}
	}
}

func chunks(body string) string {
	return "POST http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nTransfer-Encoding: chunked\r\n\r\n" + body
}

// What breaks a body later, or cuts it, must not look whole at the origin.
func TestBrokenUploadsArriveBroken(t *testing.T) {
	t.Parallel()
	p := start(t)
	var complete atomic.Int64
	o := listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) {
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			if _, err := io.Copy(io.Discard, req.Body); err == nil {
				complete.Add(1)
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			}
		}
	})
	for name, text := range map[string]string{
		"longer than its size": chunks("5\r\nhelloX\r\n0\r\n\r\n"),
		"LF behind the data":   chunks("5\r\nhello\n0\r\n\r\n"),
		"CR behind the data":   chunks("5\r\nhello\r0\r\n\r\n"),
		"a bad second size":    chunks("5\r\nhello\r\n+0\r\n\r\n"),
		"a last chunk with LF": chunks("5\r\nhello\r\n0\n\r\n"),
		"bad trailers":         chunks("5\r\nhello\r\n0\r\nX : y\r\n\r\n"),
		"endless extensions":   chunks(strings.Repeat("1;"+strings.Repeat("a", 3000)+"\r\nx\r\n", 100)),
		"cut in the data":      chunks("5\r\nhel"),
		"cut behind the data":  chunks("5\r\nhello\r\n"),
		"cut before the end":   chunks("5\r\nhello\r\n0\r\n"),
		"cut length": "PUT http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nContent-Length: 10\r\n\r\n" +
			"hello",
	} {
		w := p.dial()
		if !strings.HasPrefix(name, "cut") {
			text += hidden
		}
		w.say(strings.ReplaceAll(text, "ORIGIN", o.host))
		w.Conn.(*net.TCPConn).CloseWrite()
		w.SetDeadline(time.Now().Add(2 * time.Second))
		got, err := io.ReadAll(w.r)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the proxy waits for an answer to what it could not send", name)
		}
		if n := complete.Swap(0); n > 0 || strings.Contains(o.got.String(), "hidden") {
			t.Errorf("%s: %d whole requests at the origin: %q", name, n, o.got.String())
		}
		match(t, name, string(got), `(HTTP/1.1 [45]..[^\n]*\r\n.*)?`)
	}
	w := p.dial()
	w.say(strings.ReplaceAll(chunks(""), "ORIGIN", o.host))
	w.Conn.(*net.TCPConn).CloseWrite()
	match(t, "cut before all", w.rest(), `HTTP/1.1 400 .*`)
}

func TestOriginFaults(t *testing.T) {
	t.Parallel()
	p := start(t)
	const ok, cached = "HTTP/1.1 200 OK\r\n", "Cache-Control: max-age=60\r\n"
	for name, text := range map[string]string{
		"nothing":                 "",
		"garbage":                 "garbage\r\n\r\n",
		"HTTP/0.9":                "<html>hello</html>",
		"HTTP/2.0":                "HTTP/2.0 200 OK\r\n" + cached + "\r\n",
		"a status of two digits":  "HTTP/1.1 20 OK\r\n" + cached + "\r\n",
		"a status of four digits": "HTTP/1.1 2000 OK\r\n" + cached + "\r\n",
		"a status with a sign":    "HTTP/1.1 +20 OK\r\n" + cached + "\r\n",
		"status 099":              "HTTP/1.1 099 OK\r\n" + cached + "\r\n",
		"another protocol":        "ICY 200 OK\r\n" + cached + "\r\n",
		"half a head":             ok + cached,
		"length and coding": ok + cached + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" +
			"5\r\nhello\r\n0\r\n\r\n",
		"two lengths":          ok + cached + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
		"a list of lengths":    ok + cached + "Content-Length: 5, 6\r\n\r\nhello!",
		"a length with a sign": ok + cached + "Content-Length: +5\r\n\r\nhello",
		"a length that wraps":  ok + cached + "Content-Length: 18446744073709551621\r\n\r\nhello",
		"no length":            ok + cached + "Content-Length:\r\n\r\nhello",
		"chunked twice": ok + cached + "Transfer-Encoding: chunked, chunked\r\n\r\n5\r\nhello\r\n" +
			"0\r\n\r\n",
		"gzip, chunked": ok + cached + "Transfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n" +
			"0\r\n\r\n",
		"chunked with VT": ok + cached + "Transfer-Encoding: \vchunked\r\n\r\n5\r\nhello\r\n" +
			"0\r\n\r\n",
		"coding in HTTP/1.0": "HTTP/1.0 200 OK\r\n" + cached +
			"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
		"no colon":               ok + cached + "X-A\r\nContent-Length: 0\r\n\r\n",
		"a space before a colon": ok + cached + "Content-Length : 0\r\n\r\n",
		"obs-fold":               ok + cached + "X-A: b\r\n c\r\nContent-Length: 0\r\n\r\n",
		"NUL":                    ok + cached + "X-A: \x00\r\nContent-Length: 0\r\n\r\n",
		"a bare CR":              ok + cached + "X-A: b\rSet-Cookie: c\r\nContent-Length: 0\r\n\r\n",
		"a head without end":     ok + cached + strings.Repeat("X-A: b\r\n", 20000),
		"a protocol unasked for": "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
	} {
		o := script(t, text+"\x00")
		for i := range 2 { // the second time, too
			match(t, name, p.say(request("http://"+o.host+"/", "")),
				`HTTP/1.1 502 .*\r\n\r\n[ -~]*127.0.0.1[ -~]+\n`)
			if n := strings.Count(o.got.String(), "GET "); n <= i {
				t.Errorf("%s: asked %d times", name, n)
			}
		}
	}
	match(t, "nobody there", p.say(request("http://"+refusing(t)+"/", "")), `HTTP/1.1 502 .*refused\n`)
	match(t, "no such host", p.say(request("http://nosuch.invalid/", "")),
		`HTTP/1.1 502 .*nosuch.invalid.*no such host\n`)
}

// A body that breaks off is seen to do so, and not stored.
func TestCutAnswersAreCut(t *testing.T) {
	t.Parallel()
	p := start(t)
	for name, test := range map[string]string{
		"a length":          "Content-Length: 100\r\n\r\nhello",
		"all of it":         "Content-Length: 100\r\n\r\n",
		"all chunks":        "Transfer-Encoding: chunked\r\n\r\n",
		"in a chunk":        "Transfer-Encoding: chunked\r\n\r\n9\r\nhello",
		"between chunks":    "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
		"in the last chunk": "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
		"a chunk too long":  "Transfer-Encoding: chunked\r\n\r\n5\r\nhelloX\r\n0\r\n\r\n",
		"a bad chunk size":  "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0x0\r\n\r\n",
		"a chunk size too long": "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n" + strings.Repeat("0",
			9000) + "\r\n\r\n",
		"bad trailers": "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX\r\n\r\n",
	} {
		for _, caching := range []string{"max-age=60", "no-store"} {
			o := script(t, "HTTP/1.1 200 OK\r\nCache-Control: "+caching+"\r\n"+test+"\x00")
			old := script(t, "HTTP/1.1 200 OK\r\nCache-Control: "+caching+"\r\n"+test+"\x00")
			w := p.dial()
			w.say("GET http://" + old.host + "/ HTTP/1.0\r\n\r\n")
			if a := w.answer("GET"); a.err == nil {
				t.Errorf("%s, %s: a client of HTTP/1.0 sees no cut in %q", name, caching, a.body)
			}
			for i := range 9 {
				w := p.dial()
				a := w.answerTo(request("http://"+o.host+"/", ""))
				if a.err == nil || a.status != 200 || !strings.HasPrefix("hello", a.body) {
					t.Errorf("%s, %s: %d %q %v, want a cut", name, caching, a.status, a.body, a.err)
				}
				eq(t, name+": requests", strings.Count(o.got.String(), "GET "), i+1)
			}
			eventually(t, "no file left of "+name, func() bool { return len(list(p.cache)) == 0 })
		}
	}
}

// list returns the names of a directory's files.
func list(dir string) (names []string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestFramingOfAnswers(t *testing.T) {
	t.Parallel()
	p := start(t)
	for _, size := range []int{0, 5, 100 << 10} {
		body := bytesOf(size)
		length := fmt.Sprintf("Content-Length: %d\r\n\r\n%s", size, body)
		for name, text := range map[string]string{
			"length": "HTTP/1.1 200 OK\r\n" + length,
			"chunked": fmt.Sprintf("HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n"+
				"%s0;x=\"y\"\r\nX-T: z\r\n\r\n", pieces(body)),
			"until close":     "HTTP/1.1 200 OK\r\n\r\n" + body + "\x00",
			"an unknown one":  "HTTP/1.1 200 OK\r\nTransfer-Encoding: odd\r\n\r\n" + body + "\x00",
			"1.0":             "HTTP/1.0 200 OK\r\n\r\n" + body + "\x00",
			"1.0 with length": "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n" + length,
			"LF only":         "HTTP/1.1 200 OK\nContent-Length: " + strconv.Itoa(size) + "\n\n" + body,
			"no reason":       "HTTP/1.1 200\r\n" + length,
			"an odd reason":   "HTTP/1.1 200 HTTP/1.0\r\n" + length,
			"many fields":     "HTTP/1.1 200 OK\r\n" + strings.Repeat("X: y\r\n", 250) + length,
		} {
			for _, caching := range []string{"no-store", "max-age=60"} {
				o := script(t, strings.Replace(text, "\n", "\nCache-Control: "+caching+"\r\n", 1))
				for _, client := range []string{"HTTP/1.1", "HTTP/1.0",
					"HTTP/1.0\r\nConnection: keep-alive"} {
					what := fmt.Sprint(name, " ", size, " ", caching, " ", client)
					w := p.dial()
					w.SetDeadline(time.Now().Add(patience / 4))
					w.say("GET http://" + o.host + "/ " + client + "\r\nHost: x\r\n\r\n")
					res, err := http.ReadResponse(w.r, nil)
					if err != nil {
						t.Errorf("%s: %v", what, err)
						continue
					}
					a := whole(res)
					old := client != "HTTP/1.1"
					if a.body != body || a.err != nil || res.Proto != "HTTP/1.1" || old &&
						len(res.TransferEncoding) > 0 {
						t.Errorf("%s: %d of %d bytes, %v, %+v", what, len(a.body), size, a.err, res)
					}
					lasting := client == "HTTP/1.1" || client != "HTTP/1.0" && res.ContentLength >= 0
					eq(t, what+": closes", res.Close, !lasting)
					w.Close()
				}
			}
		}
	}
}

// pieces makes chunks of a body, the last not included.
func pieces(body string) (text string) {
	for size := 1; body != ""; size *= 7 {
		n := min(size, len(body))
		text += fmt.Sprintf("%X;ext \r\n%s\r\n", n, body[:n])
		body = body[n:]
	}
	return text
}

func TestFramingOfRequests(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	o.put("/", "", "ok")
	for name, test := range map[string]struct {
		text   string
		length int64 // that the origin sees, -1 if chunked
		body   string
	}{
		"GET":          {"GET ORIGIN/ HTTP/1.1\r\n\r\n", 0, ""},
		"POST, length": {"POST ORIGIN/ HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 5, "hello"},
		"POST, empty":  {"POST ORIGIN/ HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 0, ""},
		"POST in 1.0":  {"POST ORIGIN/ HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello", 5, "hello"},
		"chunked": {"POST ORIGIN/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5;a=\"b\"\r\n" +
			"hello\r\n0\r\nX-T: z\r\n\r\n", -1, "hello"},
		"chunked, empty": {"PUT ORIGIN/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 0, ""},
		// the same
		"GET, length": {"GET ORIGIN/ HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 5, "hello"},
		"GET, chunked": {"GET ORIGIN/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n" +
			"0\r\n\r\n", -1, "hello"},
		"any method": {"M-SEARCH ORIGIN/ HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 5, "hello"},
		"expects": {"POST ORIGIN/ HTTP/1.1\r\nExpect: 100-Continue\r\nContent-Length: 5\r\n\r\n" +
			"hello", 5, "hello"},
		"empty line": {"\r\nGET ORIGIN/ HTTP/1.1\r\n\r\n", 0, ""},
	} {
		before := o.count("/")
		text := strings.Replace(test.text, "\r\n\r\n", "\r\nHost: x\r\n\r\n", 1)
		w := p.dial()
		w.say(strings.Replace(text, "ORIGIN", "http://"+o.host, 1))
		method := strings.Fields(text)[0]
		a := w.answer(method)
		if a.status == 100 {
			a = w.answer(method)
		}
		eq(t, name, fmt.Sprint(a.status, a.body), "200ok")
		eq(t, name+": requests", o.count("/"), before+1)
		r := o.request("/")
		body, _ := io.ReadAll(r.Body)
		eq(t, name, fmt.Sprint(r.Method, r.ContentLength, string(body)), fmt.Sprint(method, test.length,
			test.body))
		w.say(request(o.url("/"), "")) // and is at the end of it
		if a := w.answer("GET"); test.text[:7] != "POST in" && !strings.Contains(test.text, "1.0") {
			eq(t, name+": next", a.status, 200)
		}
	}
}

// What has no body, or should not have, never becomes the start of another client's answer.
func TestStrayBytesNeverAnswerTheNext(t *testing.T) {
	t.Parallel()
	p := start(t)
	const evil = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
	for name, test := range map[string]struct{ method, answer string }{
		"HEAD with a length": {"HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 51\r\n\r\n"},
		"HEAD with a body":   {"HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 51\r\n\r\n" + evil},
		"HEAD, chunked":      {"HEAD", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"},
		"204 with a length":  {"GET", "HTTP/1.1 204 No Content\r\nContent-Length: 51\r\n\r\n" + evil},
		"204, chunked": {"GET", "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n" +
			"hello\r\n0\r\n\r\n" + evil},
		"304 with a body":      {"GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 51\r\n\r\n" + evil},
		"more than its length": {"GET", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello" + evil},
		"more than its chunks": {"GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n" +
			"hello\r\n" +
			"0\r\n\r\n" + evil},
		"103 before": {"GET", "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n" +
			"Content-Length: 0\r\n\r\n" + evil},
	} {
		o := script(t, test.answer, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood")
		w := p.dial()
		w.say(test.method + " http://" + o.host + "/ HTTP/1.1\r\nHost: x\r\nIf-None-Match: \"1\"\r\n\r\n")
		a := w.answer(test.method)
		if a.status == 103 {
			a = w.answer(test.method)
		}
		if a.err != nil || strings.Contains(a.body, "evil") {
			t.Errorf("%s: %q %v", name, a.body, a.err)
		}
		for range 3 { // whatever the first does to either connection
			if a = w.answerTo("GET http://" + o.host + "/2 HTTP/1.1\r\nHost: x\r\n\r\n"); a.err == nil {
				eq(t, name+": next on the connection", a.body, "good")
			}
			eq(t, name+": next", p.get("http://"+o.host+"/3", "").body, "good")
		}
	}
}

func TestInterimAnswersPass(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := script(t, "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n"+
		"Connection: x\r\nX: y\r\n\r\n"+
		"HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: 5\r\n\r\nfinal")
	w := p.dial()
	text := "GET http://" + o.host + "/ HTTP/1.1\r\nHost: x\r\n\r\n"
	eq(t, "first", w.answerTo(text).status, 102)
	a := w.answer("GET")
	eq(t, "second", fmt.Sprint(a.status, a.Get("Link"), a.Get("X")), "103</a>")
	eq(t, "final", w.answer("GET").body, "final")
	a = w.answerTo(text)
	eq(t, "stored", fmt.Sprint(a.body, strings.Count(o.got.String(), "GET ")), "final1")
	match(t, "HTTP/1.0 knows none", p.say("GET http://"+o.host+"/0 HTTP/1.0\r\n\r\n"), `HTTP/1.1 200 .*final`)
	endless := listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) {
		for head(r); ; {
			if _, err := io.WriteString(c, "HTTP/1.1 103 Early Hints\r\n\r\n"); err != nil {
				return
			}
		}
	})
	all := p.say(request("http://"+endless.host+"/", ""))
	match(t, "they end", all, `(HTTP/1.1 103 .*){100}HTTP/1.1 502 .*`)
}

func TestExpectContinue(t *testing.T) {
	t.Parallel()
	p := start(t)
	const expect = " HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
	o := listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) {
		if text := head(r); strings.Contains(text, "POST /early") {
			io.WriteString(c, "HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
			io.Copy(io.Discard, r)
		} else {
			io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n")
			body := make([]byte, 5)
			io.ReadFull(r, body)
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n%s", body)
		}
	})
	w := p.dial()
	w.say("POST http://" + o.host + "/" + expect)
	eq(t, "go on", w.answer("POST").status, 100)
	w.say("hello")
	eq(t, "answer", w.answer("POST").body, "hello")
	w = p.dial()
	w.say("POST http://" + o.host + "/early" + expect)
	eq(t, "refused by the origin, nothing sent", w.answer("POST").body, "big")
	eq(t, "and then", w.rest(), "")
	w = p.dial()
	a := w.answerTo(strings.Replace("POST http://"+o.host+"/"+expect, "100-continue", "a miracle", 1))
	eq(t, "another expectation", a.status, 417)

	w = p.dial() // a large upload, answered before it has all been read
	w.say("POST http://" + o.host + "/early HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
	go io.Copy(w.Conn, io.LimitReader(neverEnding('a'), 100_000_000))
	eq(t, "early answer", w.answer("POST").status, 413)
}

type neverEnding byte

func (b neverEnding) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(b)
	}
	return len(p), nil
}

func TestPipeliningKeepsTheOrder(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	var text, want string
	for i := range 30 {
		path := fmt.Sprintf("/%d", i)
		o.set(path, reply{do: func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(time.Duration(30-i) * time.Millisecond / 2)
			body, _ := io.ReadAll(r.Body)
			w.Header().Set("Cache-Control", []string{"max-age=60", "no-store"}[i%2])
			io.WriteString(w, path+" "+string(body)+strings.Repeat(".", i*1000))
		}})
		if i%5 == 4 { // a hit or not, whichever
			path = fmt.Sprintf("/%d", i-4)
		}
		body := strings.Repeat("x", i)
		method := map[bool]string{true: "POST", false: "GET"}[i%3 == 1]
		if method == "GET" {
			body = ""
		}
		text += fmt.Sprintf("%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", method,
			o.url(path), len(body), body)
		want += path + " " + body + "\n"
	}
	w := p.dial()
	go w.say(text)
	got := ""
	for range 30 {
		a := w.answer("GET")
		got += strings.TrimRight(a.body, ".") + "\n"
	}
	eq(t, "order", got, want)
}

func TestKeepAlive(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	o.put("/", "", "ok")
	for fields, want := range map[string]bool{
		"HTTP/1.1": true, "HTTP/1.1\r\nConnection: close": false, "HTTP/1.1\r\nConnection: X, Close": false,
		"HTTP/1.1\r\nProxy-Connection: close": false, "HTTP/1.0": false,
		"HTTP/1.0\r\nConnection: Keep-Alive":       true,
		"HTTP/1.0\r\nProxy-Connection: keep-alive": true, "HTTP/1.0\r\nConnection: keep-alive, close": false,
	} {
		w := p.dial()
		text := "GET " + o.url("/") + " " + fields + "\r\nHost: x\r\n\r\n"
		eq(t, fields, w.answerTo(text).status, 200)
		eq(t, fields+": next", w.answerTo(text).status == 200, want)
	}
}

func TestBytesArriveExactly(t *testing.T) {
	t.Parallel()
	p := start(t)
	const fields = "X-Order: 1\r\nx-ORDER: 2\r\nCookie: a=\"b c\"; d\r\nCookie: e=f\r\nX-Empty: \r\n" +
		"X-8-Bit: caf\xe9 \xff\r\nAuthorization: Basic Zm9vOmJhcg==\r\nX-Space: a  b\tc\r\n"
	const back = "Set-Cookie: a=b; Path=/\r\nSet-Cookie: c=d\r\nx-Odd-CASE: v\r\n" +
		"WWW-Authenticate: Basic realm=\"o\"\r\n" +
		"X-8-Bit: caf\xe9 \xff\r\nX-Empty: \r\nServer: a (b)\r\n"
	const hops = "Connection: X-Hop, close, Host, Content-Length\r\nX-Hop: 1\r\nKeep-Alive: 5\r\n" +
		"Proxy-Connection: close\r\n" +
		"TE: trailers\r\nUpgrade: h2c\r\nTrailer: X-T\r\nProxy-Authorization: Basic eA==\r\n" +
		"HTTP2-Settings: keep\r\n"
	o := script(t, "HTTP/1.1 299 Very Odd\r\n"+back+strings.Replace(hops, "Proxy-Authorization",
		"Proxy-Authenticate", 1)+
		"Content-Length: 2\r\nDate: Mon, 02 Jan 2006 15:04:05 GMT\r\n\r\nok")
	for sent, want := range map[string]string{
		"/": "/", "": "/", "?x=http://a/": "/?x=http://a/",
		"/a%2Fb%2f//c/./../d/;p=1": "/a%2Fb%2f//c/./../d/;p=1",
		"/\xff\xe4?[]{}|^`\"<>\\":  "/\xff\xe4?[]{}|^`\"<>\\", "/%zz%": "/%zz%", "/?": "/?",
		"/?a?b&c==": "/?a?b&c==",
	} {
		before := len(o.got.String())
		text := p.say("GET HTTP://" + o.host + sent + " HTTP/1.1\r\nHost: elsewhere\r\n" + fields + hops +
			"\r\n")
		got := o.got.String()[before:]
		wanted := "GET " + want + " HTTP/1.1\r\nHost: " + o.host + "\r\n" + fields +
			"HTTP2-Settings: keep\r\n"
		rest, ok := strings.CutPrefix(got, wanted)
		own := regexp.MustCompile(`^(Via: 1.1 [\w-]+\r\n|Connection: keep-alive\r\n)+\r\n$`)
		if !ok || !own.MatchString(rest) {
			t.Errorf("%q: the origin got %q, want %q", sent, got, wanted)
		}
		for _, line := range strings.SplitAfter("HTTP/1.1 299 Very Odd\r\n"+back+"Content-Length: 2\r\n"+
			"Via: 1.1 proxy-", "\r\n") {
			if n := strings.Count(text, line); n != 1 {
				t.Errorf("%q: %d times %q in the answer %q", sent, n, line, text)
			}
		}
		if a, b := strings.Index(text, "Set-Cookie: a"), strings.Index(text, "Set-Cookie: c"); a > b {
			t.Error("Set-Cookie fields out of order")
		}
		for _, name := range []string{"X-Hop", "Keep-Alive", "Proxy-", "TE:", "Upgrade:", "Trailer:"} {
			if strings.Contains(text, "\r\n"+name) {
				t.Errorf("%q: %s is for one hop only: %q", sent, name, text)
			}
		}
	}
	six := listen(t, "[::1]:0", func(c net.Conn, r *bufio.Reader) {
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\n\r\n%s", head(r))
	})
	_, port, _ := net.SplitHostPort(six.host)
	match(t, "IPv6", p.say(request("http://[0:0::1]:"+port+"/", "")), `.*\r\nHost: \[::1\]:`+port+`\r\n.*`)
}

// Each event is there before the next is sent, whatever the client and the cache.
func TestEventsArriveOneByOne(t *testing.T) {
	t.Parallel()
	p := start(t)
	for _, caching := range []string{"no-store", "max-age=60"} {
		for _, version := range []string{"1.1", "1.0"} {
			for _, framing := range []string{"chunked", "close"} {
				next := make(chan bool)
				o := listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) {
					head(r)
					io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"+
						"Cache-Control: "+caching+"\r\n")
					if io.WriteString(c, map[string]string{"chunked": "Transfer-Encoding: chunked\r\n\r\n",
						"close": "\r\n"}[framing]); framing == "close" {
						for i := 0; <-next; i++ {
							fmt.Fprintf(c, "data: %d\n", i)
						}
						return
					}
					for i := 0; <-next; i++ {
						fmt.Fprintf(c, "8\r\ndata: %d\n\r\n", i)
					}
					io.WriteString(c, "0\r\n\r\n")
				})
				w := p.dial()
				w.say("GET http://" + o.host + "/ HTTP/" + version + "\r\nHost: x\r\n\r\n")
				res, err := http.ReadResponse(w.r, nil) // the head is there before any event
				if err != nil {
					t.Fatal(caching, version, framing, err)
				}
				lines := bufio.NewReader(res.Body)
				for i := range 4 {
					next <- true
					line, _ := lines.ReadString('\n')
					eq(t, caching+version+framing, line, fmt.Sprintf("data: %d\n", i))
				}
				close(next)
				rest, err := io.ReadAll(lines)
				eq(t, "end", fmt.Sprint(string(rest), err), "<nil>")
			}
		}
	}
}

func TestIdleConnectionsAreReused(t *testing.T) {
	t.Parallel()
	p := start(t)
	const ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	o := script(t, ok)
	for i := range 5 {
		eq(t, "body", p.get(fmt.Sprintf("http://%s/%d", o.host, i), "").body, "ok")
	}
	eq(t, "connections", o.conns.Load(), 1)

	said := make(chan bool)
	o = listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) {
		for head(r) != "" {
			io.WriteString(c, ok)
			<-said // it has reached the client, and its connection is idle
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
			said <- true
		}
	})
	for range 3 {
		eq(t, "never what was said unasked", p.get("http://"+o.host+"/", "").body, "ok")
		time.Sleep(20 * time.Millisecond) // nothing outside shows when a connection has become idle
		said <- true
		<-said
		time.Sleep(20 * time.Millisecond)
	}
	eq(t, "connections", o.conns.Load(), 3)

	// closes, though it said nothing of it: at once, or when the next request has come
	closing := script(t, ok+"\x00")
	for i := range 5 {
		eq(t, "a closed one", p.get(fmt.Sprintf("http://%s/%d", closing.host, i), "").body, "ok")
	}
	o = listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) {
		if head(r) != "" {
			io.WriteString(c, ok)
			r.ReadString('\n')
		}
	})
	for i := range 4 {
		eq(t, "tried again", p.get(fmt.Sprintf("http://%s/%d", o.host, i), "").body, "ok")
	}
	var asked atomic.Int64
	o = listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) {
		for text := head(r); text != ""; text = head(r) {
			if asked.Add(1); strings.Contains(text, "/last") {
				return // without an answer
			}
			time.Sleep(50 * time.Millisecond)
			io.WriteString(c, ok)
		}
	})
	together(8, func(i int) { p.get(fmt.Sprintf("http://%s/%d", o.host, i), "") })
	eq(t, "no answer", p.get("http://"+o.host+"/last", "").status, 502)
	eq(t, "tried once more, on a new connection", asked.Load(), 10)
	for _, fields := range []string{"Content-Length: 5\r\n\r\nhello", "Content-Length: 0\r\n\r\n"} {
		before := strings.Count(o.got.String(), "POST")
		p.say("POST http://" + o.host + "/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + fields)
		eq(t, "a POST is sent once", strings.Count(o.got.String(), "POST"), before+1)
		p.get("http://"+o.host+"/", "")
	}
	posts := script(t, ok)
	for range 600 { // each leaves a connection, and takes none
		p.ask("POST", "http://"+posts.host+"/", "", "")
	}
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	if err == nil && len(files) > 560 {
		t.Errorf("%d files are open", len(files))
	}
}

// One who is slow, and takes or gives nothing, costs no memory and delays nobody.
func TestSlowOnesDelayNobody(t *testing.T) {
	t.Parallel()
	p, size := start(t), 50<<20
	if racing() {
		size = 8 << 20
	}
	o := serve(p)
	silent := listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) { io.Copy(io.Discard, r) })
	send := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(size))
		w.Header().Set("Cache-Control", map[bool]string{true: "max-age=60",
			false: "no-store"}[r.URL.Path == "/stored"])
		io.Copy(w, io.LimitReader(neverEnding('x'), int64(size)))
	}
	o.set("/stored", reply{do: send})
	o.set("/passed", reply{do: send})
	o.put("/small", "", "small")
	for _, path := range []string{"/stored", "/passed", "/stored", "/passed"} {
		p.dial().say("GET " + o.url(path) + " HTTP/1.1\r\nHost: x\r\n\r\n") // and never reads
		p.dial().say("GET http://" + silent.host + "/ HTTP/1.1\r\nHost: x\r\n\r\n")
		p.dial().say("POST " + o.url("/small") + " HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
		p.dial().say("GET http://")
	}
	eventually(t, "the origin is asked", func() bool {
		return o.count("/stored") > 0 &&
			o.count("/passed") == 2
	})
	for _, path := range []string{"/stored", "/passed", "/stored"} {
		a := p.get(o.url(path), "")
		eq(t, path, fmt.Sprint(len(a.body), a.err), fmt.Sprint(size, " <nil>"))
		eq(t, "small", p.get(o.url("/small"), "").body, "small")
	}
	eq(t, "requests", o.count("/stored"), 1)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status); err == nil && !racing() {
		if kib, _ := strconv.Atoi(string(m[1])); kib > 40<<10 {
			t.Errorf("%d KiB were resident, 40 MiB are the most", kib)
		}
	}
	p.end(os.Kill) // it would wait for the slow ones
}

// The cache.

func TestFileNames(t *testing.T) {
	t.Parallel()
	eq(t, "the lab's rule", fileName("example.com/logo.png"), "example.com_logo.png")
	long := "h/" + strings.Repeat("a", 300)
	urls := []string{"h/a/b", "h/a_b", "h/a%2Fb", "h/a%2fb", "h/a%5fb", "h/A/b", "H/a/b", "h/a?b",
		"h/a%3fb", "h/a/b/", "h/a//b",
		"h:81/a", "h_81/a", "h%3a81/a", "h/a.", "h/a", "h/a ", "h/a%20", "h/.", "h/..", "h/../a", "h/a+b",
		"h/a%2bb", "h/a%",
		"h/a:b", "h/a*b", "h/a|b", "h/a\\b", "h/a\"b", "h/a<b", "h/\xff", "h/\xfe", "h/%ff", "h/ü",
		"h/u\u0308", "h/ß", "h/ss", "h/K", "h/k",
		long, long + "a", long + "A", long + "/", "con/", "con", "nul.txt/", "com1.de/a", "lpt9/", "aux./",
		"[::1]/", "h", "h/",
		"h/" + strings.Repeat("?", 100), "h/" + strings.Repeat("?", 101), "h/" + strings.Repeat("a", 200) +
			"+0123456789abcdef"}
	seen := map[string]string{}
	for _, url := range urls {
		name := fileName(url)
		goodName(t, name)
		if other, ok := seen[strings.ToLower(name)]; ok {
			t.Errorf("%q and %q share %s", url, other, name)
		}
		seen[strings.ToLower(name)] = url
	}
}

var badName = regexp.MustCompile(`(?i)^\.|[. ]$|[^!-~]|[<>:"/\\|?*]|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)`)

// goodName checks that every file system holds a name.
func goodName(t testing.TB, name string) {
	if name == "" || len(name) > 255 || badName.MatchString(name) || !filepath.IsLocal(name) {
		t.Errorf("%q is no good name", name)
	}
}

// entry is the file of a URL, which has to be there.
func (p *proxy) entry(url string) string {
	p.t.Helper()
	name := filepath.Join(p.cache, fileName(strings.TrimPrefix(url, "http://")))
	eventually(p.t, name, func() bool { _, err := os.Stat(name); return err == nil })
	return name
}

func TestEntriesAreTranscripts(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	image := bytesOf(100_000)
	o.put("/logo.png", "Content-Type: image/png | ETag: \"abc\" | Cache-Control: max-age=60 | Connection: X "+
		"| X: y", image)
	eq(t, "first", p.get(o.url("/logo.png"), "Host: elsewhere").body == image, true)
	name := p.entry(o.url("/logo.png"))
	b, _ := os.ReadFile(name)
	head, body, _ := strings.Cut(string(b), "\r\n\r\nHTTP/1.1 ")
	match(t, "the request", head, `GET http://`+o.host+`/logo\.png HTTP/1\.1\r\nDate: [^\n]+ GMT`)
	head, body, _ = strings.Cut(body, "\r\n\r\n")
	match(t, "the answer", head, `200 OK\r\n.*`)
	for _, line := range []string{`Content-Type: image/png`, `E[Tt]ag: "abc"`, `Date: [^\n]+ GMT`,
		`Content-Length: +100000`} {
		match(t, "the answer", head+"\r\n", `.*\r\n`+line+`\r\n.*`)
	}
	others := regexp.MustCompile(`(?m)^(X|Connection|Via|Age|Transfer-Encoding):`)
	eq(t, "no other fields", others.FindString(head), "")
	eq(t, "the body", body == image, true)
	eq(t, "files", list(p.cache), []string{filepath.Base(name)})
	for name, mode := range map[string]fs.FileMode{p.cache: 0o700, name: 0o600} {
		info, _ := os.Stat(name)
		eq(t, name, info.Mode().Perm(), mode)
	}
	for i := range 2 {
		a := p.get(o.url("/logo.png"), "")
		if a.body != image || a.Get("Content-Type") != "image/png" || a.Get("Content-Length") != "100000" {
			t.Errorf("a hit: %d bytes, %v", len(a.body), a.Header)
		}
		match(t, "Cache-Status", a.Get("Cache-Status"), `proxy; hit; ttl=(5\d|60)`)
		eq(t, "requests", o.count("/logo.png"), 1)
		if i == 0 {
			p = p.restart(syscall.SIGTERM) // a restart finds what was there, and so does another process
			other := startIn(t, p.dir)
			eq(t, "another process", other.get(o.url("/logo.png"), "").body == image, true)
		}
	}
	os.Remove(p.entry(o.url("/logo.png"))) // rm forgets
	p.move(2)
	p.get(o.url("/logo.png"), "")
	eq(t, "forgotten", o.count("/logo.png"), 2)
}

// Whatever happens to a file: the answer is whole and right.
func TestDamagedEntriesAreMisses(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	write := func(change func(b []byte) []byte) func(string) {
		return func(name string) {
			b, _ := os.ReadFile(name)
			os.WriteFile(name, change(bytes.Clone(b)), 0o600)
		}
	}
	replace := func(old, new string) func(string) {
		return write(func(b []byte) []byte { return bytes.Replace(b, []byte(old), []byte(new), 1) })
	}
	damages := map[string]func(name string){
		"cut by one":     write(func(b []byte) []byte { return b[:len(b)-1] }),
		"cut in a head":  write(func(b []byte) []byte { return b[:40] }),
		"emptied":        write(func(b []byte) []byte { return nil }),
		"longer":         write(func(b []byte) []byte { return append(b, 'x') }),
		"garbage":        write(func(b []byte) []byte { return []byte(bytesOf(len(b))) }),
		"zeros":          write(func(b []byte) []byte { return make([]byte, len(b)) }),
		"another URL":    replace("GET http://", "GET http://x"),
		"another length": replace("Content-Length:  ", "Content-Length: 1"),
		"no status":      replace("HTTP/1.1 200", "HTTP/1.1 2OO"),
		"a directory":    func(name string) { os.Remove(name); os.Mkdir(name, 0o700) },
		"a full one": func(name string) {
			os.Remove(name)
			os.MkdirAll(filepath.Join(name, "sub"),
				0o700)
		},
		"gone":           func(name string) { os.Remove(name) },
		"a link to none": func(name string) { os.Remove(name); os.Symlink("/nonexistent", name) },
		"a link outside": func(name string) { os.Rename(name, p.dir+"/x"); os.Symlink(p.dir+"/x", name) },
	}
	check := func(what string) {
		t.Helper()
		for name := range damages {
			for _, size := range []int{100, 200_000} { // held in memory, too, or not
				path := fmt.Sprintf("/%s/%d", strings.ReplaceAll(name, " ", "-"), size)
				before := o.count(path)
				a := p.get(o.url(path), "")
				if a.body != bytesOf(size) || a.err != nil {
					t.Errorf("%s: %s: %d of %d bytes, %v", what, path, len(a.body), size, a.err)
				}
				if a.Get("Cache-Status"); o.count(path) == before && what != "a link outside" {
					t.Errorf("%s: %s is answered from a damaged file", what, path)
				}
			}
		}
	}
	spoil := func() {
		for name, damage := range damages {
			for _, size := range []int{100, 200_000} {
				path := fmt.Sprintf("/%s/%d", strings.ReplaceAll(name, " ", "-"), size)
				o.put(path, "Cache-Control: max-age=600", bytesOf(size))
				file := filepath.Join(p.cache, fileName(o.host+path))
				os.RemoveAll(file)
				p.move(2)
				p.get(o.url(path), "")
				damage(p.entry(o.url(path)))
			}
		}
		p.move(2)
	}
	spoil()
	check("while it runs")
	spoil()
	p = p.restart(syscall.SIGTERM)
	o.p = p
	check("after a restart")
	os.RemoveAll(p.cache)
	p.move(2)
	check("without a directory")

	o.set("/growing", reply{do: func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "max-age=60")
		w.(http.Flusher).Flush()
		io.WriteString(w, strings.Repeat("x", 50<<20))
	}})
	res, err := p.begin(o.url("/growing"), "", 1)
	if err != nil {
		t.Fatal(err)
	}
	os.Truncate(p.entry(o.url("/growing")), 1000)
	if a := whole(res); a.err == nil {
		t.Errorf("one who reads a file that is cut has %d bytes, and sees nothing", len(a.body))
	}
	o.put("/future", `Cache-Control: no-cache | ETag: "1"`, "body")
	p.get(o.url("/future"), "")
	p.entry(o.url("/future"))
	p.move(-5000)
	o.p = p.restart(syscall.SIGTERM)
	came, _ := o.outcome("/future", "")
	eq(t, "what the clock has been set back behind", came, "304")
}

func TestKilledAtAnyMomentNothingIsBroken(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	var open atomic.Bool
	for i := range 20 {
		body := bytesOf(i * 20_000)
		o.set(fmt.Sprintf("/%d", i), reply{do: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Cache-Control", "max-age=99999")
			if i%2 == 0 {
				w.Header().Set("Content-Length", strconv.Itoa(len(body)))
			}
			io.WriteString(w, body[:len(body)/2])
			if w.(http.Flusher).Flush(); !open.Load() {
				time.Sleep(time.Duration(rand.IntN(10)) * time.Millisecond)
			}
			io.WriteString(w, body[len(body)/2:])
		}})
	}
	for range 3 {
		q := p
		go together(20, func(i int) { q.get(o.url(fmt.Sprintf("/%d", i)), "") })
		time.Sleep(time.Duration(5+rand.IntN(25)) * time.Millisecond) // any moment will do
		p = p.restart(syscall.SIGKILL)
	}
	open.Store(true)
	together(20, func(i int) {
		a := p.get(o.url(fmt.Sprintf("/%d", i)), "")
		if a.body != bytesOf(i*20_000) || a.err != nil {
			t.Errorf("/%d: %d bytes, %v", i, len(a.body), a.err)
		}
	})
	for i := range 20 {
		p.entry(o.url(fmt.Sprintf("/%d", i)))
	}
	// strays are cleaned up once they are an hour old
	blocked := make(chan bool)
	defer close(blocked)
	o.set("/half", reply{do: func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "max-age=99999")
		io.WriteString(w, "half")
		w.(http.Flusher).Flush()
		<-blocked
	}})
	w := p.dial()
	w.say("GET " + o.url("/half") + " HTTP/1.1\r\nHost: x\r\n\r\n")
	head(w.r)
	names := list(p.cache)
	if p = p.restart(syscall.SIGKILL); len(names) < 21 {
		t.Errorf("no temporary file while a download is under way: %v", names)
	}
	p.get(o.url("/0"), "") // it runs; younger ones stay, they may be another's
	time.Sleep(50 * time.Millisecond)
	eq(t, "young strays", len(list(p.cache)), len(names))
	p.move(3700)
	p = p.restart(syscall.SIGTERM)
	eventually(t, "no strays", func() bool { return len(list(p.cache)) == 20 })
}

// A rule is one row: what an answer says, and where the answer to a second request comes from that is
// sent so many seconds later.
type rule struct {
	name   string
	status int    // 0 is 200
	fields string // of the answer; @-60 is a date a minute ago
	first  string // fields of the first request
	second string // and of the second
	wait   int
	want   string // "hit", "304" where it was validated, "miss"
}

func check(t *testing.T, p *proxy, rules []rule) {
	o := serve(p)
	for i, r := range rules {
		path := fmt.Sprintf("/%d", i)
		o.set(path, reply{cmp.Or(r.status, 200), r.fields, "body " + path, nil})
		a := p.get(o.url(path), r.first)
		eq(t, r.name+": first", fmt.Sprint(a.status, a.body), fmt.Sprint(cmp.Or(r.status, 200), "body "+path))
		if r.wait > 0 {
			p.move(r.wait)
		}
		came, a := o.outcome(path, r.second)
		if came != r.want {
			t.Errorf("%s: %s | second: %s | after %d s: %s, want %s (%s)",
				r.name, r.fields, r.second, r.wait, came, r.want, a.Get("Cache-Status"))
		}
		if a.status < 500 && a.body != "body "+path || a.err != nil {
			t.Errorf("%s: second: %d %q %v", r.name, a.status, a.body, a.err)
		}
	}
}

func TestFreshness(t *testing.T) {
	t.Parallel()
	const cc, tag = "Cache-Control: ", ` | ETag: "1"`
	check(t, start(t), []rule{
		{name: "max-age", fields: cc + "max-age=60", wait: 57, want: "hit"},
		{name: "max-age, over", fields: cc + "max-age=60", wait: 63, want: "miss"},
		{name: "max-age, over, with a tag", fields: cc + "max-age=60" + tag, wait: 63, want: "304"},
		{name: "max-age, over, with a date", fields: cc + "max-age=60 | Last-Modified: @-9", wait: 63,
			want: "304"},
		{name: "upper case", fields: cc + "MAX-AGE=60", wait: 57, want: "hit"},
		{name: "among others", fields: cc + `x="no-store, private", max-age=60, y`, wait: 57, want: "hit"},
		{name: "on a second line", fields: cc + "public | " + cc + "max-age=60", wait: 57, want: "hit"},
		{name: "0", fields: cc + "max-age=0" + tag, want: "304"},
		{name: "quoted", fields: cc + `max-age="60"`, wait: 57, want: "hit"},
		{name: "no number", fields: cc + "max-age=x" + tag, want: "304"},
		{name: "no argument", fields: cc + "max-age" + tag, want: "304"},
		{name: "a fraction", fields: cc + "max-age=60.5" + tag, wait: 63, want: "304"},
		{name: "below zero", fields: cc + "max-age=-60" + tag, want: "304"},
		{name: "beyond all", fields: cc + "max-age=99999999999999999999", wait: 9999999, want: "hit"},
		{name: "s-maxage wins", fields: cc + "s-maxage=60, max-age=1", wait: 57, want: "hit"},
		{name: "s-maxage wins though less", fields: cc + "max-age=999, s-maxage=60" + tag, wait: 63,
			want: "304"},
		{name: "max-age wins over Expires", fields: cc + "max-age=60 | Expires: @-60", wait: 57, want: "hit"},
		{name: "Expires", fields: "Expires: @60", wait: 57, want: "hit"},
		{name: "Expires, over", fields: "Expires: @60" + tag, wait: 63, want: "304"},
		{name: "Expires counts from Date", fields: "Expires: @0 | Date: @-60" + tag, want: "304"},
		{name: "Expires of 0", fields: "Expires: 0 | Last-Modified: @-99999", want: "304"},
		{name: "an empty Expires", fields: "Expires: | Last-Modified: @-99999", want: "304"},
		{name: "a Date that is none", fields: cc + "max-age=60 | Date: x", wait: 57, want: "hit"},
		{name: "Expires that is no date", fields: "Expires: Thu, 32 Jan 2099 00:00:00 GMT" + tag,
			want: "304"},
		{name: "Expires with UTC", fields: "Expires: Thu, 01 Jan 2099 00:00:00 UTC" + tag, want: "304"},
		{name: "Expires long over", fields: "Expires: Thu, 01 Jan 1970 00:00:00 GMT" + tag, want: "304"},
		{name: "Age counts", fields: cc + "max-age=60 | Age: 50", wait: 7, want: "hit"},
		{name: "Age counts, over", fields: cc + "max-age=60 | Age: 50" + tag, wait: 13, want: "304"},
		{name: "Age that is none", fields: cc + "max-age=60 | Age: x", wait: 57, want: "hit"},
		{name: "Age below zero", fields: cc + "max-age=60 | Age: -1", wait: 57, want: "hit"},
		{name: "Age beyond all", fields: cc + "max-age=60 | Age: 99999999999999999999" + tag, want: "304"},
		{name: "an old Date", fields: cc + "max-age=60 | Date: @-50" + tag, wait: 13, want: "304"},
		{name: "a Date to come", fields: cc + "max-age=60 | Date: @500", wait: 57, want: "hit"},
		{name: "a tenth of its age", fields: "Last-Modified: @-1000", wait: 95, want: "hit"},
		{name: "a tenth of its age, over", fields: "Last-Modified: @-1000", wait: 105, want: "304"},
		{name: "of a URL with a query, too", fields: "Last-Modified: @-1000", wait: 95, want: "hit"},
		{name: "changed in the future", fields: "Last-Modified: @1000", wait: 1, want: "304"},
		{name: "nothing said", want: "miss"},
		{name: "nothing but a tag", fields: tag, want: "304"},
		{name: "no-cache", fields: cc + "max-age=60, no-cache" + tag, want: "304"},
		{name: "no-cache with a field", fields: cc + `max-age=60, no-cache="X"`, want: "hit"},
		{name: "immutable, stale", fields: cc + "max-age=60, immutable" + tag, wait: 63, want: "304"},
		{name: "client: no-cache", fields: cc + "max-age=60" + tag, second: cc + "no-cache", want: "304"},
		{name: "client: no-cache, no tag", fields: cc + "max-age=60", second: cc + "no-cache", want: "miss"},
		{name: "client: Pragma", fields: cc + "max-age=60" + tag, second: "Pragma: no-cache", want: "304"},
		{name: "client: max-age", fields: cc + "max-age=60", second: cc + "max-age=20", wait: 17,
			want: "hit"},
		{name: "client: max-age, over", fields: cc + "max-age=60" + tag, second: cc + "max-age=20",
			wait: 23, want: "304"},
		{name: "client: max-age=0", fields: cc + "max-age=60" + tag, second: cc + "max-age=0", wait: 2,
			want: "304"},
		{name: "client: min-fresh", fields: cc + "max-age=60", second: cc + "min-fresh=20", wait: 37,
			want: "hit"},
		{name: "client: min-fresh, less", fields: cc + "max-age=60" + tag, second: cc + "min-fresh=20",
			wait: 43, want: "304"},
		{name: "client: max-stale", fields: cc + "max-age=60" + tag, second: cc + "max-stale=20", wait: 77,
			want: "hit"},
		{name: "client: max-stale, more", fields: cc + "max-age=60" + tag, second: cc + "max-stale=20",
			wait: 83, want: "304"},
		{name: "client: any max-stale", fields: cc + "max-age=60" + tag, second: cc + "max-stale",
			wait: 999, want: "hit"},
		{name: "client: max-stale, but min-fresh", fields: cc + "max-age=60" + tag, second: cc +
			"max-stale, min-fresh=1", wait: 63, want: "304"},
		{name: "but must-revalidate", fields: cc + "max-age=60, must-revalidate" + tag, second: cc +
			"max-stale", wait: 63, want: "304"},
		{name: "but proxy-revalidate", fields: cc + "max-age=60, proxy-revalidate" + tag, second: cc +
			"max-stale", wait: 63, want: "304"},
		{name: "but s-maxage", fields: cc + "s-maxage=60" + tag, second: cc + "max-stale", wait: 63,
			want: "304"},
		{name: "client: only-if-cached, fresh", fields: cc + "max-age=60", second: cc + "only-if-cached",
			want: "hit"},
	})
	check(t, start(t, "-ttl", "60s"), []rule{
		{name: "-ttl", wait: 57, want: "hit"},
		{name: "-ttl, over", wait: 63, want: "miss"},
		{name: "-ttl, over, with a tag", fields: tag, wait: 63, want: "304"},
		{name: "-ttl is not for what says so", fields: cc + "max-age=5" + tag, wait: 8, want: "304"},
		{name: "-ttl is not for what says no", fields: cc + "no-store", want: "miss"},
	})
}

func TestStorability(t *testing.T) {
	t.Parallel()
	const cc, fresh = "Cache-Control: ", "Cache-Control: max-age=60"
	const auth = "Authorization: Basic eA=="
	rules := []rule{
		{name: "no-store", fields: fresh + ", no-store", want: "miss"},
		{name: "No-Store", fields: fresh + ", No-Store", want: "miss"},
		{name: "private", fields: fresh + ", private", want: "miss"},
		{name: "client: no-store", fields: fresh, first: cc + "no-store", want: "miss"},
		{name: "Authorization", fields: fresh, first: auth, want: "miss"},
		{name: "Authorization, public", fields: fresh + ", public", first: auth, want: "hit"},
		{name: "Authorization, s-maxage", fields: cc + "s-maxage=60", first: auth, want: "hit"},
		{name: "Authorization, must-revalidate", fields: fresh + ", must-revalidate", first: auth,
			want: "hit"},
		{name: "what is stored, with Authorization", fields: fresh, second: auth, want: "hit"},
		{name: "Vary: *", fields: fresh + " | Vary: *", want: "miss"},
		{name: "Vary: * among others", fields: fresh + " | Vary: Accept, *", want: "miss"},
		{name: "must-understand", fields: fresh + ", no-store, must-understand", want: "hit"},
		{name: "must-understand, unknown", status: 299, fields: fresh + ", must-understand", want: "miss"},
		{name: "an unknown status", status: 299, fields: fresh, want: "hit"},
		{name: "an unknown status, heuristic", status: 299, fields: "Last-Modified: @-9999", want: "miss"},
		{name: "an unknown status, public", status: 299, fields: cc + "public | Last-Modified: @-9999",
			want: "hit"},
		{name: "302", status: 302, fields: "Last-Modified: @-9999", want: "miss"},
		{name: "302, explicit", status: 302, fields: fresh, want: "hit"},
		{name: "500", status: 500, fields: "Last-Modified: @-9999", want: "miss"},
		{name: "416", status: 416, fields: fresh, first: "Range: bytes=999-", want: "miss"},
		{name: "503, explicit", status: 503, fields: fresh, want: "hit"},
		{name: "a cookie", fields: "Set-Cookie: a=b | Last-Modified: @-9999", want: "miss"},
		{name: "a cookie, explicit", fields: "Set-Cookie: a=b | " + fresh, want: "hit"},
	}
	for _, status := range []int{200, 203, 300, 301, 308, 404, 405, 410, 414, 501} {
		rules = append(rules, rule{name: fmt.Sprint(status), status: status,
			fields: "Last-Modified: @-9999", want: "hit"})
	}
	p := start(t)
	check(t, p, rules)

	o := serve(p)
	o.put("/", fresh+` | Set-Cookie: me=1 | X-Mine: 2 | X-Kept: 3`, "body")
	o.put("/mine", fresh+", private=\"X-Mine,\tX-Too\", no-cache=x-other | "+
		"X-Mine: 2 | X-Other: 3 | X-Kept: 4 | X-Too: 5", "body")
	for i, want := range []string{"me=1", ""} {
		a := p.get(o.url("/"), fmt.Sprintf("User-Agent: %d", i))
		eq(t, "a cookie is for one", fmt.Sprint(a.Get("Set-Cookie"), a.Get("X-Mine"), o.count("/")),
			want+"21")
		a = p.get(o.url("/"), "User-Agent: 0")
		eq(t, "who may have it again", fmt.Sprint(a.Get("Set-Cookie"), o.count("/")), "me=11")
		a = p.get(o.url("/mine"), "")
		got := fmt.Sprint(a.Get("X-Mine"), a.Get("X-Too"), a.Get("X-Other"), a.Get("X-Kept"),
			o.count("/mine"))
		eq(t, "so is what is private", got, []string{"25341", "41"}[i])
	}
	fields := regexp.MustCompile(`(?i)Set-Cookie: `)
	for range 2 { // nothing tells these from each other
		eq(t, "not to nobody", len(fields.FindAllString(p.say(request(o.url("/"), "")), -1)), 0)
	}
	o.put("/post", fresh, "body")
	p.ask("POST", o.url("/post"), "", "x")
	p.ask("POST", o.url("/post"), "", "x")
	p.get(o.url("/post"), "")
	eq(t, "a POST is not for others", o.count("/post"), 3)
	a := p.ask("HEAD", o.url("/post"), "", "")
	eq(t, "HEAD from a GET", fmt.Sprint(a.status, a.Get("Content-Length"), o.count("/post")), "20043")
	o.put("/head", fresh, "body")
	p.ask("HEAD", o.url("/head"), "", "")
	eq(t, "but not the other way", p.get(o.url("/head"), "").body, "body")
	o.set("/part", reply{206, fresh + " | Content-Range: bytes 0-3/8", "body", nil})
	p.get(o.url("/part"), "Range: bytes=0-3")
	o.put("/part", fresh, "the body")
	eq(t, "a part is not the whole", p.get(o.url("/part"), "").body, "the body")
	o.put("/key", fresh, "key")
	p.say("GET " + o.url("/key") + " HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
	p.get(o.url("/key"), "")
	eq(t, "Host is no part of the key", o.count("/key"), 1)
	eq(t, "it was right", o.request("/key").Host, o.host)
	eq(t, "an empty port is 80", p.get("http://127.0.0.9:/", "").status, 502)
}

func TestVary(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	for i, test := range []struct {
		vary, first, second string
		same                bool
	}{
		{"Foo", "Foo: 1", "Foo: 1", true},
		{"Foo", "Foo: 1", "Foo: 2", false},
		{"foo", "Foo: 1", "Foo: 1 | Bar: 2", true},
		{"Foo", "", "", true},
		{"Foo", "Foo: 1", "", false},
		{"Foo", "", "Foo: 1", false},
		{"Foo, Bar", "Foo: 1 | Bar: 2", "Bar: 2 | Foo: 1", true},
		{"Foo, Bar", "Foo: 1 | Bar: 2", "Foo: 2 | Bar: 1", false},
		{"Foo, Bar", "Foo: 1", "Bar: 1", false},
		{"Foo | Vary: Bar", "Foo: 1 | Bar: 2", "Foo: 1 | Bar: 3", false},
		{"Foo", "Foo: 1,2", "Foo: 1 , 2", true},
		{"Foo", "Foo: 1 | Foo: 2", "Foo: 1, 2", true},
		{"Foo", "Foo: 1, 2", "Foo: 2, 1", false},
		{"Foo", "Foo: a", "Foo: A", false},
		{"Foo", `Foo: "a,b"`, `Foo: "a, b"`, false},
		{"Accept-Encoding", "Accept-Encoding: gzip, br", "Accept-Encoding: br,gzip", true},
		{"Accept-Encoding", "Accept-Encoding: gzip", "Accept-Encoding: GZIP", true},
		{"Accept-Encoding", "Accept-Encoding: gzip", "Accept-Encoding: gzip;q=0", false},
		{"Accept-Language", "Accept-Language: en-US, de", "Accept-Language: DE,en-us", true},
		{"Accept-Language", "Accept-Language: en, de", "Accept-Language: en, de;q=0.5", false},
		{"Cookie", "Cookie: a=1", "Cookie: a=2", false},
	} {
		path := fmt.Sprintf("/%d", i)
		o.set(path, reply{do: func(w http.ResponseWriter, r *http.Request) {
			w.Header()["Vary"] = strings.Split(test.vary, " | Vary: ")
			w.Header().Set("Cache-Control", "max-age=60")
			fmt.Fprint(w, r.Header["Foo"], r.Header["Bar"], r.Header["Cookie"], r.Header["Accept-Encoding"],
				r.Header["Accept-Language"])
		}})
		var first, second string
		for round := range 3 { // a variant does not push another out
			a, b := p.get(o.url(path), test.first), p.get(o.url(path), test.second)
			if round == 0 {
				first, second = a.body, b.body
			}
			eq(t, path+": first", a.body, first)
			eq(t, path+": second", b.body, second)
			if test.same != (a.body == b.body) && test.first != test.second {
				t.Errorf("Vary: %s: %q answered by %q", test.vary, test.second, b.body)
			}
		}
		eq(t, fmt.Sprintf("Vary: %s; %s; %s: requests", test.vary, test.first, test.second), o.count(path),
			map[bool]int{true: 1, false: 2}[test.same])
	}
	o.put("/empty", "Vary: Accept-Encoding | Cache-Control: max-age=60", "body")
	for _, fields := range []string{"", "Accept-Encoding:", "", "Accept-Encoding:"} {
		p.get(o.url("/empty"), fields)
	}
	eq(t, "an empty field is not none: requests", o.count("/empty"), 2)
	o.put("/again", "Vary: "+strings.Repeat("Cookie,", 8000)+" | Cache-Control: max-age=60", "body")
	began := time.Now()
	for range 2 {
		eq(t, "named often", p.get(o.url("/again"), "Cookie: "+strings.Repeat(",", 50_000)).body, "body")
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %v to select by what is named often", took)
	}
}

const changed, later = "Mon, 02 Jan 2006 15:04:05 GMT", "Tue, 03 Jan 2006 15:04:05 GMT"

func TestRevalidationUpdatesFields(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	body := bytesOf(100_000)
	o.put("/", `ETag: W/"1" | Last-Modified: @-5000 | Cache-Control: max-age=60 | `+
		`X-A: 1 | X-B: 1 | Content-Language: de`, body)
	p.get(o.url("/"), "")
	p.move(63)
	o.put("/", `ETag: W/"1" | Cache-Control: max-age=30 | X-A: 2 | X-A: 3 | Content-Encoding: gzip`, "")
	came, a := o.outcome("/", `If-None-Match: "other" | Range: bytes=0-3 | If-Modified-Since: `+changed)
	eq(t, "asked with our own", fmt.Sprint(came, o.request("/").Header["If-None-Match"]), `304[W/"1"]`)
	eq(t, "the range of it", fmt.Sprint(a.status, a.body == body[:4]), "206 true")
	for _, wait := range []int{0, 27} {
		p.move(wait)
		came, a = o.outcome("/", "")
		got := fmt.Sprint(came, a.status, a.Header["X-A"], a.Header["X-B"], a.Get("Content-Language"),
			a.Get("Content-Encoding"))
		eq(t, "updated", got, "hit200 [2 3] [1]de")
		match(t, "its body", fmt.Sprint(a.body == body, a.Get("Content-Length"), a.Get("Age")),
			fmt.Sprintf("true100000(%d|%d)", wait, wait+1))
	}
	p = p.restart(syscall.SIGTERM)
	o.p = p
	came, a = o.outcome("/", "")
	eq(t, "after a restart", fmt.Sprint(came, a.Header["X-A"], a.body == body), "hit[2 3] true")
	p.move(9)
	came, a = o.outcome("/", `If-None-Match: "1"`)
	eq(t, "a 304 for a client that has it", fmt.Sprint(came, a.status, a.body), "304304")

	o.put("/date", "Last-Modified: Sunday, 06-Nov-94 08:49:37 GMT | Cache-Control: max-age=60", "old")
	p.get(o.url("/date"), "")
	p.move(63)
	came, _ = o.outcome("/date", "")
	eq(t, "the date as it came", came+o.request("/date").Header.Get("If-Modified-Since"),
		"304Sunday, 06-Nov-94 08:49:37 GMT")
	var other string
	o.set("/other", reply{do: func(w http.ResponseWriter, r *http.Request) {
		tag := choose(r.Header.Get("If-None-Match") == "", `"1"`, other) // it answers for another page
		w.Header().Set("Date", p.at("@0"))
		w.Header().Set("ETag", tag)
		w.Header().Set("Cache-Control", "max-age=60")
		if tag == other {
			w.WriteHeader(304)
			return
		}
		fmt.Fprint(w, o.count("/other"))
	}})
	for i, want := range []string{`1"1"`, `3"1"`, `5"1"`} {
		other = choose(i == 1, `"2"`, `W/"2"`)
		a = p.get(o.url("/other"), "")
		eq(t, "a 304 of another", fmt.Sprint(a.status, a.body, a.Get("ETag")), "200"+want)
		eq(t, "requests", o.count("/other"), 1+2*i)
		p.move(63)
	}
	o.put("/validated", `ETag: "1" | Cache-Control: no-cache`, "body")
	p.get(o.url("/validated"), "")
	for fields, want := range map[string]string{`If-None-Match: "1"`: "304", "Range: bytes=1-2": "206od",
		"": "200body"} {
		came, a = o.outcome("/validated", fields)
		eq(t, "validated each time: "+fields, came+fmt.Sprint(a.status, a.body), "304"+want)
	}
	o.put("/cookie", `ETag: "1" | Set-Cookie: me=1 | Cache-Control: max-age=60`, "body")
	p.get(o.url("/cookie"), "User-Agent: 1")
	p.move(63)
	o.put("/cookie", `ETag: "1" | Cache-Control: max-age=60`, "")
	for range 2 {
		_, a = o.outcome("/cookie", "User-Agent: 2")
		eq(t, "the cookie of another", fmt.Sprint(a.status, a.body, a.Get("Set-Cookie")), "200body")
	}
	o.put("/gone", `ETag: "1" | Cache-Control: max-age=600`, "old")
	p.get(o.url("/gone"), "")
	o.put("/gone", "Cache-Control: no-store", "new")
	for _, fields := range []string{"Cache-Control: no-cache", ""} {
		eq(t, "what is stored no more", p.get(o.url("/gone"), fields).body, "new")
	}
	for i, fields := range []string{"private", "no-store", "max-age=60 | Vary: *"} {
		path := fmt.Sprint("/now", i)
		o.put(path, `ETag: "1" | Cache-Control: max-age=600`, "body")
		p.get(o.url(path), "")
		o.put(path, `ETag: "1" | Cache-Control: `+fields, "body")
		came, _ = o.outcome(path, "Cache-Control: no-cache, no-store")
		eq(t, "a 304 that says "+fields, came, "304")
		came, _ = o.outcome(path, "")
		eq(t, "is heard", came, "miss")
	}
	o.put("/still", `ETag: "1" | Cache-Control: max-age=600`, "body")
	p.get(o.url("/still"), "")
	p.get(o.url("/still"), "Cache-Control: no-cache, no-store")
	came, _ = o.outcome("/still", "")
	eq(t, "a 304 for one who has nothing stored", came, "hit")
	o.set("/still", reply{404, "", "no more", nil})
	for _, fields := range []string{"Cache-Control: no-cache", ""} {
		eq(t, "a page removed", p.get(o.url("/still"), fields).body, "no more")
	}
	p.move(63)
	o.put("/date", "Last-Modified: @-10 | Cache-Control: max-age=60", "new")
	for _, want := range []string{"miss", "hit"} {
		came, a = o.outcome("/date", "")
		eq(t, "replaced", came+a.body, want+"new")
	}
	o.put("/sets", "Last-Modified: "+changed, "body")
	p.get(o.url("/sets"), "")
	o.put("/sets", "Last-Modified: "+changed+" | Set-Cookie: a=b", "body")
	for range 3 {
		p.move(8 * 24 * 3600)
		came, a = o.outcome("/sets", "")
		eq(t, "a 304 with a cookie", came+a.body, "304body")
	}
}

func TestConditionsAndRangesFromTheCache(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	o.put("/", `ETag: "1" | Last-Modified: `+changed+` | Cache-Control: max-age=6000 | X: y`, "0123456789")
	o.put("/weak", `ETag: W/"1" | Cache-Control: max-age=6000`, "0123456789")
	p.get(o.url("/"), "")
	p.get(o.url("/weak"), "")
	for fields, want := range map[string]string{
		`If-None-Match: "1"`:                                                "304",
		`If-None-Match: W/"1"`:                                              "304",
		`If-None-Match: "0", "1"`:                                           "304",
		`If-None-Match: "0" | If-None-Match: "1"`:                           "304",
		`If-None-Match: *`:                                                  "304",
		`If-None-Match: "2"`:                                                "200 0123456789",
		`If-None-Match: "1,2"`:                                              "200 0123456789",
		`If-None-Match: 1`:                                                  "200 0123456789",
		`If-Modified-Since: ` + changed:                                     "304",
		`If-Modified-Since: ` + later:                                       "304",
		`If-Modified-Since: Tuesday, 03-Jan-06 15:04:05 GMT`:                "304",
		`If-Modified-Since: Sun, 01 Jan 2006 15:04:05 GMT`:                  "200 0123456789",
		`If-Modified-Since: garbage`:                                        "200 0123456789",
		`If-None-Match: "2" | If-Modified-Since: ` + later:                  "200 0123456789",
		`If-None-Match: "1" | If-Modified-Since: Sun, 01 Jan 2006 15:04:05`: "304",
		`If-None-Match: "1" | Range: bytes=0-1`:                             "304",
		`Range: bytes=0-4`:                                                  "206 01234 bytes 0-4/10",
		`Range: bytes=5-`:                                                   "206 56789 bytes 5-9/10",
		`Range: bytes=-3`:                                                   "206 789 bytes 7-9/10",
		`Range: bytes=-30`:                                                  "206 0123456789 bytes 0-9/10",
		`Range: bytes=9-99999999999999999999`:                               "206 9 bytes 9-9/10",
		`Range: bytes=0-0`:                                                  "206 0 bytes 0-0/10",
		`Range: bytes=10-`:                                                  "416 bytes */10",
		`Range: bytes=99-100`:                                               "416 bytes */10",
		`Range: bytes=-0`:                                                   "416 bytes */10",
		`Range: bytes=5-4`:                                                  "200 0123456789",
		`Range: bytes=a-b`:                                                  "200 0123456789",
		`Range: bytes=-`:                                                    "200 0123456789",
		`Range: bytes=+1-2`:                                                 "200 0123456789",
		`Range: lines=0-4`:                                                  "200 0123456789",
		`Range: bytes=0-1 | If-Range: "1"`:                                  "206 01 bytes 0-1/10",
		`Range: bytes=0-1 | If-Range: "2"`:                                  "200 0123456789",
		`Range: bytes=0-1 | If-Range: W/"1"`:                                "200 0123456789",
		`Range: bytes=0-1 | If-Range: ` + changed:                           "206 01 bytes 0-1/10",
		`Range: bytes=0-1 | If-Range: ` + later:                             "200 0123456789",
		`Range: bytes=0-1 | If-None-Match: "2"`:                             "206 01 bytes 0-1/10",
	} {
		a := p.get(o.url("/"), fields)
		if a.status == 416 {
			a.body = a.Get("Content-Range")
			a.Del("Content-Range")
		}
		eq(t, fields, strings.TrimSpace(fmt.Sprint(a.status, " ", a.body, " ", a.Get("Content-Range"))), want)
		if a.status == 304 && (a.Get("ETag") != `"1"` || a.Get("Cache-Control") == "" ||
			a.Get("Date") == "") {
			t.Errorf("%s: a 304 needs its fields: %v", fields, a.Header)
		}
	}
	match(t, "several", p.get(o.url("/"), "Range: bytes=0-1,4-5").body, `0123456789|--.*`)
	a := p.get(o.url("/weak"), `Range: bytes=0-1 | If-Range: W/"1"`)
	eq(t, "a weak tag is not good enough", a.body, "0123456789")
	a = p.ask("HEAD", o.url("/"), `If-None-Match: "1"`, "")
	eq(t, "HEAD", a.status, 304)
	eq(t, "requests", o.count("/")+o.count("/weak"), 2)
}

// A part that an origin sent is stored as that, and answers for what it holds and for nothing else.
func TestPartsAreStored(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	part := reply{206, `Content-Range: bytes 4-8/10 | ETag: "1" | Cache-Control: max-age=60`, "45678", nil}
	for i, test := range []struct{ second, want string }{
		{"Range: bytes=4-8", "hit 206 45678 bytes 4-8/10"},
		{"Range: bytes=5-6", "hit 206 56 bytes 5-6/10"},
		{"Range: bytes=8-8", "hit 206 8 bytes 8-8/10"},
		{`Range: bytes=5-6 | If-Range: "1"`, "hit 206 56 bytes 5-6/10"},
		{`Range: bytes=5-6 | If-Range: "2"`, "miss 200 0123456789 "},
		{`If-None-Match: "1"`, "hit 304  "},
		{"Range: bytes=3-5", "miss 200 345 "},
		{"Range: bytes=5-9", "miss 200 56789 "}, // only what is wholly within it (RFC 9111 §3.3)
		{"Range: bytes=0-1", "miss 200 0123456789 "},
		{"Range: bytes=-2", "miss 200 89 "},
		{"Range: bytes=4-99", "miss 200 456789 "},
		{"Range: bytes=10-", "hit 416  bytes */10"},
		{"", "miss 200 0123456789 "},
	} {
		path := fmt.Sprint("/", i)
		o.set(path, part)
		a := p.get(o.url(path), "Range: bytes=4-8")
		eq(t, "first", fmt.Sprint(a.status, a.body, a.Get("Content-Range")), "20645678bytes 4-8/10")
		o.put(path, `ETag: "2" | Cache-Control: max-age=60`, "0123456789")
		came, a := o.outcome(path, test.second)
		got := fmt.Sprint(came, " ", a.status, " ", a.body, " ", a.Get("Content-Range"))
		if strings.HasPrefix(test.want, "miss") { // of the whole, as it is now
			got = fmt.Sprint(came, " 200 0123456789 ")
			eq(t, test.second+": then", p.get(o.url(path), "").body, "0123456789")
			test.want = "miss 200 0123456789 "
		} else if a.status == 304 {
			got = "hit 304  "
		}
		eq(t, test.second, got, test.want)
	}
	stale := reply{206, `Content-Range: bytes 4-8/10 | ETag: "1" | Cache-Control: max-age=0`, "45678", nil}
	for range 3 {
		o.set("/stale", stale)
		a := p.get(o.url("/stale"), "Range: bytes=4-8")
		eq(t, "a stale part", fmt.Sprint(a.status, a.body, a.Get("Content-Range")), "20645678bytes 4-8/10")
		o.put("/stale", `ETag: "1" | Cache-Control: no-store`, "0123456789")
		a = p.get(o.url("/stale"), `If-None-Match: "1"`)
		eq(t, "validated by a client", fmt.Sprint(a.status, a.body), "304")
	}
	o.set("/other", reply{206, "Content-Range: bytes 0-4/10 | Cache-Control: max-age=60", "01234", nil})
	a := p.get(o.url("/other"), "Range: bytes=-5")
	got := fmt.Sprint(a.status, a.body, a.Get("Content-Range"))
	eq(t, "not what was asked for", got, "20601234bytes 0-4/10")
	for _, field := range []string{"", "Content-Range: bytes 0-4/* | ", "Content-Range: bytes 0-x/10 | ",
		"Content-Range: bytes 0-9/10 | ", "Content-Range: bytes 0-3/10 | ", "Content-Range: bytes 0-4/4 | "} {
		o.set("/odd", reply{206, field + "Cache-Control: max-age=60", "01234", nil})
		before := o.count("/odd")
		p.get(o.url("/odd"), "Range: bytes=0-4")
		p.get(o.url("/odd"), "Range: bytes=0-4")
		eq(t, "a part of nobody knows what", o.count("/odd"), before+2)
	}
}

// Small answers are held in memory for a second, in which the file counts as it was.
func TestMemory(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	for _, size := range []int{0, 1000, 100_000, 1 << 20, 1<<20 + 1} {
		path, body := fmt.Sprint("/", size), bytesOf(size)
		o.put(path, "Cache-Control: max-age=600", body)
		hit := choose(size <= 1<<20, "TCP_MEM_HIT", "TCP_HIT")
		eventually(t, hit, func() bool { // a download may still be on its way to its place
			if a := p.get(o.url(path), ""); a.body != body || a.err != nil {
				t.Errorf("%s: %d bytes, %v", path, len(a.body), a.err)
			}
			return regexp.MustCompile(hit + "/200 .* " + o.url(path) + " ").MatchString(p.out.String())
		})
		eq(t, "requests at the origin", o.count(path), 1)
		from := size / 2
		if a := p.get(o.url(path), fmt.Sprintf("Range: bytes=%d-", from)); size > 0 {
			eq(t, "a range of it", fmt.Sprint(a.status, a.body == body[from:]), "206 true")
		}
		p.ask("POST", o.url(path), "", "")
		o.put(path, "Cache-Control: max-age=600", "new")
		eq(t, "invalidated at once", p.get(o.url(path), "").body, "new")
		p.get(o.url(path), "")
		o.put(path, "Cache-Control: max-age=600", "newer")
		eq(t, "replaced at once", p.get(o.url(path), "Cache-Control: no-cache").body, "newer")
		eq(t, "and stays so", p.get(o.url(path), "").body, "newer")
	}
}

func TestInvalidation(t *testing.T) {
	t.Parallel()
	p := start(t)
	o, other := serve(p), serve(p)
	for i, test := range []struct {
		method string
		status int
		fields string // of its answer; / stands for the URL that is stored
		want   string
	}{
		{"POST", 200, "", "miss"}, {"PUT", 204, "", "miss"}, {"DELETE", 200, "", "miss"}, {"PATCH", 302, "",
			"miss"},
		{"M-ODD", 200, "", "miss"}, {"OPTIONS", 200, "", "hit"}, {"TRACE", 200, "", "hit"},
		{"POST", 500, "", "hit"}, {"POST", 404, "", "hit"},
		{"POST", 201, "Location: http://HOST/", "miss"}, {"POST", 200, "Content-Location: /PATH", "miss"},
		{"POST", 200, "Location: ?x", "hit"}, {"POST", 200, "Location: http://OTHER/", "hit"},
		{"POST", 200, "Content-Location: http://HOST.evil/", "hit"},
	} {
		path := fmt.Sprintf("/%d", i)
		for _, s := range []*site{o, other} {
			s.put(path, "Cache-Control: max-age=60", "body")
			p.get(s.url(path), "")
		}
		target := path
		if test.fields != "" {
			target = "/by" + path
		}
		sub := strings.NewReplacer("HOST/", o.host+path, "OTHER/", other.host+path, "/PATH", path)
		o.set(target, reply{test.status, sub.Replace(test.fields), "", nil})
		p.ask(test.method, o.url(target), "", "")
		o.put(path, "Cache-Control: max-age=60", "body")
		what := fmt.Sprint(test.method, " ", test.status, " ", test.fields)
		came, _ := o.outcome(path, "")
		eq(t, what, came, test.want)
		came, _ = other.outcome(path, "")
		eq(t, what+": another origin", came, "hit")
	}
}

func TestStaleAnswers(t *testing.T) {
	t.Parallel()
	p := start(t)
	for _, test := range []struct {
		fields, second string
		wait, status   int // what the origin says by then; 0 is nothing, it is gone
		want           int
	}{
		{"max-age=60, stale-if-error=600", "", 63, 503, 200},
		{"max-age=60, stale-if-error=600", "", 63, 500, 200},
		{"max-age=60, stale-if-error=600", "", 63, 404, 404},
		{"max-age=60, stale-if-error=600", "", 663, 503, 503},
		{"max-age=60, stale-if-error=600", "", 63, 0, 200},
		{"max-age=60", "stale-if-error=600", 63, 503, 200},
		{"max-age=60", "", 63, 503, 503},
		{"max-age=60", "", 63, 0, 200}, // RFC 9111 §4.2.4
		{"max-age=60, must-revalidate", "", 63, 0, 504},
		{"max-age=60, must-revalidate, stale-if-error=600", "", 63, 503, 503},
		{"max-age=60, proxy-revalidate", "", 63, 0, 504},
		{"s-maxage=60", "", 63, 0, 504},
		{"no-cache", "", 3, 0, 504},
		{"max-age=60", "no-cache", 3, 0, 502},
	} {
		what := fmt.Sprint(test)
		o := serve(p)
		o.put("/", "ETag: \"1\" | Cache-Control: "+test.fields, "old")
		p.get(o.url("/"), "")
		p.move(test.wait)
		if o.set("/", reply{test.status, "", "error", nil}); test.status == 0 {
			o.CloseClientConnections()
			o.Close()
		}
		a := p.get(o.url("/"), "Cache-Control: "+test.second)
		if a.status != test.want && !(test.want == 504 && a.status == 502) { // both say it
			t.Errorf("%s: %d %s", what, a.status, a.body)
		}
		if a.status == 200 {
			eq(t, what, a.body, "old")
			match(t, what, a.Get("Cache-Status"), `proxy; (hit|fwd=stale).*`)
		}
	}
}

// All who ask for it at once get what is stale, if the origin fails them.
func TestManyStaleAnswers(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	o.put("/", "Cache-Control: max-age=60, stale-if-error=600", "old")
	p.get(o.url("/"), "")
	p.move(63)
	o.set("/", reply{do: func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(100 * time.Millisecond)
		w.WriteHeader(500)
	}})
	together(20, func(int) {
		a := p.get(o.url("/"), "")
		eq(t, "stale", fmt.Sprint(a.status, a.body), "200old")
	})
}

func TestStaleWhileRevalidate(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	const swr = "Cache-Control: max-age=60, stale-while-revalidate=60"
	o.put("/", swr, "old")
	p.get(o.url("/"), "")
	p.move(63)
	release := make(chan bool)
	o.set("/", reply{do: func(w http.ResponseWriter, r *http.Request) {
		<-release
		w.Header().Set("Cache-Control", swr[15:])
		w.Header().Set("Date", p.at("@0"))
		io.WriteString(w, "new")
	}})
	for range 10 { // all at once, while one refreshes
		eq(t, "stale", p.get(o.url("/"), "").body, "old")
	}
	eventually(t, "refreshing", func() bool { return o.count("/") == 2 })
	close(release)
	eventually(t, "fresh", func() bool { return p.get(o.url("/"), "").body == "new" })
	eq(t, "requests", o.count("/"), 2)
	p.move(130)
	eq(t, "too stale", p.get(o.url("/"), "").body, "new")
	eq(t, "requests", o.count("/"), 3)
	eventually(t, "stored", func() bool { came, _ := o.outcome("/", ""); return came == "hit" })
	before := o.count("/") // what had come just before may not have been in its place
	p.move(63)
	release = make(chan bool)
	o.set("/", reply{do: func(w http.ResponseWriter, r *http.Request) { <-release; w.WriteHeader(503) }})
	together(10, func(int) { eq(t, "stale", p.get(o.url("/"), "").body, "new") })
	time.Sleep(100 * time.Millisecond)
	close(release)
	time.Sleep(50 * time.Millisecond)
	if n := o.count("/") - before; n < 1 || n > 4 { // one that comes late asks anew, a herd would be 10
		t.Errorf("%d requests, if what comes is not stored", n)
	}

	o.put("/mine", swr, "old")
	p.get(o.url("/mine"), "")
	o.set("/part", reply{206, "Content-Range: bytes 4-8/10 | " + swr, "45678", nil})
	p.get(o.url("/part"), "Range: bytes=4-8")
	p.move(63)
	for _, fields := range []string{"Cache-Control: no-store", "Authorization: Basic eA=="} {
		before = o.count("/mine")
		p.get(o.url("/mine"), fields)
		time.Sleep(20 * time.Millisecond)
		eq(t, "requests for one whose answer is not to be stored", o.count("/mine"), before+1)
	}
	eq(t, "a part", p.get(o.url("/part"), "Range: bytes=4-8").status, 206)
	time.Sleep(20 * time.Millisecond)
	eq(t, "is not refreshed by the whole", o.request("/part").Header.Get("Range"), "bytes=4-8")
}

func TestAgeAndCacheStatus(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	const mine = "Cache-Control: max-age=60 | ETag: \"1\" | Age: 10"
	o.put("/", mine, "body")
	o.put("/not", "", "body")
	for _, step := range []struct {
		path, fields string
		wait         int
		age, status  string
	}{
		{"/", "", 0, `1\d?|`, `proxy; fwd=uri-miss(; fwd-status=200)?; stored`},
		{"/", "", 20, `3[01]`, `proxy; hit; ttl=(29|30)`},
		{"/", "Cache-Control: no-cache", 0, `1[01]|`, `proxy; fwd=request; fwd-status=304.*`},
		{"/", "", 60, `1[01]|`, `proxy; fwd=stale; fwd-status=304.*`},
		{"/", "Cache-Control: max-stale=99", 60, `7[01]`, `proxy; hit; ttl=-1\d`},
		{"/not", "", 0, ``, `proxy; fwd=uri-miss(; fwd-status=200)?`},
	} {
		p.move(step.wait)
		a := p.get(o.url(step.path), step.fields)
		match(t, fmt.Sprintf("%+v", step), a.Get("Cache-Status"), step.status)
		match(t, fmt.Sprintf("%+v", step), a.Get("Age"), step.age)
		match(t, "Via", a.Get("Via"), `1.1 proxy-\w+`)
	}
	a := p.ask("POST", o.url("/"), "", "")
	match(t, "POST", a.Get("Cache-Status"), `proxy; fwd=method.*`)
	o.put("/dateless", "Date: | Cache-Control: max-age=60", "")
	if date, err := http.ParseTime(p.get(o.url("/dateless"), "").Get("Date")); err != nil ||
		p.now().Sub(date).Abs() > patience {
		t.Errorf("an answer without a date gets %v, %v", date, err)
	}
	a = p.get(o.url("/cold"), "Cache-Control: only-if-cached")
	eq(t, "only-if-cached", fmt.Sprint(a.status, o.count("/cold"), a.Get("Cache-Status")), "504 0")
}

func TestUses(t *testing.T) {
	t.Parallel()
	p := start(t, "-uses", "3")
	o := serve(p)
	o.put("/", "Cache-Control: max-age=60000", "body")
	for i, want := range []string{"miss", "miss", "miss", "hit", "hit"} { // stored from the third on
		came, _ := o.outcome("/", "")
		eq(t, fmt.Sprint("request ", i+1), came, want)
	}
	o.put("/seldom", "Cache-Control: max-age=60000", "body")
	for i, want := range []string{"miss", "miss", "miss", "miss", "miss", "hit"} {
		came, _ := o.outcome("/seldom", "")
		if eq(t, fmt.Sprint("seldom, request ", i+1), came, want); i == 1 {
			p.move(700) // the first two do not count any more
		}
	}
}

func TestSizeIsKept(t *testing.T) {
	t.Parallel()
	p := start(t, "-size", "1M")
	o := serve(p)
	for i := range 5 {
		o.put(fmt.Sprint("/", i), "Cache-Control: max-age=600", bytesOf(100_000))
		p.get(o.url(fmt.Sprint("/", i)), "")
		p.entry(o.url(fmt.Sprint("/", i)))
	}
	large := filepath.Join(p.cache, "my_film.mkv")
	os.WriteFile(large, make([]byte, 2<<20), 0o600)
	o.set("/large", reply{do: func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "max-age=600")
		w.(http.Flusher).Flush() // of a length that nobody knows
		for range 80 {
			w.Write(make([]byte, 64<<10))
			for _, e := range list(p.cache) {
				if info, err := os.Stat(filepath.Join(p.cache, e)); err == nil && e != "my_film.mkv" &&
					info.Size() > 1<<20 {
					t.Errorf("%s has %d bytes", e, info.Size())
				}
			}
		}
	}})
	a := p.get(o.url("/large"), "")
	eq(t, "too large", fmt.Sprint(len(a.body), a.err), fmt.Sprint(80*64<<10, " <nil>"))
	eventually(t, "it is given up", func() bool { return len(list(p.cache)) == 6 })
	p = p.restart(syscall.SIGTERM, "-size", "1M")
	for i := 5; i < 8; i++ {
		o.put(fmt.Sprint("/", i), "Cache-Control: max-age=600", bytesOf(100_000))
		p.get(o.url(fmt.Sprint("/", i)), "")
		p.entry(o.url(fmt.Sprint("/", i)))
	}
	time.Sleep(50 * time.Millisecond)
	eq(t, "what is not ours does not count", len(list(p.cache)), 9)
	o.put("/cut", `Cache-Control: max-age=0 | ETag: "1"`, bytesOf(300_000))
	p.get(o.url("/cut"), "")
	p.entry(o.url("/cut"))
	o.put("/cut", `Cache-Control: max-age=60 | ETag: "2" | Content-Length: 300000`, "x")
	for range 9 {
		p.get(o.url("/cut"), "")
	}
	eventually(t, "what is not replaced still counts", func() bool {
		a := p.dial().answerTo("GET / HTTP/1.1\r\nHost: " + p.addr + "\r\n\r\n")
		want := fmt.Sprintf(`The cache has %d files, 0\.[6-9] of 1 MiB`, len(list(p.cache))-1)
		return regexp.MustCompile(want).MatchString(a.body)
	})
}

// A name that is cut may have lost the first slash.
func TestSizeCountsLongNames(t *testing.T) {
	t.Parallel()
	c := Cache{dir: t.TempDir(), limit: 5000}
	for i := range 10 {
		url := strings.Repeat("_", 45) + ".example/" + fmt.Sprint(i)
		date := time.Now().Add(time.Duration(i) * time.Hour) // the clock may have been set back
		text := "GET http://" + url + " HTTP/1.1\r\nDate: " + date.UTC().Format(dateFormat) +
			"\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
		os.WriteFile(c.path(url), []byte(text+bytesOf(1000)), 0o600)
	}
	c.trim()
	eq(t, "files, and as it counts", fmt.Sprint(len(list(c.dir)), c.files), "4 4")
}

func TestSizeKeepsTheRecentlyUsed(t *testing.T) {
	t.Parallel()
	p := start(t, "-size", "1M")
	o := serve(p)
	foreign := map[string]int{"notes.txt": 10, "my_notes.txt": 10, "+mine": 10, "example.com_old": 20}
	for name, size := range foreign {
		os.WriteFile(filepath.Join(p.cache, name), make([]byte, size), 0o600)
		os.Chtimes(filepath.Join(p.cache, name), time.Time{}, time.Unix(0, 0))
	}
	get := func(i int) {
		path := fmt.Sprintf("/%d", i)
		o.put(path, "Cache-Control: max-age=99999", bytesOf(100_000))
		p.get(o.url(path), "")
		p.entry(o.url(path))
	}
	for i := range 8 {
		get(i)
		used := time.Now().Add(time.Duration(i-100) * time.Hour)
		os.Chtimes(p.entry(o.url(fmt.Sprintf("/%d", i))), used, used)
	}
	p.move(2)
	get(0) // used just now
	for i := 8; i < 12; i++ {
		get(i)
	}
	eventually(t, "the limit is kept", func() bool {
		sum := int64(0)
		for _, name := range list(p.cache) {
			if info, err := os.Stat(filepath.Join(p.cache, name)); err == nil {
				sum += info.Size()
			}
		}
		return sum <= 1<<20
	})
	for i, want := range map[int]string{0: "hit", 1: "miss", 2: "miss", 10: "hit", 11: "hit"} {
		if want == "hit" {
			came, _ := o.outcome(fmt.Sprintf("/%d", i), "")
			eq(t, fmt.Sprint("entry ", i), came, want)
		} else if _, err := os.Stat(filepath.Join(p.cache,
			fileName(o.host+fmt.Sprintf("/%d", i)))); err == nil {
			t.Errorf("entry %d is kept, though least recently used", i)
		}
	}
	for name := range foreign {
		if _, err := os.Stat(filepath.Join(p.cache, name)); err != nil {
			t.Errorf("a file that is not ours: %v", err)
		}
	}
	o.put("/large", "Cache-Control: max-age=99999", bytesOf(2<<20))
	eq(t, "larger than all", p.get(o.url("/large"), "").body == bytesOf(2<<20), true)
	came, _ := o.outcome("/0", "")
	eq(t, "and pushes nothing out", came, "hit")
}

// Downloads under way.

// slowly answers with half a body, and with the rest when the test lets it.
type slowly struct {
	fields, body string
	rest         chan bool // closed for the rest, or given false for an end
}

func (s *slowly) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	for _, f := range split(s.fields) {
		w.Header().Set(f[0], f[1])
	}
	if w.Header().Get("Content-Length") == "" {
		defer w.(http.Flusher).Flush()
	}
	io.WriteString(w, s.body[:len(s.body)/2])
	w.(http.Flusher).Flush()
	select {
	case <-r.Context().Done():
	case _, cut := <-s.rest:
		if cut {
			panic(http.ErrAbortHandler)
		}
		io.WriteString(w, s.body[len(s.body)/2:])
	}
}

// begin asks for a URL and reads n bytes of the body.
func (p *proxy) begin(url, fields string, n int) (*http.Response, error) {
	req, _ := http.NewRequest("GET", url, nil)
	for _, f := range split(fields) {
		req.Header.Set(f[0], f[1])
	}
	res, err := p.transport.RoundTrip(req)
	if err == nil {
		_, err = io.ReadFull(res.Body, make([]byte, n))
	}
	return res, err
}

func TestManyAtOnceAreOneRequest(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	body := bytesOf(300_000)
	for _, test := range []struct {
		name, fields string
		cut          bool
	}{
		{"chunked", "Cache-Control: max-age=60", false},
		{"length", "Cache-Control: max-age=60 | Content-Length: 300000", false},
		{"chunked, cut", "Cache-Control: max-age=60", true},
		{"length, cut", "Cache-Control: max-age=60 | Content-Length: 300000", true},
	} {
		path := "/" + strings.ReplaceAll(test.name, ", ", "-")
		s := &slowly{test.fields, body, make(chan bool)}
		o.set(path, reply{do: s.ServeHTTP})
		var half sync.WaitGroup
		half.Add(100)
		go func() { // all have the first half before there is a second
			half.Wait()
			if test.cut {
				s.rest <- true
			}
			close(s.rest)
		}()
		var collapsed atomic.Int64
		together(100, func(i int) {
			res, err := p.begin(o.url(path), "", len(body)/2)
			half.Done()
			if err != nil {
				t.Errorf("%s: client %d: %v", test.name, i, err)
				return
			}
			if strings.Contains(res.Header.Get("Cache-Status"), "collapsed") {
				collapsed.Add(1)
			}
			a := whole(res)
			if whole := a.err == nil && a.body == body[len(body)/2:]; whole == test.cut {
				t.Errorf("%s: client %d: %d bytes, %v", test.name, i, len(a.body), a.err)
			}
		})
		eq(t, test.name+": requests", o.count(path), 1)
		eq(t, test.name+": collapsed", collapsed.Load(), 99)
		o.put(path, "", "new")
		came, _ := o.outcome(path, "")
		eq(t, test.name+": later", came, map[bool]string{true: "miss", false: "hit"}[test.cut])
	}
	o.set("/late", reply{do: func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(3 * time.Second) // in which all have come, on a busy machine too
		p.move(5)
		w.Header().Set("Cache-Control", "max-age=1")
		io.WriteString(w, "late")
	}})
	together(20, func(int) { eq(t, "longer than it is fresh", p.get(o.url("/late"), "").body, "late") })
	eq(t, "longer than it is fresh: requests", o.count("/late"), 1)
}

// What cannot be stored lets them through side by side, not one after another.
func TestUnstorableOnesGoSideBySide(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	var n atomic.Int64
	all := make(chan bool)
	for path, fields := range map[string]string{"/": "no-store", "/private": "private", "/unknown": ""} {
		n.Store(0)
		all = make(chan bool)
		o.set(path, reply{do: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Cache-Control", fields)
			w.(http.Flusher).Flush() // which tells that there is nothing to share
			if n.Add(1) == 20 {
				close(all)
			}
			select {
			case <-all: // before all have come none is answered
				io.WriteString(w, "mine")
			case <-time.After(patience):
			}
		}})
		together(20, func(int) { eq(t, path, p.get(o.url(path), "").body, "mine") })
		eq(t, path+": requests", o.count(path), 20)
	}
}

func TestOneWhoStallsOrLeavesHurtsNobody(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	body := bytesOf(8 << 20)
	for _, leaves := range []bool{true, false} {
		path := fmt.Sprint("/", leaves)
		s := &slowly{"Cache-Control: max-age=60 | Content-Length: 8388608", body, make(chan bool)}
		o.set(path, reply{do: s.ServeHTTP})
		first := p.dial()
		first.say("GET " + o.url(path) + " HTTP/1.1\r\nHost: x\r\n\r\n")
		head(first.r)
		var joined sync.WaitGroup
		joined.Add(5)
		go func() {
			joined.Wait()
			if leaves {
				first.Conn.(*net.TCPConn).SetLinger(0) // by a reset
				first.Close()
			}
			close(s.rest)
		}()
		together(5, func(int) {
			res, err := p.begin(o.url(path), "", len(body)/2)
			if joined.Done(); err != nil {
				t.Errorf("%s: %v", path, err)
				return
			}
			if a := whole(res); a.err != nil || a.body != body[len(body)/2:] {
				t.Errorf("%s: %d bytes, %v", path, len(a.body), a.err)
			}
		})
		if !leaves { // and who comes back to read finds it all
			n, err := io.CopyN(io.Discard, first.r, int64(len(body)))
			eq(t, "the stalled one", fmt.Sprint(n, err), fmt.Sprint(len(body), " <nil>"))
		}
		eq(t, path+": requests", o.count(path), 1)
	}
}

// A download nobody reads any more is finished if little is left, and else dropped.
func TestAbandonedDownloads(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	gone := make(chan bool, 1)
	for size, want := range map[int]string{1 << 20: "hit", 32 << 20: "miss"} {
		path := fmt.Sprint("/", size)
		s := &slowly{fmt.Sprint("Cache-Control: max-age=60 | Content-Length: ", size), bytesOf(size),
			make(chan bool)}
		o.set(path, reply{do: func(w http.ResponseWriter, r *http.Request) {
			if s.ServeHTTP(w, r); r.Context().Err() != nil {
				gone <- true
			}
		}})
		res, err := p.begin(o.url(path), "", 1000)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if want == "miss" {
			select {
			case <-gone:
			case <-time.After(patience):
				t.Error("the origin goes on sending for nobody")
			}
		} else {
			time.Sleep(50 * time.Millisecond) // until the proxy has seen it
			close(s.rest)
			p.entry(o.url(path))
		}
		o.put(path, "Cache-Control: max-age=60", s.body)
		came, a := o.outcome(path, "")
		eq(t, path, fmt.Sprint(came, a.body == s.body), want+"true")
	}
}

func TestManyAtOnceWithVaryAndValidation(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	var asked, validated atomic.Int64
	hold := make(chan bool)
	o.set("/", reply{do: func(w http.ResponseWriter, r *http.Request) {
		<-hold
		h, lang := w.Header(), r.Header.Get("Accept-Language")
		h.Set("Date", p.at("@0"))
		h.Set("Vary", "Accept-Language")
		h.Set("Cache-Control", "max-age=60")
		if h.Set("ETag", `"`+lang+`"`); r.Header.Get("If-None-Match") == h.Get("ETag") {
			validated.Add(1)
			w.WriteHeader(304)
			return
		}
		asked.Add(1)
		io.WriteString(w, strings.Repeat(lang, 100))
	}})
	for round, want := range []int64{2, 4} { // stored for each; validated for each, a round later
		go func() {
			time.Sleep(200 * time.Millisecond) // so that most have come
			close(hold)
		}()
		together(40, func(i int) {
			lang := []string{"de", "en"}[i%2]
			a := p.get(o.url("/"), "Accept-Language: "+lang)
			eq(t, lang, fmt.Sprint(a.status, a.body == strings.Repeat(lang, 100), a.err), "200 true <nil>")
		})
		if n := asked.Load() + validated.Load(); n > want+int64(round) || asked.Load() > 3 {
			t.Errorf("round %d: %d requests, of them %d validations, for 40 clients", round, n,
				validated.Load())
		}
		p.move(63)
		hold = make(chan bool)
	}
	if validated.Load() == 0 {
		t.Error("nothing was validated")
	}

	o.put("/one", `ETag: "1" | Cache-Control: max-age=60`, "body")
	p.get(o.url("/one"), "")
	p.move(63)
	hold = make(chan bool)
	var late atomic.Int64
	o.set("/one", reply{do: func(w http.ResponseWriter, r *http.Request) {
		<-hold
		late.Add(1)
		w.Header().Set("Date", p.at("@0"))
		w.Header().Set("ETag", `"1"`)
		w.WriteHeader(304)
	}})
	go func() {
		eventually(t, "validation", func() bool { return o.count("/one") > 1 })
		time.Sleep(200 * time.Millisecond)
		close(hold)
	}()
	together(40, func(i int) { eq(t, "one 304 for all", p.get(o.url("/one"), "").body, "body") })
	eq(t, "validations", late.Load(), 1)
}

// What is on its way under a key, but is none for who asks, holds nobody up.
func TestOthersDoNotWaitForWhatIsNotForThem(t *testing.T) {
	t.Parallel()
	p := start(t)
	rest := make(chan bool)
	send := func(fields, body string) string {
		return "HTTP/1.1 " + fields + "\r\nCache-Control: max-age=60\r\n\r\n" + body
	}
	o := listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) {
		switch text := head(r); {
		case strings.Contains(text, "Range"):
			io.WriteString(c, send("206 Part\r\nContent-Length: 9\r\nContent-Range: bytes 0-8/10", "0123"))
			<-rest
		case strings.Contains(text, "A: 2\r\nB: 1"):
			io.WriteString(c, send("200 OK\r\nVary: A, B\r\nContent-Length: 9", "slow"))
			<-rest
		case strings.Contains(text, "/vary"):
			io.WriteString(c, send("200 OK\r\nContent-Length: 5\r\nVary: A", "quick"))
		default:
			io.WriteString(c, send("200 OK\r\nContent-Length: 5", "whole"))
		}
	})
	defer close(rest)
	url := "http://" + o.host
	w := p.dial()
	w.say(request(url+"/part", "Range: bytes=0-8\r\n"))
	head(w.r)
	eq(t, "beside a part", p.get(url+"/part", "").body, "whole")
	eq(t, "first", p.get(url+"/vary", "A: 1").body, "quick")
	w = p.dial()
	w.say(request(url+"/vary", "A: 2\r\nB: 1\r\n"))
	head(w.r)
	eq(t, "beside another variant", p.get(url+"/vary", "A: 2 | B: 2").body, "quick")

	var n atomic.Int64
	hung := listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) {
		if head(r); n.Add(1) == 1 {
			<-rest
		}
		io.WriteString(c, send("200 OK\r\nContent-Length: 5", "quick"))
	})
	w = p.dial()
	w.say(request("http://"+hung.host+"/", ""))
	eventually(t, "hung", func() bool { return n.Load() == 1 })
	began := time.Now()
	eq(t, "a reload", p.get("http://"+hung.host+"/", "Cache-Control: no-cache").body, "quick")
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("a reload waited %v for what it may not have", took)
	}
}

func TestFullDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cache := filepath.Join(dir, "cache")
	os.Mkdir(cache, 0o700)
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs",
		cache).CombinedOutput(); err != nil {
		t.Skipf("no small disk to be had: %s", out)
	}
	t.Cleanup(func() { exec.Command("umount", "-l", cache).Run() })
	p := startIn(t, dir)
	o := serve(p)
	body := bytesOf(20 << 20)
	for _, fields := range []string{"Cache-Control: max-age=60",
		"Cache-Control: max-age=60 | Content-Length: 20971520"} {
		path := fmt.Sprint("/", len(fields))
		s := &slowly{fields, body, make(chan bool)}
		o.set(path, reply{do: s.ServeHTTP})
		var half sync.WaitGroup
		half.Add(5)
		go func() { half.Wait(); close(s.rest) }()
		together(5, func(i int) {
			res, err := p.begin(o.url(path), "", len(body)/2)
			if half.Done(); err != nil {
				t.Errorf("%s: %v", fields, err)
				return
			} else if i == 0 { // leaves the others to it, after they have waited for it
				time.Sleep(100 * time.Millisecond)
				res.Body.Close()
				return
			}
			a := whole(res)
			eq(t, fields, fmt.Sprint(a.body == body[len(body)/2:], a.err), "true <nil>")
		})
		eventually(t, "no part is left", func() bool { return len(list(cache)) == 0 })
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status); err == nil && !racing() {
		if kib, _ := strconv.Atoi(string(m[1])); kib > 40<<10 {
			t.Errorf("%d KiB were resident", kib)
		}
	}
	match(t, "the operator is told", p.errs.String(), `.*not stored: .* no space left on device\n.*`)
	o.put("/small", "Cache-Control: max-age=60", "small")
	p.get(o.url("/small"), "")
	p.entry(o.url("/small"))
	came, a := o.outcome("/small", "")
	eq(t, "small ones are stored", came+a.body, "hitsmall")

	large := bytesOf(600_000)
	o.put("/renewed", `Cache-Control: max-age=60 | ETag: "1"`, large)
	p.get(o.url("/renewed"), "")
	p.entry(o.url("/renewed"))
	p.move(63)
	os.WriteFile(filepath.Join(cache, "full"), bytes.Repeat([]byte("x"), 1<<20), 0o600)
	came, a = o.outcome("/renewed", "")
	eq(t, "a 304 on a full disk", fmt.Sprint(came, a.body == large, a.err), "304true <nil>")
	o.put("/other", "Cache-Control: max-age=60", "small")
	eq(t, "a small one on a full disk", p.get(o.url("/other"), "").body, "small")
	for i := range 5 {
		path := fmt.Sprint("/range", i)
		o.put(path, "Cache-Control: max-age=60 | Content-Length: 600000", large)
		together(20, func(int) {
			a := p.get(o.url(path), "Range: bytes=590000-")
			if want := choose(a.status == 206, large[590_000:], large); a.body != want || a.err != nil {
				t.Errorf("the end on a full disk: %d, %d bytes, %v", a.status, len(a.body), a.err)
			}
		})
	}
}

// What is opened is closed again, however an exchange ends.
func TestNothingLeaks(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/proc/self/fd"); err != nil {
		t.Skip(err)
	}
	p := start(t, "-size", "20M")
	o := serve(p)
	cut := script(t, "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: 10\r\n\r\nhello\x00")
	bad, dead := script(t, "what?\r\n\r\n\x00"), refusing(t)
	for i := range 50 {
		o.put(fmt.Sprintf("/%d", i), []string{"Cache-Control: max-age=60", "", `ETag: "1"`}[i%3],
			bytesOf(i*i*100))
	}
	files := func() int { return len(list(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))) }
	round := func() int {
		together(8, func(worker int) {
			for i := range 125 {
				path := o.url(fmt.Sprintf("/%d", (i*7+worker)%50))
				w := p.dial()
				switch i % 8 {
				case 0: // reset in the middle of an answer
					w.say("GET " + path + " HTTP/1.1\r\nHost: x\r\n\r\n")
					w.r.Peek(1)
					w.Conn.(*net.TCPConn).SetLinger(0)
				case 1: // gone before it
					w.say("GET " + path + "?new" + strconv.Itoa(i) + " HTTP/1.1\r\nHost: x\r\n\r\n")
				case 2:
					w.say("GET " + path + " HT")
				case 3: // in the middle of an upload
					w.say("POST " + path + " HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhello")
				case 4:
					w.answerTo(request("http://"+cut.host+"/", ""))
				case 5:
					w.answerTo(request("http://"+bad.host+"/", ""))
				case 6:
					w.say("CONNECT " + dead + " HTTP/1.1\r\nHost: x\r\n\r\nCONNECT " + o.host +
						" HTTP/1.1\r\nHost: x\r\n\r\n")
				default:
					w.answerTo("GET " + path + " HTTP/1.1\r\nHost: x\r\n\r\n")
				}
				w.Close()
			}
		})
		before := -1
		eventually(t, "quiet", func() bool {
			n := files()
			quiet := n == before
			before = n
			time.Sleep(50 * time.Millisecond)
			return quiet
		})
		return before
	}
	first := round()
	if second := round(); second > first+10 || second > 60 {
		t.Errorf("%d open files after 1,000 requests, %d after 2,000", first, second)
	}
	left := len(list(p.cache))
	eventually(t, "no temporary files", func() bool {
		return !slices.ContainsFunc(list(p.cache), func(name string) bool {
			return strings.HasPrefix(name,
				"+")
		})
	})
	if left == 0 {
		t.Error("nothing was stored")
	}
	p.end(syscall.SIGQUIT) // to which a Go program answers with its goroutines
	if n := strings.Count(p.errs.String(), "\ngoroutine "); n > 20 || n == 0 {
		t.Errorf("%d goroutines are left:\n%.9000s", n, p.errs.String())
	}
}

func TestFiveHundredClients(t *testing.T) {
	t.Parallel()
	p := start(t)
	o := serve(p)
	for i := range 5 {
		o.put(fmt.Sprint("/", i), []string{"", "Cache-Control: max-age=60"}[i%2], bytesOf(50_000+i))
	}
	clients := 500
	if racing() {
		clients = 100
	}
	together(clients, func(i int) {
		w := p.dial()
		for j := range 4 {
			n := (i + j) % 5
			a := w.answerTo("GET " + o.url(fmt.Sprint("/", n)) + " HTTP/1.1\r\nHost: x\r\n\r\n")
			if a.body != bytesOf(50_000+n) || a.err != nil {
				t.Errorf("client %d: %d bytes, %v", i, len(a.body), a.err)
			}
		}
		w.Close()
	})
}

func soaking(t *testing.T) time.Duration {
	d, err := time.ParseDuration(os.Getenv("PROXY_SOAK"))
	if err != nil || testing.Short() {
		t.Skip("PROXY_SOAK does not say for how long, as 60s")
	}
	return d
}

// All at once, for a while: each answer is whole and right, or visibly cut where the origin's was.
func TestSoak(t *testing.T) {
	end := time.Now().Add(soaking(t))
	p := start(t, "-size", "10M")
	o := serve(p)
	for i := range 100 {
		fields := []string{"Cache-Control: max-age=2", "",
			"Cache-Control: max-age=1, stale-while-revalidate=1", `ETag: "1"`,
			"Vary: Foo | Cache-Control: max-age=60"}[i%5]
		o.put(fmt.Sprint("/", i), fields, bytesOf(i*i*50))
	}
	cut := script(t, "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nTransfer-Encoding: chunked\r\n\r\n"+
		"5\r\nhello\r\n\x00")
	together(32, func(worker int) {
		for time.Now().Before(end) {
			i := rand.IntN(100)
			url := o.url(fmt.Sprint("/", i))
			switch rand.IntN(10) {
			case 0:
				if a := p.get("http://"+cut.host+"/", ""); a.err == nil {
					t.Errorf("a cut answer looks whole: %+v", a)
				}
			case 1:
				w := p.dial()
				w.say("GET " + url + " HTTP/1.1\r\nHost: x\r\n\r\n")
				time.Sleep(time.Duration(rand.IntN(3)) * time.Millisecond)
				w.Close()
			case 2:
				p.ask("POST", url, "", "hello")
			case 3:
				if res, err := p.begin(url, "", rand.IntN(i*i*50+1)); err == nil {
					res.Body.Close()
				}
			case 4:
				from := rand.IntN(i*i*50 + 1)
				a := p.get(url, fmt.Sprintf("Range: bytes=%d-", from))
				if a.status == 206 && a.body != bytesOf(i * i * 50)[from:] {
					t.Errorf("%s from %d on: %d bytes", url, from, len(a.body))
				}
			default:
				fields := []string{"", "Cache-Control: no-cache", "Foo: 1", "Foo: 2",
					"Cache-Control: max-age=0"}[rand.IntN(5)]
				if a := p.get(url, fields); a.status != 200 || a.body != bytesOf(i*i*50) || a.err != nil {
					t.Errorf("%s: %d, %d bytes, %v", url, a.status, len(a.body), a.err)
				}
			}
		}
	})
}

// The waits of the proxy, which take as long as they take.
func TestWaits(t *testing.T) {
	soaking(t)
	p := start(t)
	silent := listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) { time.Sleep(2 * time.Minute) })
	t.Run("beside one who waits", func(t *testing.T) {
		t.Parallel()
		var n atomic.Int64
		o := listen(t, "127.0.0.1:0", func(c net.Conn, r *bufio.Reader) {
			if head(r); n.Add(1) == 1 {
				time.Sleep(2 * patience)
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\n"+
				"Content-Length: 5\r\n\r\nquick")
		})
		w := p.dial()
		w.say(request("http://"+o.host+"/", ""))
		eventually(t, "asked", func() bool { return n.Load() == 1 })
		began := time.Now()
		for range 200 { // who wait as well, and do not cost much
			w := p.dial()
			w.say(request("http://"+o.host+"/", ""))
		}
		together(20, func(int) { eq(t, "others", p.get("http://"+o.host+"/", "").body, "quick") })
		if took := time.Since(began); took < 4*time.Second || took > 8*time.Second {
			t.Errorf("others got it after %v", took)
		}
	})
	t.Run("nobody reads the log", func(t *testing.T) {
		t.Parallel()
		p := &proxy{t: t}
		cmd := command(t.TempDir(), "0")
		unread, _ := cmd.StdoutPipe()
		defer unread.Close()
		var errs buffer
		cmd.Stderr = &errs
		cmd.Start()
		eventually(t, "listening", func() bool { return strings.Contains(errs.String(), "listening") })
		p.addr = regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(errs.String())
		for range 100 {
			w := p.dial()
			w.say("GET /" + strings.Repeat("x", 9000) + " HTTP/1.1\r\nHost: " + p.addr + "\r\n\r\n")
		}
		time.Sleep(time.Second)
		began := time.Now()
		cmd.Process.Signal(syscall.SIGTERM)
		if cmd.Wait(); time.Since(began) > 15*time.Second {
			t.Errorf("it took %v to end", time.Since(began))
		}
	})
	for name, test := range map[string]struct {
		text, drip string
		least      time.Duration
		want       string
	}{
		"a slow head": {"GET http://" + silent.host + "/ HTTP/1.1\r\nX: ", "x", 30 * time.Second,
			`HTTP/1.1 408 .*`},
		"no next request": {"GET / HTTP/1.1\r\nHost: " + p.addr + "\r\n\r\n", "", 60 * time.Second,
			`HTTP/1.1 200 .*`},
		"a silent origin": {request("http://"+silent.host+"/", ""), "", 60 * time.Second, `HTTP/1.1 504 .*`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, began := p.dial(), time.Now()
			w.SetDeadline(began.Add(90 * time.Second))
			w.say(test.text)
			go func() {
				for test.drip != "" && time.Since(began) < test.least*2 {
					time.Sleep(time.Second)
					w.say(test.drip)
				}
			}()
			match(t, name, w.rest(), test.want)
			if took := time.Since(began); took < test.least-time.Second || took > test.least+10*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
}

// Parts by themselves.

func TestDates(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{
		"Sun, 06 Nov 1994 08:49:37 GMT":  784111777,
		"Sunday, 06-Nov-94 08:49:37 GMT": 784111777,
		"Sun Nov  6 08:49:37 1994":       784111777,
		"Sun, 06 Nov 1994 08:49:37":      0, "Sun, 06 Nov 1994 08:49:37 UTC": 0,
		"Sun, 06 Nov 1994 08:49:37 +0000": 0,
		"Sun, 6 Nov 1994 08:49:37 GMT":    0, "Sun, 06 Nov 94 08:49:37 GMT": 0,
		"Sun, 06 Nov 1994 8:49:37 GMT": 0,
		"Sun, 06 Nov 1994 08:49 GMT":   0, "Sun, 31 Nov 1994 08:49:37 GMT": 0,
		"Sun, 06 Nov 1994 24:49:37 GMT": 0,
		"Sun 06 Nov 1994 08:49:37 GMT":  0, "06 Nov 1994 08:49:37 GMT": 0, "": 0, "0": 0, "784111777": 0,
		"GMT": 0,
		"Sun, 06 Nov 1994 08:49:37 GMT, Sun, 06 Nov 1994 08:49:37 GMT": 0,
		"Sun,  06 Nov 1994 08:49:37 GMT":                               0,
	} {
		eq(t, text, httpDate(text), want)
	}
}

func (h *Head) read(r *bufio.Reader, answer bool) error {
	c := Conn{in: r, room: maxHead}
	return attempt(func() { *h = *c.head(answer) })
}

func newBody(c *Conn, kind int64) body { c.expect(kind); return body{c} }

func FuzzHead(f *testing.F) {
	for _, text := range []string{"GET http://h/a?b HTTP/1.1\r\nHost: h\r\nX: a\r\nx: b \r\n\r\n",
		"GET / HTTP/1.0\n\n",
		"\r\nOPTIONS * HTTP/1.1\r\nA:\r\n B\r\n\r\n",
		"GET /\xff HTTP/1.1\r\nA : b\r\n: c\r\nd\r\nE: \xff\r\n\r\n"} {
		f.Add([]byte(text), false)
	}
	f.Add([]byte("HTTP/1.1 200 OK\r\nDate: x\r\nVia: 1.1 a,\t b\r\n\r\n"), true)
	f.Add([]byte("HTTP/1.0 404\r\n\r\n"), true)
	f.Add([]byte("\n0 : HTTP/1.0\n\n"), false)
	f.Fuzz(func(t *testing.T, data []byte, answer bool) {
		var h, again Head
		if h.read(bufio.NewReader(iotest.OneByteReader(bytes.NewReader(data))), answer) != nil {
			return
		}
		size := 0
		fields := http.Header{}
		text := strings.Join(h.Line[:], " ") + "\r\n"
		for _, field := range h.Fields {
			text += field.Name + ": " + field.Value + "\r\n"
			size += len(field.Name) + len(field.Value)
			name := textproto.CanonicalMIMEHeaderKey(field.Name)
			fields[name] = append(fields[name], field.Value)
		}
		if strings.ContainsAny(strings.ReplaceAll(text, "\r\n", ""), "\r\n\x00\x1b\x7f") || size > 64<<10 ||
			size > len(data) {
			t.Fatalf("%q passes as %q", data, text)
		}
		if err := again.read(bufio.NewReader(strings.NewReader(text+"\r\n")), answer); err != nil ||
			!reflect.DeepEqual(h, again) {
			t.Fatalf("%q is read again as %+v, %v", text, again, err)
		}
		data = bytes.TrimPrefix(bytes.TrimPrefix(data, []byte("\r")), []byte("\n")) // an empty line
		in := bufio.NewReader(bytes.NewReader(data))
		if answer {
			if res, err := http.ReadResponse(in, nil); err == nil && (res.StatusCode != h.Status ||
				res.Proto != h.Line[0]) {
				t.Fatalf("%q is %+v, for net/http %+v", data, h, res)
			}
		} else if req, err := http.ReadRequest(in); err == nil {
			got := [3]string{req.Method, req.RequestURI, req.Proto}
			if got != h.Line || req.Host != h.Get("Host") && !strings.Contains(h.Line[1], "//") {
				t.Fatalf("%q is %+v, for net/http %+v", data, h, req)
			}
		}
		lines := textproto.NewReader(bufio.NewReader(bytes.NewReader(data)))
		lines.ReadLine()
		if oracle, err := lines.ReadMIMEHeader(); err == nil && !reflect.DeepEqual(http.Header(oracle),
			fields) {
			t.Fatalf("%q has %v, for net/textproto %v", data, fields, oracle)
		}
	})
}

// A stub is a connection of which only the reading works.
type stub struct {
	net.Conn
	io.Reader
}

func (s stub) Read(p []byte) (int, error)       { return s.Reader.Read(p) }
func (s stub) SetDeadline(time.Time) error      { return nil }
func (s stub) SetReadDeadline(time.Time) error  { return nil }
func (s stub) SetWriteDeadline(time.Time) error { return nil }
func (s stub) Close() error                     { return nil }
func (s stub) RemoteAddr() net.Addr             { return &net.TCPAddr{} }

func FuzzChunked(f *testing.F) {
	for _, text := range []string{"0\r\n\r\n", "5\r\nhello\r\n0\r\nX: y\r\n\r\n",
		"5;a=\"b\" \r\nhello\r\nA\r\n0123456789\r\n0;x\r\n\r\n",
		"5\nhello\n0\n\n", "+5\r\nhello\r\n0\r\n\r\n", "ffffffffffffffff\r\n", "1\r\naX\r\n0\r\n\r\n",
		"0_0\r\n\r\n", "1 \t\r\na\r\n00\r\n\r\n"} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		read := func(r io.Reader) ([]byte, error) {
			return io.ReadAll(newBody(newConn(stub{Reader: r}, ""), -1))
		}
		got, err := read(bytes.NewReader(data))
		slow, slowErr := read(iotest.OneByteReader(bytes.NewReader(data)))
		if !bytes.Equal(got, slow) || (err == nil) != (slowErr == nil) || len(got) > len(data) {
			t.Fatalf("%q is %q, %v, but byte by byte %q, %v", data, got, err, slow, slowErr)
		}
		for n := range min(len(data), 100) { // no part of it is whole
			if _, cut := read(bytes.NewReader(data[:n])); err != nil && cut == nil && bytes.HasPrefix(data,
				[]byte("0\r\n\r\n")) {
				t.Fatalf("%q is whole, and %q is not: %v", data[:n], data, err)
			} else if errors.Is(cut, io.EOF) {
				t.Fatalf("%q ends as if it were whole", data[:n])
			}
		}
		want, oracleErr := io.ReadAll(httputil.NewChunkedReader(bytes.NewReader(data)))
		if err == nil && (oracleErr != nil || !bytes.Equal(got, want)) {
			t.Fatalf("%q is %q, for net/http %q, %v", data, got, want, oracleErr)
		}
	})
}

func FuzzFileName(f *testing.F) {
	for _, pair := range [][2]string{{"h/a/b", "h/a_b"}, {"h/A", "h/a"}, {"h/%2f", "h//"}, {"con", "CON"},
		{"h/..", "../h"},
		{strings.Repeat("a", 300), strings.Repeat("a", 301)}, {"h/" + strings.Repeat("é", 99),
			"h/+0123456789abcdef"}} {
		f.Add(pair[0], pair[1])
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		if strings.ContainsFunc(a+b, func(r rune) bool { return r <= ' ' }) || a == "" || b == "" {
			return // no URL has them
		}
		x, y := fileName(a), fileName(b)
		goodName(t, x)
		if a != b && strings.EqualFold(x, y) || a == b && x != y {
			t.Fatalf("%q and %q have the names %s and %s", a, b, x, y)
		}
	})
}

func BenchmarkHit(b *testing.B)  { bench(b, "Cache-Control: max-age=9999") }
func BenchmarkMiss(b *testing.B) { bench(b, "Cache-Control: no-store") }

// bench asks for a small page on each of some lasting connections, over loopback, as quick as it goes.
func bench(b *testing.B, fields string) {
	p := start(b)
	o := script(b, "HTTP/1.1 200 OK\r\n"+fields+"\r\nContent-Type: text/html\r\n"+
		"Content-Length: 1000\r\n\r\n"+strings.Repeat("x", 1000))
	text := "GET http://" + o.host + "/page.html HTTP/1.1\r\nHost: " + o.host +
		"\r\nUser-Agent: bench\r\n\r\n"
	p.say(strings.Replace(text, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1))
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		w := p.dial()
		w.SetDeadline(time.Time{})
		for pb.Next() {
			w.say(text)
			if head(w.r) == "" {
				b.Error("no answer")
				return
			}
			w.r.Discard(1000)
		}
	})
}
