package main

// HTTP/1.1 on the wire (RFC 9110, 9112): heads, where bodies end, connections. Nothing here knows of caching.

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	maxHead    = 64 << 10         // bytes of a head; browsers send up to 16 KiB of cookies
	maxFirst   = 32 << 10         // bytes of its first line; RFC 9112 §3 asks for 8,000 at least
	maxFields  = 256              // lines of it; browsers send about 20
	headWait   = 30 * time.Second // from a head's first byte to its last, however they trickle
	stallWait  = 60 * time.Second // for a request, for an idle connection's use, for any progress
	tunnelWait = 15 * time.Minute // for any progress of a tunnel

	chunked, untilClose = -1, -2 // what framing returns besides a length
)

// An Error is what a client is told where its request cannot be answered.
type Error struct {
	Status int
	Text   string
}

func (e *Error) Error() string { return e.Text }
func refuse(status int, format string, args ...any) error {
	return &Error{status, fmt.Sprintf(format, args...)}
}

// errNoAnswer: the connection ended before the first byte of an answer, as an idle one may at any time.
var errNoAnswer = errors.New("closed the connection without an answer")

// A lineReader reads the lines of a head, or those about chunks. It takes nothing that another program could
// see as the end of a line: that is how requests are smuggled and answers split (RFC 9112 §11). After an
// error, which it keeps, all lines are empty.
type lineReader struct {
	*bufio.Reader
	room, status int  // bytes that may still come, and what refuses more
	strict       bool // a bare LF does not end a line (RFC 9112 §2.2)
	err          error
}

func (l *lineReader) next() string {
	var line []byte
	for more := l.err == nil; more; {
		part, err := l.ReadSlice('\n')
		line, more = append(line, part...), err == bufio.ErrBufferFull && len(line) < l.room
		if err != nil && !more {
			l.err = noEOF(err)
		}
	}
	l.room -= len(line)
	l.check(l.room >= 0 && l.err != bufio.ErrBufferFull, l.status, "a head or its first line is too long")
	text, crlf := strings.CutSuffix(string(line), "\r\n")
	text = strings.TrimSuffix(text, "\n")
	control := strings.ContainsFunc(text, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f })
	if l.check(!control && (crlf || !l.strict), 400, "control character in %.200q", line); l.err != nil {
		return ""
	}
	return text
}

func (l *lineReader) check(ok bool, status int, format string, args ...any) {
	if !ok && (l.err == nil || l.err == bufio.ErrBufferFull) {
		l.err = refuse(status, format, args...)
	}
}

// noEOF makes an end where more was promised an error.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// A Head is all of a message but its body. Names of fields compare in any case.
type Head struct {
	Line   [3]string // method, target, version; or version, status, reason
	Status int       // of an answer, 0 for a request
	Fields []Field
}

type Field struct{ Name, Value string }

func (h *Head) read(r *bufio.Reader, answer bool) error {
	l := lineReader{Reader: r, room: maxFirst, status: 414}
	line := l.next()
	if line == "" { // one before a head is let pass (RFC 9112 §2.2)
		line = l.next()
	}
	first, rest, _ := strings.Cut(line, " ")
	second, third, _ := strings.Cut(rest, " ")
	*h = Head{Line: [3]string{first, second, third}, Fields: h.Fields[:0]}
	version, valid := third, isToken(first) && second != "" && !strings.Contains(line, "\t")
	if answer {
		h.Status, _ = strconv.Atoi(second)
		version, valid = first, len(second) == 3 && h.Status >= 100
	}
	l.check(valid && strings.HasPrefix(version, "HTTP/"), 400, "malformed first line %.200q", line)
	l.check(len(version) == 8 && version[5:7] == "1." && version[7]-'0' < 10, 505, "no support of %.20q", version)
	l.room, l.status = l.room+maxHead-maxFirst, 431
	h.readFields(&l)
	return l.err
}

// readFields reads fields up to the empty line. A line that continues the one before (obs-fold) and space
// before the colon make no name, so both are refused (RFC 9112 §5).
func (h *Head) readFields(l *lineReader) {
	for line := l.next(); line != ""; line = l.next() {
		name, value, colon := strings.Cut(line, ":")
		l.check(colon && isToken(name), 400, "malformed header field %.200q", line)
		l.check(len(h.Fields) < maxFields, 431, "more than %d header fields", maxFields)
		h.Fields = append(h.Fields, Field{name, strings.Trim(value, " \t")})
	}
}

// appendTo appends h as it stands on the wire, with the extra fields, up to and with the empty line.
func (h *Head) appendTo(b []byte, extra ...Field) []byte {
	line := h.Line
	if h.Status != 0 {
		line[0] = "HTTP/1.1" // ours, whatever the origin's
	}
	b = append(append(append(append(b, line[0]...), ' '), line[1]...), ' ')
	b = append(append(b, line[2]...), "\r\n"...)
	for _, f := range append(h.Fields[:len(h.Fields):len(h.Fields)], extra...) {
		b = append(append(append(append(b, f.Name...), ": "...), f.Value...), "\r\n"...)
	}
	return append(b, "\r\n"...)
}

// Get returns the value of the first field of that name, Del removes those of some names, Set puts one in
// their place, Clone makes a copy that shares nothing.
func (h *Head) Get(name string) string {
	for _, f := range h.Fields {
		if isOneOf(f.Name, name) {
			return f.Value
		}
	}
	return ""
}

func (h *Head) Del(names ...string) {
	h.Fields = slices.DeleteFunc(h.Fields, func(f Field) bool { return isOneOf(f.Name, names...) })
}

func (h *Head) Set(name, value string) { h.Del(name); h.Fields = append(h.Fields, Field{name, value}) }
func (h *Head) Clone() *Head           { return &Head{h.Line, h.Status, slices.Clone(h.Fields)} }

// list returns the elements of a field that is a list, over all its lines. A comma within a quoted string
// separates nothing (RFC 9110 §5.6.1, §5.6.4).
func (h *Head) list(name string) (elements []string) {
	for _, f := range h.Fields {
		quoted, start := false, 0
		for i := 0; isOneOf(f.Name, name) && i <= len(f.Value); i++ {
			if i == len(f.Value) || f.Value[i] == ',' && !quoted {
				elements = append(elements, strings.Trim(f.Value[start:i], " \t"))
				start = i + 1
			} else if f.Value[i] == '"' && (i == 0 || f.Value[i-1] != '\\') {
				quoted = !quoted
			}
		}
	}
	return slices.DeleteFunc(elements, func(e string) bool { return e == "" })
}

// has tells whether a list has the element, in any case; old whether the message is of HTTP/1.0, which knows
// no chunks and no interim answers; keepAlive whether its sender keeps the connection (RFC 9112 §9.3).
func (h *Head) has(name, element string) bool { return isOneOf(element, h.list(name)...) }
func (h *Head) old() bool                     { return h.Line[0] == "HTTP/1.0" || h.Line[2] == "HTTP/1.0" }
func (h *Head) keepAlive() bool {
	said := append(h.list("Connection"), h.list("Proxy-Connection")...)
	return !isOneOf("close", said...) && (!h.old() || isOneOf("keep-alive", said...))
}

// endToEnd removes what concerns one connection only (RFC 9110 §7.6.1), Trailer too because trailers are
// dropped, and what Connection names; but to name there what framing or caching needs is an attack.
func (h *Head) endToEnd() {
	h.Del(append(slices.DeleteFunc(h.list("Connection"), func(name string) bool {
		return isOneOf(name, "Host", "Content-Length", "Via", "Max-Forwards", "Cache-Control", "Vary")
	}), "Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authentication-Info", "Proxy-Authorization",
		"Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade")...)
}

// framing decides, and nothing else does, where the body after h ends (RFC 9112 §6.3): after a length, with
// the last chunk, or with the connection. What two readers could take differently is refused: more than one
// length, a transfer coding beside it, in HTTP/1.0, or not just chunked. In an answer a coding that nobody
// knows is delimited by close, as the RFC has it. bodiless answers have no body whatever they say.
func (h *Head) framing(bodiless bool) (length int64, err error) {
	var lengths, codings []string
	for _, f := range h.Fields {
		if isOneOf(f.Name, "Content-Length") {
			lengths = append(lengths, f.Value)
		} else if isOneOf(f.Name, "Transfer-Encoding") {
			codings = append(codings, strings.ToLower(f.Value))
		}
	}
	ok, coding := len(lengths) == 0, strings.Join(codings, ", ")
	if len(lengths) == 1 {
		length, ok = digits(lengths[0])
		ok = ok && length < math.MaxInt64
	}
	switch {
	case !ok, len(codings) > 0 && (len(lengths) > 0 || h.old()):
		return 0, refuse(400, "Content-Length %.40q with Transfer-Encoding %.40q", lengths, coding)
	case len(codings) > 0 && coding != "chunked" && (h.Status == 0 || !isToken(coding) ||
		strings.Contains(coding, "chunk") || isOneOf(coding, "gzip", "deflate", "compress", "identity")):
		return 0, refuse(501, "transfer coding %.40q is not supported, only chunked", coding)
	case bodiless:
		return 0, nil
	case coding == "chunked":
		return chunked, nil
	case len(lengths) == 0 && h.Status != 0:
		return untilClose, nil
	}
	return length, nil
}

// authority returns "host:port" in one spelling: lower case, IPv6 as in RFC 5952, port 80 if there is none.
// Userinfo has no place in it (RFC 9110 §4.2.4).
func authority(s string) (string, error) {
	host, port := strings.ToLower(s), "80"
	if i := strings.LastIndexByte(host, ':'); i > strings.LastIndexByte(host, ']') {
		host, port = host[:i], strings.TrimLeft(host[i+1:], "0")
	}
	n, ok := digits(port)
	if v6, ok := strings.CutPrefix(host, "["); ok {
		ip, err := netip.ParseAddr(strings.TrimSuffix(v6, "]"))
		if host = "[" + ip.String() + "]"; err != nil || !ip.Is6() || ip.Zone() != "" || !strings.HasSuffix(v6, "]") {
			host = ""
		}
	} else if strings.Trim(host, "abcdefghijklmnopqrstuvwxyz0123456789-._") != "" {
		host = ""
	}
	if host == "" || !ok || n < 1 || n > 65535 {
		return "", refuse(400, "%.200q is no host with or without a port", s)
	}
	return host + ":" + port, nil
}

// A body reads what follows a head, decoded.
type body struct {
	c      *Conn
	kind   int64         // as framing returned it; 0 when the last chunk has been read
	left   int64         // bytes to come, of the chunk or of the whole
	begun  bool          // a chunk has been read, but for its CR LF
	excess int           // bytes of chunk sizes beyond what the data justifies
	last   bool          // of an answer: the connection ends with it
	sent   chan struct{} // of a request: closed when sending it on has ended, with
	err    error
}

func newBody(c *Conn, kind int64) *body {
	if kind == untilClose {
		return &body{c: c, kind: kind, left: math.MaxInt64, last: true}
	}
	return &body{c: c, kind: kind, left: max(kind, 0)}
}

func (b *body) Read(p []byte) (n int, err error) {
	if b.kind == chunked && b.left == 0 {
		err = b.nextChunk()
	}
	if b.left == 0 || err != nil {
		return 0, cmp.Or(err, io.EOF)
	}
	n, err = b.c.r.Read(p[:min(int64(len(p)), b.left)])
	if b.left -= int64(n); b.kind != untilClose {
		err = noEOF(err)
	}
	return n, err
}

// nextChunk reads what stands between two chunks' data, and after the last one the trailers. These are
// dropped, as nothing may depend on them (RFC 9110 §6.5.1), and so are extensions, which may cost 16 bytes
// a chunk, as much as the data, and 16 KiB beyond: nobody keeps us reading for nothing.
func (b *body) nextChunk() error {
	l := lineReader{Reader: b.c.r, room: maxHead, status: 400, strict: true}
	l.check(!b.begun || l.next() == "", 400, "a chunk is longer than its size")
	line := l.next()
	size, _, _ := strings.Cut(line, ";")
	n, err := strconv.ParseUint(strings.TrimRight(size, " \t"), 16, 60) // some servers pad it
	b.excess += len(line) - 16
	l.check(err == nil && len(size) < 20 && b.excess < 16<<10, 400, "malformed chunk size or too many extensions: %.40q", line)
	b.excess, b.left, b.begun = max(0, b.excess-int(min(n, 1<<20))), int64(n), true
	if n == 0 {
		if new(Head).readFields(&l); l.err == nil {
			b.kind = 0
		}
	}
	return l.err
}

// A chunkWriter writes each piece it is given as one chunk.
type chunkWriter struct{ c *Conn }

func (w chunkWriter) Write(p []byte) (int, error) {
	_, err := w.c.Write(fmt.Appendf(make([]byte, 0, len(p)+20), "%x\r\n%s\r\n", len(p), p))
	return len(p), err
}

// A Conn is a connection to a client or an origin on which nothing waits longer than wait.
type Conn struct {
	net.Conn
	r      *bufio.Reader
	wait   time.Duration
	renew  atomic.Int64 // Unix nanoseconds when the deadline is to be moved on
	out    []byte       // what is written next
	origin string       // where it leads to, host:port
	upload *body        // of the request it carries
	idle   time.Time    // since when it carries none
}

func newConn(nc net.Conn) *Conn {
	c := &Conn{Conn: nc, wait: stallWait}
	c.r = bufio.NewReader(c)
	return c
}

// extend moves the deadline on, but only each quarter of the wait: to do it for all four operations of an
// exchange costs 1 µs, of the 8 that a small hit takes.
func (c *Conn) extend() {
	if now := time.Now(); now.UnixNano() > c.renew.Load() {
		c.renew.Store(now.Add(c.wait / 4).UnixNano())
		c.SetDeadline(now.Add(c.wait))
	}
}

func (c *Conn) Read(p []byte) (int, error)  { c.extend(); return c.Conn.Read(p) }
func (c *Conn) Write(p []byte) (int, error) { c.extend(); return c.Conn.Write(p) }

// readHead waits for a head and reads it into h.
func (c *Conn) readHead(h *Head, answer bool) error {
	if _, err := c.r.Peek(1); err != nil {
		return err
	}
	if head, _ := c.r.Peek(c.r.Buffered()); !bytes.Contains(head, []byte("\r\n\r\n")) {
		c.renew.Store(math.MaxInt64) // no progress moves this deadline on
		c.SetDeadline(time.Now().Add(headWait))
		defer c.renew.Store(0)
	}
	err := h.read(c.r, answer)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = refuse(408, "the head did not arrive in %v", headWait)
	}
	return err
}

// Origins are where requests go: it keeps idle connections to them.
type Origins struct {
	net.Dialer
	sync.Mutex // guards idle
	idle       []*Conn
}

// take removes an idle connection to an origin, and those unused for too long. One that is closed by now, or
// has something to say unasked, must not answer the next request.
func (o *Origins) take(origin string) (taken *Conn) {
	o.Lock()
	defer o.Unlock()
	o.idle = slices.DeleteFunc(o.idle, func(c *Conn) bool {
		if time.Since(c.idle) > stallWait || c.origin == origin && taken == nil && !c.alive() {
			return c.Close() == nil
		} else if c.origin != origin || taken != nil {
			return false
		}
		taken = c
		return true
	})
	return taken
}

// alive tells whether an idle connection is open and silent: to ask the socket costs 0.3 µs. Windows cannot
// be asked so; there a request that fails is sent again all the same.
func (c *Conn) alive() bool {
	raw, err := c.Conn.(*net.TCPConn).SyscallConn()
	silent := runtime.GOOS == "windows"
	return err == nil && raw.Read(func(fd uintptr) bool {
		silent = silent || readNow(syscall.Read, fd) == syscall.EAGAIN
		return true
	}) == nil && silent
}

// readNow calls read, whose first parameter is an int on Unix and a Handle on Windows.
func readNow[FD ~int | ~uintptr](read func(FD, []byte) (int, error), fd uintptr) error {
	_, err := read(FD(fd), make([]byte, 1))
	return err
}

// ask sends a request with its body, and returns the head and body of the final answer; interim ones go to
// tell. A request that may be sent twice (RFC 9110 §9.2.2) is, where an idle connection turns out to be
// closed; others get a new one.
func (o *Origins) ask(origin string, req *Head, upload *body, tell func(*Head)) (*Head, *body, error) {
	var c *Conn
	if upload.kind == 0 && isOneOf(req.Line[0], "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE") {
		c = o.take(origin)
	}
	for {
		fresh := c == nil
		if fresh {
			nc, err := o.Dial("tcp", origin)
			if err != nil {
				return nil, nil, err
			}
			c = newConn(nc)
			c.origin = origin
		}
		res, b, err := c.ask(req, upload, tell)
		if err == nil {
			return res, b, nil
		}
		if c.Close(); fresh || err != errNoAnswer {
			return nil, nil, err
		}
		c = nil
	}
}

func (c *Conn) ask(req *Head, upload *body, tell func(*Head)) (*Head, *body, error) {
	c.upload, c.out = upload, req.appendTo(c.out[:0])
	if _, err := c.Write(c.out); err != nil {
		return nil, nil, errNoAnswer
	}
	if upload.kind != 0 { // the answer may come before its end (RFC 9112 §9.5)
		upload.sent = make(chan struct{})
		go upload.sendTo(c)
	}
	for res := new(Head); ; tell(res) {
		if _, err := c.r.Peek(1); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, nil, errNoAnswer
		}
		if err := c.readHead(res, true); err != nil {
			return nil, nil, err
		}
		kind, err := res.framing(req.Line[0] == "HEAD" || res.Status < 200 || res.Status == 204 || res.Status == 304)
		if err == nil && res.Status == 101 {
			err = refuse(502, "switched protocols unasked")
		}
		if err != nil || res.Status >= 200 {
			b := newBody(c, kind)
			b.last = b.last || !res.keepAlive()
			return res, b, err
		}
	}
}

// sendTo sends a request's body on. Where it breaks off the origin must not wait for the rest.
func (b *body) sendTo(c *Conn) {
	if b.kind != chunked {
		_, b.err = io.Copy(c, b)
	} else if _, b.err = io.Copy(chunkWriter{c}, b); b.err == nil {
		_, b.err = io.WriteString(c, "0\r\n\r\n")
	}
	if b.left > 0 || b.kind == chunked {
		c.Conn.Close()
	}
	close(b.sent)
}

// finished tells whether a request's body has been read and sent whole. The answer may be ahead of that.
func (b *body) finished() bool {
	if b.sent == nil {
		return b.kind == 0
	}
	select {
	case <-b.sent:
		return b.err == nil
	case <-time.After(100 * time.Millisecond):
		return false
	}
}

// Close ends an answer. Its connection is kept if it stands at its end, with nothing more to say.
func (b *body) Close() error {
	if b.left > 0 || b.kind == chunked || b.last || b.c.r.Buffered() > 0 || !b.c.upload.finished() {
		return b.c.Close()
	}
	b.c.idle = time.Now()
	origins.Lock()
	origins.idle = append(origins.idle, b.c)
	origins.Unlock()
	return nil
}

func isOneOf(s string, names ...string) bool {
	return slices.ContainsFunc(names, func(name string) bool { return len(s) == len(name) && strings.EqualFold(s, name) })
}

// digits reads a number; one too large is MaxInt64.
func digits(s string) (int64, bool) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err == nil || errors.Is(err, strconv.ErrRange)
}

func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(c rune) bool {
		return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9') &&
			!strings.ContainsRune("!#$%&'*+-.^_`|~", c)
	})
}
