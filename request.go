package main

// HTTP/1.1 messages on a connection (RFC 9110, RFC 9112): how a head is read
// and checked, where a body ends, how both are written, and how an origin is
// asked. Nothing in this file knows what a cache is.
//
// Its story comes first: the messages, readRequest and readResponse, the body
// that follows a head, writeResponse and writeRequest, and roundTrip, which
// asks an origin. Below that stand tunnels, the connection itself, the strict
// rules of parsing, and small helpers.

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A Field is one line of a head.
type Field struct{ Name, Value string }

// A Header holds the fields of a head in the order in which they came.
type Header []Field

// A Request is what a client asks for. It does not change once it has been
// read; what an origin gets is built from it by writeRequest.
type Request struct {
	Method, Target, Proto string // as they stand in the first line
	Header
	Host   string // what the Host field names, as host:port; empty if there is none
	URL    URL    // what is asked for
	Direct bool   // we are asked as a server and not as a proxy: Target is a path or "*"
	Body   *body
}

// A Response is an answer, wherever it comes from: an origin, the cache, or a
// page of our own. What a client gets is built from it by writeResponse.
type Response struct {
	Proto  string // empty if it is a page of our own
	Status int
	Reason string
	Header
	Length int64 // bytes of the body (for HEAD: of the one it would have), -1 if unknown
	Body   io.ReadCloser
	Ready  bool       // the whole body is here, and reading it does not wait
	Origin netip.Addr // where it has just come from, unless it is from the store
}

// A URL is the part of an http URL that leads to a resource. It has neither
// fragment nor password.
type URL struct {
	Authority string // host:port in one spelling, as "example.com:80" or "[::1]:8080"
	Path      string // path and query, or "*"
}

// A statusError is an error that a client may be told: a status code and one
// sentence. Any other error is the origin's, and becomes a 502 or 504.
type statusError struct {
	code int
	text string
}

// errSilent says that a connection was closed before the first byte of a
// message, as an idle one may be at any time. If that was a client's, there is
// nothing to answer.
var errSilent = errors.New("closed the connection without an answer")

// readRequest reads the head of the next request and determines where its body
// ends. A request that two programs might understand differently is refused,
// not repaired, because request smuggling lives on such differences (RFC 9112
// §11.2). With a statusError the request holds what was understood so far, and
// the client is to be told. After any other error there is no request to answer.
func readRequest(c *conn) (req *Request, err error) {
	req = new(Request)
	req.Header, err = c.readHead(false, req.parseLine)
	if err != nil {
		return req, err
	}
	if err := req.parseTarget(); err != nil {
		return req, err
	}
	if err := req.parseHost(); err != nil {
		return req, err
	}
	length, chunked, err := findFraming(req.Proto, req.Header, false)
	if err != nil {
		return req, err
	}
	if req.Method == "CONNECT" { // all that follows belongs to the tunnel
		length = -1
		chunked = false
	}
	req.Body = newBody(c, length, chunked)
	return req, req.Body.readFirstChunk()
}

// ownPath returns the path of a request to the proxy itself, without its query, and
// is empty for all others.
func (req *Request) ownPath() string {
	if !req.Direct {
		return ""
	}
	path, _, _ := strings.Cut(req.Target, "?")
	return path
}

// hasBody reports whether a body follows the head.
func (req *Request) hasBody() bool { return req.Body.length != 0 }

// readResponse reads the head of a response to a method and finds out where
// its body ends. Its errors are about the origin: the caller says which.
func readResponse(c *conn, method string) (res *Response, err error) {
	res = &Response{Origin: c.peer}
	res.Header, err = c.readHead(true, res.parseLine)
	if err != nil {
		return nil, err
	}
	length, chunked, err := findFraming(res.Proto, res.Header, true)
	if err != nil {
		return nil, err
	}
	if bodiless(res.Status) {
		length = 0
	}
	res.Length = length
	if method == "HEAD" {
		length = 0
	}
	res.Ready = length >= 0 && length <= int64(c.in.Buffered())
	res.Body = newBody(c, length, chunked)
	return res, nil
}

// readHead reads a first line, which parseLine is given, and the fields of a
// head. One empty line before that is skipped (RFC 9112 §2.2). From its first
// byte on the head has to be whole within headWait, however its bytes trickle
// in: until then progress does not move the deadline.
func (c *conn) readHead(response bool, parseLine func(string) error) (Header, error) {
	c.beforeWait = nil // no body is being copied any more
	if _, err := c.in.Peek(1); os.IsTimeout(err) {
		return nil, err
	} else if err != nil {
		return nil, errSilent
	}
	buffered, _ := c.in.Peek(c.in.Buffered())
	if !bytes.Contains(buffered, []byte("\r\n\r\n")) {
		c.nextMove.Store(never)
		c.SetDeadline(time.Now().Add(headWait))
	}
	lines := lineReader{in: c.in, room: maxHead, tooLong: 414}
	line := lines.next()
	if line == "" {
		line = lines.next()
	}
	lines.fail(parseLine(line))
	lines.tooLong = 431
	header := lines.header(response)
	if os.IsTimeout(lines.err) && !response {
		lines.err = errorf(408, "the head has not come within %v", headWait)
	}
	c.nextMove.CompareAndSwap(never, 0) // from now on progress moves the deadline again
	return header, lines.err
}

// readTranscript reads the heads of a request and of the response to it, which
// stand one behind the other, and returns how many bytes they take.
func readTranscript(in *bufio.Reader) (*Request, *Response, int64, error) {
	const room = 4 * maxHead
	req, res := new(Request), new(Response)
	lines := lineReader{in: in, room: room}
	lines.fail(req.parseLine(lines.next()))
	req.Header = lines.header(false)
	lines.fail(res.parseLine(lines.next()))
	res.Header = lines.header(false)
	return req, res, int64(room - lines.room), lines.err
}

// A body is what follows a head, decoded. Reading it returns io.EOF only when it
// has ended as its head promised; the error of a body that breaks off is a
// statusError.
type body struct {
	c       *conn
	length  int64       // bytes, -1 if only the end will tell: of the chunks or of the connection
	chunked bool        // it comes in chunks
	left    int64       // bytes to come: of the body (maxLength if unknown) or of the chunk
	lines   lineReader  // reads what stands between chunks
	begun   bool        // there was a chunk: a CR LF follows its data
	whole   atomic.Bool // it has ended as promised; nothing is touched after that
	release func()      // ends the use of the connection to an origin; nil for a client's
}

func newBody(c *conn, length int64, chunked bool) *body {
	b := &body{c: c, length: length, chunked: chunked, left: max(0, length)}
	b.lines = lineReader{in: c.in, room: maxHead, tooLong: 400, crlf: true}
	if length < 0 && !chunked {
		b.left = maxLength
	}
	b.whole.Store(length == 0)
	return b
}

// Read reads from the body, and only from that: what follows on the connection
// is the next message.
func (b *body) Read(p []byte) (int, error) {
	if b.chunked && b.left == 0 && !b.whole.Load() {
		if err := b.nextChunk(); err != nil {
			return 0, err
		}
	}
	if b.whole.Load() {
		return 0, io.EOF
	}
	n, err := b.c.in.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	untilClose := b.length < 0 && !b.chunked
	if !b.chunked && b.left == 0 || untilClose && err == io.EOF {
		b.whole.Store(true)
		return n, io.EOF
	}
	return n, b.brokenBy(err)
}

// nextChunk reads the lines between the data of two chunks, and sets left to the
// size of the next one; after the last chunk the body is whole (RFC 9112 §7.1).
// Chunk extensions and trailers are dropped, as nothing may depend on them (RFC
// 9110 §6.5.1). All these lines together may take maxHead bytes, and each chunk
// gives back up to 16 of them, so that a sender can't keep us reading without
// sending data.
func (b *body) nextChunk() error {
	if b.begun && b.lines.next() != "" {
		b.lines.fail(badRequest("a chunk is longer than its size says"))
	}
	b.begun = true
	b.lines.room = min(b.lines.room+16, maxHead)
	line := b.lines.next()
	size, _, _ := strings.Cut(line, ";")
	size = strings.TrimRight(size, " \t") // some servers pad it
	n, err := strconv.ParseUint(size, 16, 60)
	if err != nil || len(size) > 16 {
		b.lines.fail(badRequest("malformed chunk size %+.200q", line))
	}
	b.left = int64(n)
	if n == 0 && b.lines.err == nil {
		b.lines.header(false) // the trailers
		b.whole.Store(b.lines.err == nil)
	}
	return b.brokenBy(b.lines.err)
}

// brokenBy returns the error of a body that err has cut short. Its status counts
// only if the body is that of a request.
func (b *body) brokenBy(err error) error {
	switch {
	case err == nil || isStatusError(err):
		return err
	case os.IsTimeout(err):
		return errorf(408, "the rest of the body has not come within %v", b.c.limit)
	}
	return badRequest("the body breaks off")
}

// readFirstChunk reads the size of the first chunk if it is already here. So a
// malformed one is refused before anything of the request is sent on.
func (b *body) readFirstChunk() error {
	buffered, _ := b.c.in.Peek(b.c.in.Buffered())
	if !b.chunked || !bytes.Contains(buffered, []byte("\n")) {
		return nil
	}
	err := b.nextChunk()
	if b.whole.Load() {
		b.length = 0 // it is empty, and is sent on with Content-Length: 0
	}
	return err
}

// Close ends the use of an origin's response; nobody closes the body of a request.
// It may be called while another goroutine reads from the body.
func (b *body) Close() error {
	b.release()
	return nil
}

// consumed reports whether the body has been read to its end, so that the
// next message follows on the connection.
func (b *body) consumed() bool { return b.whole.Load() }

// A waiter is a body whose reads may have to wait. Before one does, it flushes
// the connection to which its bytes are copied: small pieces leave together, and
// none of them is held back until the next one comes.
type waiter interface{ flushBeforeWait(to flusher) }

// A flusher sends at once what has been written to it.
type flusher interface{ Flush() error }

func (b *body) flushBeforeWait(to flusher) { b.c.beforeWait = to }

// writeResponse sends a client the answer to req: the head, and then the body
// as it comes. It returns an error if the client does not get all of it. It
// also reports whether another request may follow on the connection, as the
// client has been told; keep says whether the caller wants that.
func writeResponse(c *conn, req *Request, res *Response, keep bool) (bool, error) {
	http10 := req.Proto == "HTTP/1.0"
	hasBody := req.Method != "HEAD" && !bodiless(res.Status)
	chunks := hasBody && res.Length < 0 && !http10
	endsByClose := hasBody && res.Length < 0 && http10
	keep = keep && !endsByClose
	more := make(Header, 0, 2)
	switch {
	case chunks:
		more = append(more, Field{"Transfer-Encoding", "chunked"})
	case res.Length >= 0 && !bodiless(res.Status):
		more = append(more, Field{"Content-Length", strconv.FormatInt(res.Length, 10)})
	}
	switch {
	case !keep:
		more = append(more, Field{"Connection", "close"})
	case http10:
		more = append(more, Field{"Connection", "keep-alive"})
	}
	header := res.Header
	if res.Proto != "" { // it is not a page of our own
		header = res.endToEnd()
	}
	// The version is ours, not the one that the origin speaks (RFC 9110 §6.2).
	c.writeHead("HTTP/1.1 "+strconv.Itoa(res.Status)+" "+res.Reason, header, more)
	if !hasBody {
		return keep, c.Flush()
	}
	if !endsByClose {
		return keep, writeBody(c, res.Body, res.Length, chunks)
	}

	// A client of HTTP/1.0 takes a normal close for the end of such a body. Until
	// all of it is written, a close is to be a reset, even if this process is killed.
	c.tcp().SetLinger(0)
	err := writeBody(c, res.Body, res.Length, false)
	if err != nil {
		c.Close()
	}
	c.tcp().SetLinger(-1)
	return false, err
}

// writeBody sends a body of length bytes, or of unknown length (-1), each
// piece as it comes.
func writeBody(c *conn, from io.Reader, length int64, chunks bool) (err error) {
	if source, waits := from.(waiter); waits {
		source.flushBeforeWait(c)
	}
	var to io.Writer = c
	if chunks {
		to = chunkWriter{c}
	}
	err = copyBody(to, from, length)
	if err == nil && chunks {
		_, err = c.Write([]byte("0\r\n\r\n"))
	}
	flushErr := c.Flush() // if the body broke off, what there is of it goes out
	return cmp.Or(err, flushErr)
}

// copyBody copies a body of length bytes, or of unknown length (-1). CopyN takes
// a buffer no larger than the body, where Copy takes one of 32 KiB. But CopyN would
// hide the WriteTo of a body in memory, so that is for Copy.
func copyBody(to io.Writer, from io.Reader, length int64) (err error) {
	if _, writesItself := from.(io.WriterTo); writesItself || length < 0 {
		_, err = io.Copy(to, from)
	} else {
		_, err = io.CopyN(to, from, length)
	}
	return err
}

// A chunkWriter writes each piece that it is given as one chunk.
type chunkWriter struct{ c *conn }

func (w chunkWriter) Write(p []byte) (int, error) {
	w.c.out = fmt.Appendf(w.c.out, "%x\r\n", len(p))
	w.c.Write(p) // the next Write returns its error
	_, err := w.c.Write([]byte("\r\n"))
	return len(p), err
}

// writeRequest writes the head of a request as its origin is to see it.
func writeRequest(c *conn, req *Request, via Field) error {
	more := Header{via}
	if req.Body.length < 0 {
		more = append(more, Field{"Transfer-Encoding", "chunked"})
	} else if req.Has("Content-Length") || req.Has("Transfer-Encoding") {
		more = append(more, Field{"Content-Length", fmt.Sprint(req.Body.length)})
	}
	c.writeHead(req.Method+" "+req.URL.Path+" HTTP/1.1",
		Header{{"Host", req.URL.Host()}}, req.endToEnd("Host"), more)
	return c.Flush()
}

// An originPool asks origins, and keeps idle connections to them.
type originPool struct {
	pseudonym string       // in Via
	keepInner bool         // whether connections to inner addresses may be kept
	guard     func(func()) // runs what a goroutine does, and survives its bugs

	sync.Mutex            // guards the rest
	idle       []idleConn // the one that was used last stands last
}

type idleConn struct {
	*conn
	authority string
	since     time.Time
}

// newOriginPool makes a pool for a proxy that calls itself pseudonym.
func newOriginPool(pseudonym string, keepInner bool, guard func(func())) *originPool {
	return &originPool{pseudonym: pseudonym, keepInner: keepInner, guard: guard}
}

// via returns what we add to a message (RFC 9110 §7.6.3).
func (p *originPool) via(proto string) Field {
	return Field{"Via", strings.TrimPrefix(proto, "HTTP/") + " " + p.pseudonym}
}

// hasSent reports whether a request has come from here before.
func (p *originPool) hasSent(req *Request) bool {
	return strings.Contains(strings.Join(req.Values("Via"), ","), p.pseudonym)
}

// roundTrip sends a request to its origin and returns the final response, of
// which only the head has been read; closing its body gives the connection
// back. Interim responses go to interim. An address is only dialed if permit
// returns no error for it.
//
// An idle connection is only used for a request that may be sent twice (RFC
// 9110 §9.2.2): if the origin was just closing it, a new one is tried.
func (p *originPool) roundTrip(req *Request, permit func(netip.Addr) error,
	interim func(*Response)) (*Response, error) {
	idempotent := slices.Contains([]string{"GET", "HEAD", "OPTIONS", "PUT", "DELETE"}, req.Method)
	repeatable := idempotent && !req.hasBody()
	if repeatable && !authenticatesConnection(req.Header, "Authorization") {
		if idle := p.take(req.URL.Authority); idle != nil {
			if res, err := p.ask(idle, req, interim); err != errSilent {
				return res, err
			} // else the origin was just closing it
		}
	}
	c, err := dial(req.URL.Authority, permit)
	if err != nil {
		return nil, err
	}
	return p.ask(c, req, interim)
}

// ask sends a request on a connection to its origin, and reads the head of
// the final response. If that fails it closes the connection.
func (p *originPool) ask(c *conn, req *Request, interim func(*Response)) (*Response, error) {
	sendErr := writeRequest(c, req, p.via(req.Proto))
	uploads := sendErr == nil && !req.Body.consumed()
	var uploaded chan error
	if uploads {
		uploaded = make(chan error, 1)
		go p.guard(func() { uploaded <- upload(c, req.Body) })
	}
	// An origin may answer before it has all of the request (RFC 9112 §9.5),
	// even where it does not take any more of it.
	res, err := readFinalResponse(c, req.Method, interim)
	if uploads {
		select {
		case sendErr = <-uploaded:
		case <-time.After(uploadWait):
			sendErr = errors.New("the upload goes on")
		}
	}
	if err != nil {
		c.Close()
		if isStatusError(sendErr) {
			return nil, sendErr // the client's fault
		}
		if isStatusError(err) {
			err = errors.New(err.Error()) // no statusError: it is not the client's fault
		}
		return nil, err
	}

	reusable := sendErr == nil && p.mayKeep(req, res)
	answer := res.Body.(*body)
	answer.release = sync.OnceFunc(func() {
		// The origin must not have said anything beyond the end of its response.
		if reusable && answer.whole.Load() && c.in.Buffered() == 0 {
			p.put(c, req.URL.Authority)
		} else {
			c.Close()
		}
	})
	return res, nil
}

// mayKeep reports whether a connection may be kept after a response that ends
// well. An origin that authenticates a connection does so for one user (RFC 4559).
// With Content-Length beside Transfer-Encoding the end of a response is in doubt.
func (p *originPool) mayKeep(req *Request, res *Response) bool {
	return keepsAlive(res.Proto, res.Header) &&
		!authenticatesConnection(req.Header, "Authorization") &&
		!authenticatesConnection(res.Header, "WWW-Authenticate") &&
		(p.keepInner || !isInner(res.Origin)) &&
		!(res.Has("Content-Length") && res.Has("Transfer-Encoding"))
}

// readFinalResponse passes what comes before the final response to interim.
func readFinalResponse(c *conn, method string, interim func(*Response)) (*Response, error) {
	for n := 0; ; n++ {
		res, err := readResponse(c, method)
		if err != nil || res.Status >= 200 {
			return res, err
		}
		if n == maxInterim {
			return nil, errors.New("its interim responses do not end")
		}
		interim(res)
	}
}

// upload sends the body of a request, while the response may already be coming
// back. If the body breaks off, the connection is closed: a part must not be
// taken for the whole. If the origin stops reading, the connection stays open, as the
// response may still be on the way.
func upload(to *conn, from *body) error {
	err := writeBody(to, from, from.length, from.chunked)
	if isStatusError(err) {
		to.Close()
	}
	return err
}

// take returns an idle connection to an origin, or nil.
func (p *originPool) take(authority string) *conn {
	p.Lock()
	defer p.Unlock()
	for i, idle := range slices.Backward(p.idle) { // what is deleted has been seen by then
		if idle.authority == authority {
			p.idle = slices.Delete(p.idle, i, i+1)
			if alive(idle.conn, syscall.Read) {
				return idle.conn
			}
			idle.Close()
		}
	}
	return nil
}

// put keeps a connection for the next request.
func (p *originPool) put(c *conn, authority string) {
	c.beforeWait = nil
	p.Lock()
	p.idle = append(p.idle, idleConn{c, authority, time.Now()})
	p.Unlock()
	p.closeIdle()
}

// closeIdle closes the connections that are too many, or that nobody has used
// for a while.
func (p *originPool) closeIdle() {
	p.Lock()
	defer p.Unlock()
	for len(p.idle) > 0 && (len(p.idle) > maxIdle || time.Since(p.idle[0].since) > stallWait) {
		p.idle[0].Close()
		p.idle = p.idle[1:]
	}
}

// alive reports whether an idle connection is open and the origin has said nothing on
// it, which would be taken for the next response: reading its socket has to say that
// it would block. That costs 0.5 µs. Windows has no such read, and takes every
// connection for alive. Package syscall names a socket by an int or a Handle, hence
// the type parameter.
func alive[FD ~int | ~uintptr](c *conn, read func(FD, []byte) (int, error)) bool {
	raw, err := c.tcp().SyscallConn()
	if err != nil || runtime.GOOS == "windows" {
		return err == nil
	}
	var readErr error // stays nil if there is something to read, or the end
	raw.Read(func(fd uintptr) bool {
		_, readErr = read(FD(fd), make([]byte, 1))
		return true
	})
	return readErr == syscall.EAGAIN
}

// dial connects to host:port. Names are looked up here, and permit sees the
// address that is really dialed.
func dial(authority string, permit func(netip.Addr) error) (*conn, error) {
	dialer := net.Dialer{Timeout: dialWait}
	dialer.Control = func(_, address string, _ syscall.RawConn) error {
		to := netip.MustParseAddrPort(address) // an address by now, and not a name
		return permit(to.Addr().Unmap().WithZone(""))
	}
	nc, err := dialer.Dial("tcp", authority)
	if err != nil {
		return nil, err
	}
	return newConn(nc), nil
}

// join makes a tunnel of two connections: bytes go both ways until both sides
// have ended.
func join(a, b *conn, guard func(func())) {
	for _, c := range []*conn{a, b} {
		c.limit = tunnelWait
		c.nextMove.Store(0)
	}
	var wg sync.WaitGroup
	wg.Go(func() { guard(func() { pipe(a, b) }) })
	pipe(b, a)
	wg.Wait()
}

// pipe carries what comes on one connection to the other, and after that the
// news that no more comes.
func pipe(to, from *conn) {
	if err := writeBody(to, newBody(from, -1, false), -1, false); err != nil {
		to.Close()
	} else {
		to.tcp().CloseWrite()
	}
}

// A conn is a connection to a client or an origin on which no read or write
// waits for longer than limit. Small writes are gathered until Flush.
type conn struct {
	net.Conn
	peer       netip.Addr // whom it leads to
	in         *bufio.Reader
	out        []byte        // written, but not yet sent
	pair       [2][]byte     // what send is writing; kept here, as its garbage took 15 MiB of memory
	buffers    net.Buffers   // the same, as WriteTo takes it
	err        error         // what ended writing
	sent       int64         // bytes
	beforeWait flusher       // is flushed before a read that may wait; may be nil
	limit      time.Duration // the longest time without progress
	nextMove   atomic.Int64  // when the deadline is to be moved next, in Unix nanoseconds
}

// newConn takes a connection over.
func newConn(nc net.Conn) *conn {
	c := &conn{Conn: nc, limit: stallWait}
	c.in = bufio.NewReader(c)
	c.peer = nc.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().WithZone("")
	return c
}

// address returns the address of the other side.
func (c *conn) address() netip.Addr { return c.peer }

// bytesSent returns how much has been sent so far.
func (c *conn) bytesSent() int64 { return c.sent }

func (c *conn) tcp() *net.TCPConn { return c.Conn.(*net.TCPConn) }

// progress gives reads and writes limit from now on. As moving a deadline costs
// 0.3 µs, it is moved at most once in a sixteenth of that, and by so much more.
func (c *conn) progress() {
	now := time.Now()
	if now.UnixNano() >= c.nextMove.Load() {
		c.nextMove.Store(now.Add(c.limit / 16).UnixNano())
		c.SetDeadline(now.Add(c.limit + c.limit/16))
	}
}

func (c *conn) Read(p []byte) (int, error) {
	if c.beforeWait != nil {
		c.beforeWait.Flush() // an error comes back from the next Write there
	}
	c.progress()
	return c.Conn.Read(p)
}

// Write gathers what is small; a system call costs 5 µs.
func (c *conn) Write(p []byte) (int, error) {
	if len(c.out)+len(p) > maxGathered {
		return len(p), c.send(p)
	}
	c.out = append(c.out, p...)
	return len(p), c.err
}

// Flush sends what has been gathered.
func (c *conn) Flush() error { return c.send(nil) }

// send sends what has been gathered, and p behind it in the same system call,
// in pieces that even a slow reader takes within the limit.
func (c *conn) send(p []byte) error {
	for c.err == nil && len(c.out)+len(p) > 0 {
		piece := p[:min(len(p), maxPiece)]
		p = p[len(piece):]
		c.progress()
		c.pair = [2][]byte{c.out, piece}
		c.buffers = c.pair[:]
		n, err := c.buffers.WriteTo(c.Conn)
		c.sent += n
		c.err = err
		c.out = c.out[:0]
	}
	return c.err
}

// writeHead writes a first line, and fields from several headers.
func (c *conn) writeHead(line string, headers ...Header) {
	c.out = append(c.out, line+"\r\n"...)
	for _, h := range headers {
		c.out = h.appendTo(c.out)
	}
	c.out = append(c.out, "\r\n"...)
}

// drain prepares a close: it lets the client read the last response. Closing a
// connection resets it if bytes from the client are unread, and what the client
// has not read by then is lost (RFC 9112 §9.6).
func (c *conn) drain() {
	c.tcp().CloseWrite()
	c.SetDeadline(time.Now().Add(lingerWait))
	io.CopyN(io.Discard, c.Conn, maxDrained) // not from c, which would move the deadline
}

// Sizes, counts and waits.
const (
	maxHead     = 64 << 10         // bytes of a head; browsers send up to 16 KiB of cookies
	maxFields   = 256              // of a head; browsers send about 20
	maxInterim  = 256              // interim responses to a request
	maxIdle     = 512              // idle connections to origins, of 8 KiB each
	maxGathered = 4 << 10          // bytes that are copied to be sent with others
	maxPiece    = 256 << 10        // bytes that a reader has to take within stallWait
	maxDrained  = 1 << 20          // bytes that are read and dropped before a close
	maxLength   = 1<<63 - 1        // bytes of a body
	never       = 1<<63 - 1        // a time, in Unix nanoseconds
	uploadWait  = time.Second / 5  // for the last bytes of a request whose response has overtaken them
	dialWait    = 10 * time.Second // for a connection to an origin
	headWait    = 30 * time.Second // for a head, from its first byte to its last
	stallWait   = 60 * time.Second // without any progress, and for idle connections
	tunnelWait  = 15 * time.Minute // without any progress in either direction of a tunnel
	lingerWait  = 2 * time.Second  // for a client to close a connection that we have ended
)

// A lineReader reads lines. Its first error sticks, and after that every line
// is empty, so that a parser checks err once, at its end.
type lineReader struct {
	in      *bufio.Reader
	room    int  // bytes that lines may still take
	tooLong int  // the status code when there is no room left
	crlf    bool // refuse a line that ends in LF alone
	err     error
}

// fail sets the error, unless there has been one before.
func (r *lineReader) fail(err error) { r.err = cmp.Or(r.err, err) }

// next reads a line, without its end. Control characters are refused, and so
// is a bare CR: another program might see the end of a line there (RFC 9112
// §2.2).
func (r *lineReader) next() string {
	if r.err != nil {
		return ""
	}
	part, err := r.in.ReadSlice('\n')
	line := string(part)
	for err == bufio.ErrBufferFull && len(line) <= r.room {
		part, err = r.in.ReadSlice('\n')
		line += string(part)
	}
	r.room -= len(line)
	line, isLine := strings.CutSuffix(line, "\n")
	line, isCRLF := strings.CutSuffix(line, "\r")
	isControl := func(b byte) bool { return b < ' ' && b != '\t' || b == 0x7f }
	switch {
	case r.room < 0:
		r.err = errorf(r.tooLong, "more than %d bytes beside the body", maxHead)
	case !isLine:
		r.err = err
	case r.crlf && !isCRLF:
		r.err = badRequest("a line that does not end in CR LF: %+.200q", line)
	case slices.ContainsFunc([]byte(line), isControl):
		r.err = badRequest("a control character in a line: %+.200q", line)
	default:
		return line
	}
	return ""
}

// header reads fields up to the empty line that ends them. A space between the
// name of a field and its colon is removed from a response, and refused in a
// request (RFC 9112 §5.1). A line that begins with a space, which would continue
// the one before, is always refused (§5.2).
func (r *lineReader) header(response bool) Header {
	header := make(Header, 0, 8)
	for line := r.next(); line != ""; line = r.next() {
		name, value, found := strings.Cut(line, ":")
		if response {
			name = strings.TrimRight(name, " \t")
		}
		if !found || !isToken(name) {
			r.fail(badRequest("malformed field %+.200q", line))
		}
		if len(header) == maxFields {
			r.fail(errorf(431, "more than %d fields", maxFields))
		}
		header = append(header, Field{name, strings.Trim(value, " \t")})
	}
	return header
}

// parseLine reads a request line: three parts with one space between them
// (RFC 9112 §3).
func (req *Request) parseLine(line string) error {
	var rest string
	req.Method, rest, _ = strings.Cut(line, " ")
	req.Target, req.Proto, _ = strings.Cut(rest, " ")
	if !isToken(req.Method) || req.Target == "" || strings.Contains(line, "\t") {
		return badRequest("malformed request line %+.200q", line)
	}
	return checkVersion(req.Proto)
}

// parseLine reads a status line (RFC 9112 §4). 101 is refused, as no Upgrade is
// passed on.
func (res *Response) parseLine(line string) error {
	var code string
	res.Proto, code, _ = strings.Cut(line, " ")
	code, res.Reason, _ = strings.Cut(code, " ")
	status, err := strconv.ParseUint(code, 10, 16)
	if err != nil || len(code) != 3 || status < 100 || status == 101 {
		return badRequest("malformed status line %+.200q", line)
	}
	res.Status = int(status)
	return checkVersion(res.Proto)
}

// checkVersion accepts HTTP/1.0 and every later minor version of HTTP/1.
func checkVersion(proto string) error {
	switch {
	case !strings.HasPrefix(proto, "HTTP/"):
		return badRequest("not a version of HTTP: %+.200q", proto)
	case len(proto) != len("HTTP/1.1"), proto < "HTTP/1.0", proto > "HTTP/1.9":
		return errorf(505, "unknown version %+.200q", proto)
	}
	return nil
}

// parseTarget reads the request target in its four forms (RFC 9112 §3.2).
func (req *Request) parseTarget() (err error) {
	target := req.Target
	switch {
	case req.Method == "CONNECT":
		req.URL.Authority, err = parseAuthority(target, "")
	case target[0] == '/', target == "*" && req.Method == "OPTIONS":
		req.Direct = true
		req.URL.Path = target
	case len(target) >= 7 && strings.EqualFold(target[:7], "http://"):
		req.URL, err = parseURL(target[7:])
		if req.Method == "OPTIONS" && !strings.ContainsAny(target[7:], "/?#") {
			req.URL.Path = "*" // the server as a whole (RFC 9112 §3.2.4)
		}
	default:
		err = badRequest("not an http:// URL: %+.200q", target)
	}
	return err
}

// parseURL takes apart a URL without its scheme. The fragment is not for us
// (RFC 9110 §7.1), and a password in front of the host is not sent anywhere:
// wget, Java and others send both. A backslash ends the host for some programs
// and not for others, so it is refused.
func parseURL(rest string) (URL, error) {
	rest, _, _ = strings.Cut(rest, "#")
	end := strings.IndexAny(rest+"/", "/?")
	host, path := rest[:end], rest[end:]
	if _, behind, found := strings.Cut(host, "@"); found && !strings.Contains(host, `\`) {
		host = behind
	}
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	authority, err := parseAuthority(host, "80")
	if err != nil {
		return URL{}, err
	}
	return URL{authority, path}, nil
}

// parseHost checks that the request names one host. Only HTTP/1.0 may name
// none (RFC 9112 §3.2).
func (req *Request) parseHost() (err error) {
	hosts := req.Values("Host")
	switch {
	case len(hosts) == 0 && req.Proto == "HTTP/1.0":
	case len(hosts) != 1:
		err = badRequest("Host must name one host, not %+.200q", strings.Join(hosts, ", "))
	case hosts[0] == req.URL.Host(): // as it should; to parse it again takes 0.3 µs
		req.Host = req.URL.Authority
	default:
		req.Host, err = parseAuthority(hosts[0], "80")
	}
	return err
}

// parseAuthority returns host[:port] in one spelling: in lower case, IPv6
// addresses as in RFC 5952, and always with a port: usual if s names none. If
// usual is empty, s has to name one.
func parseAuthority(s, usual string) (string, error) {
	host, port := s, ""
	if colon := strings.LastIndexByte(s, ':'); colon > strings.LastIndexByte(s, ']') {
		host, port = s[:colon], s[colon+1:]
	}
	number, err := strconv.ParseUint(cmp.Or(port, usual), 10, 16)
	valid := isHostName(host)
	if literal, isLiteral := strings.CutPrefix(host, "["); isLiteral {
		ip, _ := netip.ParseAddr(strings.TrimSuffix(literal, "]"))
		valid = ip.Is6() && ip.Zone() == "" && strings.HasSuffix(literal, "]")
		host = "[" + ip.String() + "]"
	}
	if !valid || err != nil || number == 0 {
		return "", badRequest("not a host and a port: %+.200q", s)
	}
	return strings.ToLower(host) + ":" + strconv.FormatUint(number, 10), nil
}

// isHostName reports whether s may be the name of a host, or an IPv4 address.
func isHostName(s string) bool {
	strange := func(c rune) bool { return !strings.ContainsRune(hostCharacters, c) }
	return s != "" && !strings.ContainsFunc(s, strange)
}

const hostCharacters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._"

// findFraming decides where the body of a message ends, in the order of RFC 9112
// §6.3. It returns the length of the body, 0 if there is none and -1 if only its
// end will tell, and whether it comes in chunks.
func findFraming(proto string, h Header, response bool) (int64, bool, error) {
	lengths := h.Values("Content-Length")
	codings := h.Values("Transfer-Encoding")
	coding := strings.Join(codings, ", ")
	if response {
		lengths = slices.Compact(lengths) // which may be repeated
	}
	switch {
	case len(codings) > 0 && len(lengths) > 0 && !response: // smuggling (§11.2)
		return 0, false, badRequest("both Transfer-Encoding and Content-Length")
	case equalFold(coding, "chunked") && proto != "HTTP/1.0":
		return -1, true, nil // in a response it wins over a length
	case response && isToken(coding) && !knownCoding.MatchString(coding):
		return -1, false, nil // an unknown coding is passed on as it is
	case len(codings) > 0:
		return 0, false, errorf(501, "the transfer coding %+.200q in %s is not supported", coding, proto)
	case len(lengths) == 0 && response:
		return -1, false, nil
	case len(lengths) == 0:
		return 0, false, nil
	}
	// Several lengths are several opinions about where the next message begins.
	digits := strings.Join(lengths, ", ")
	length, err := strconv.ParseUint(digits, 10, 62)
	if err != nil {
		return 0, false, badRequest("malformed Content-Length %+.200q", digits)
	}
	return int64(length), false, nil
}

// Transfer codings that we would have to undo, and misspellings of them.
var knownCoding = regexp.MustCompile("(?i)chunk|gzip|deflate|compress|identity")

// bodiless reports whether responses with a status never have a body
// (RFC 9110 §6.4.1).
func bodiless(status int) bool { return status < 200 || status == 204 || status == 304 }

// keepsAlive reports whether the sender of a message leaves its connection
// open for another (RFC 9112 §9.3).
func keepsAlive(proto string, h Header) bool {
	options := append(h.Values("Connection"), h.Values("Proxy-Connection")...)
	return !containsFold(options, "close") &&
		(proto != "HTTP/1.0" || containsFold(options, "keep-alive"))
}

// authenticatesConnection reports whether a field with credentials or a
// challenge shows a scheme that authenticates the whole connection.
func authenticatesConnection(h Header, name string) bool {
	return slices.ContainsFunc(h.Values(name), connectionScheme.MatchString)
}

var connectionScheme = regexp.MustCompile(`(?i)^(NTLM|Negotiate)(\s|$)`)

// isInner reports whether an address is one of those that mean this machine
// whichever it is, or leads to what only its own link reaches, such as
// 169.254.169.254: there cloud providers answer with a machine's credentials.
func isInner(ip netip.Addr) bool {
	return ip.IsLoopback() || ip.IsUnspecified() || ip.IsLinkLocalUnicast() ||
		slices.Contains(metadataAddresses, ip.String())
}

// Metadata services that are not link-local: those of AWS, Google, Alibaba, Oracle and
// Azure.
var metadataAddresses = []string{"fd00:ec2::254", "fd20:ce::254", "100.100.100.200",
	"192.0.0.192", "168.63.129.16"}

// Host returns the authority as the Host field has it: without port 80.
func (u URL) Host() string { return strings.TrimSuffix(u.Authority, ":80") }

// String returns the URL, the host:port of a tunnel, or the path of a request
// to a server.
func (u URL) String() string {
	if u.Authority == "" || u.Path == "" {
		return u.Authority + u.Path
	}
	return "http://" + u.Host() + u.Path
}

// Get returns the value of the first field of a name, empty if there is none.
func (h Header) Get(name string) string {
	for _, f := range h {
		if equalFold(f.Name, name) {
			return f.Value
		}
	}
	return ""
}

// Has reports whether there is a field of a name.
func (h Header) Has(name string) bool {
	for _, f := range h {
		if equalFold(f.Name, name) {
			return true
		}
	}
	return false
}

// Values returns the elements of a list-valued field, from all its lines
// (RFC 9110 §5.6.1). A comma in a quoted string does not separate.
func (h Header) Values(name string) (elements []string) {
	for _, f := range h {
		if equalFold(f.Name, name) {
			elements = appendList(elements, f.Value, ',')
		}
	}
	return elements
}

// appendList splits a value where there is a separator that is not in a quoted
// string.
func appendList(elements []string, value string, separator byte) []string {
	start, quoted := 0, false
	for i := 0; i < len(value); i++ {
		switch {
		case value[i] == '\\' && quoted:
			i++ // the next byte stands for itself
		case value[i] == '"':
			quoted = !quoted
		case value[i] == separator && !quoted:
			elements = append(elements, strings.Trim(value[start:i], " \t"))
			start = i + 1
		}
	}
	return append(elements, strings.Trim(value[start:], " \t"))
}

// Without returns the header without the named fields. Appending to the result
// never changes h. If there is nothing to leave out, as in most hits, nothing is
// copied.
func (h Header) Without(names ...string) Header {
	named := func(f Field) bool { return containsFold(names, f.Name) }
	if !slices.ContainsFunc(h, named) {
		return slices.Clip(h)
	}
	return slices.DeleteFunc(slices.Clone(h), named)
}

// appendTo appends the fields to b, as they stand in a head.
func (h Header) appendTo(b []byte) []byte {
	for _, f := range h {
		b = append(b, f.Name...)
		b = append(b, ": "...)
		b = append(b, f.Value...)
		b = append(b, "\r\n"...)
	}
	return b
}

// The fields that concern one connection only (RFC 9110 §7.6.1), and those
// that tell where a body ends, which each connection says anew.
var hopByHop = []string{"Connection", "Content-Length", "Keep-Alive", "Proxy-Authenticate",
	"Proxy-Authentication-Info", "Proxy-Authorization", "Proxy-Connection", "TE", "Trailer",
	"Transfer-Encoding", "Upgrade"}

// The fields that Connection cannot make hop-by-hop. Routing and caching need
// them; a message that names them there is an attack.
var alwaysEndToEnd = []string{"Host", "Via", "Max-Forwards", "Cache-Control", "Vary"}

// endToEnd returns the fields that are to be passed on, except those in without.
func (h Header) endToEnd(without ...string) Header {
	for _, name := range h.Values("Connection") {
		if !containsFold(alwaysEndToEnd, name) {
			without = append(without, name)
		}
	}
	return h.Without(hopByHop...).Without(without...)
}

func (e *statusError) Error() string { return e.text }

func errorf(code int, format string, args ...any) error {
	return &statusError{code, fmt.Sprintf(format, args...)}
}

func badRequest(format string, args ...any) error { return errorf(400, format, args...) }

func isStatusError(err error) bool {
	var told *statusError
	return errors.As(err, &told)
}

// statusText has the reason phrases of the responses that are made here.
var statusText = map[int]string{200: "OK", 206: "Partial Content", 304: "Not Modified",
	400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
	405: "Method Not Allowed", 407: "Proxy Authentication Required", 408: "Request Timeout",
	414: "URI Too Long", 416: "Range Not Satisfiable", 417: "Expectation Failed",
	431: "Request Header Fields Too Large", 501: "Not Implemented", 502: "Bad Gateway",
	504: "Gateway Timeout", 505: "HTTP Version Not Supported", 508: "Loop Detected"}

// equalFold compares names whatever their case. Unlike strings.EqualFold it
// does not take a Kelvin sign for a k.
func equalFold(a, b string) bool { return len(a) == len(b) && strings.EqualFold(a, b) }

// containsFold reports whether a list has an element, whatever its case.
func containsFold(list []string, s string) bool {
	for _, element := range list { // not ContainsFunc, which takes three times as long
		if equalFold(element, s) {
			return true
		}
	}
	return false
}

// isToken reports whether s may be a method, or the name of a field (RFC 9110
// §5.6.2).
func isToken(s string) bool {
	separates := func(c rune) bool {
		return c <= ' ' || c > '~' || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, c)
	}
	return s != "" && !strings.ContainsFunc(s, separates)
}
