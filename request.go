package main

// HTTP/1.1 on the wire (RFC 9110, 9112): heads, where bodies end, connections. Nothing here knows of caching.

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
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
	tchar      = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

	chunked, untilClose, endless = -1, -2, 1<<63 - 1 // what framing returns besides a length; more than any
)

var errNoAnswer = fmt.Errorf("closed the connection without an answer") // as an idle one may at any time

type (
	// An Error is what a client is told where its request cannot be answered.
	Error struct {
		Status int
		Text   string
	}
	// A Head is all of a message but its body. Names of fields compare in any case.
	Head struct {
		Line   [3]string // method, target, version; or version, status, reason
		Status int       // of an answer, 0 for a request
		Fields []Field
	}
	Field struct{ Name, Value string }
	// A lineReader reads the lines of a head, or those about chunks. It takes nothing that another program
	// could see as the end of a line: that is how requests are smuggled and answers split (RFC 9112 §11).
	// After an error, which it keeps, all lines are empty.
	lineReader struct {
		*bufio.Reader
		room, lines, status int  // bytes and lines that may still come, and what refuses more
		strict              bool // a bare LF does not end a line (RFC 9112 §2.2)
		err                 error
	}
	// A body reads what follows a head, decoded.
	body struct {
		c           *Conn
		kind, left  int64       // what framing said, 0 after the last chunk; bytes to come, of it or a chunk
		excess      int         // bytes of chunk sizes beyond what the data justifies
		begun, last bool        // a chunk has been read, but for its CR LF; it ends the connection
		sending     atomic.Bool // the request that has it is being sent
		err         error       // how that has ended
	}
	// A Conn is a connection to a client or an origin on which nothing waits longer than wait.
	Conn struct {
		net.Conn
		r      *bufio.Reader
		wait   time.Duration
		renew  atomic.Int64 // Unix nanoseconds when the deadline is to be moved on
		out    []byte       // what is written next
		origin string       // where it leads to, host:port
		upload *body        // of the request it carries
	}
	// A chunkWriter writes each piece it is given as one chunk.
	chunkWriter struct{ c *Conn }
	// Origins are where requests go: it keeps idle connections to them.
	Origins struct {
		net.Dialer
		sync.Mutex // guards idle
		idle       []*Conn
	}
)

func (e *Error) Error() string                       { return e.Text }
func refuse(status int, f string, args ...any) error { return &Error{status, fmt.Sprintf(f, args...)} }

func (l *lineReader) next() string {
	line := ""
	for l.lines--; l.err == nil && l.room >= 0 && !strings.HasSuffix(line, "\n"); {
		part, err := l.ReadSlice('\n')
		line, l.room = line+string(part), l.room-len(part)
		l.check(!os.IsTimeout(err), 408, "the rest did not come in time", line)
		l.err = choose(l.err != nil || err == bufio.ErrBufferFull, l.err, noEOF(err))
	}
	l.check(l.room >= 0 && l.lines >= 0, l.status, "a head or its first line is too long", line)
	text, crlf := strings.CutSuffix(line, "\r\n")
	text = strings.TrimSuffix(text, "\n")
	control := strings.ContainsFunc(text, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f })
	l.check(!control && (crlf || !l.strict), 400, "control character in", line)
	return choose(l.err == nil, text, "")
}
func (l *lineReader) check(ok bool, status int, what, text string) {
	if !ok && l.err == nil {
		l.err = refuse(status, "%s: %.200q", what, text)
	}
}
func (h *Head) read(r *bufio.Reader, answer bool) error {
	l := lineReader{Reader: r, room: maxFirst, lines: 2, status: 414}
	line := l.next()
	for ; line == "" && l.lines > 0; line = l.next() { // an empty one before it is let pass (RFC 9112 §2.2)
	}
	*h = Head{Fields: h.Fields[:0]}
	copy(h.Line[:], strings.SplitN(line, " ", 3))
	version, valid := h.Line[2], isToken(h.Line[0]) && h.Line[1] != "" && !strings.Contains(line, "\t")
	if answer { // and not to an Upgrade, as that has not been passed on
		h.Status, _ = strconv.Atoi(h.Line[1])
		version, valid = h.Line[0], len(h.Line[1]) == 3 && h.Status >= 100 && h.Status != 101
	}
	valid = valid && strings.HasPrefix(version, "HTTP/")
	l.check(valid && len(version) == 8 && "HTTP/1.0" <= version && version <= "HTTP/1.9",
		choose(valid, 505, 400), "malformed first line, or of an unknown version", line)
	l.room, l.lines, l.status = l.room+maxHead-maxFirst, maxFields+1, 431
	return h.readFields(&l)
}
func (h *Head) readFields(l *lineReader) error { // up to the empty line
	for line := l.next(); line != ""; line = l.next() {
		name, value, colon := strings.Cut(line, ":")
		l.check(colon && isToken(name), 400, "malformed header field", line) // as obs-fold is (RFC 9112 §5)
		h.Fields = append(h.Fields, Field{name, strings.Trim(value, " \t")})
	}
	return l.err
}
func (h *Head) appendTo(b []byte, extra ...Field) []byte { // an answer's version is always ours
	b = append(b, choose(h.Status == 0, h.Line[0], "HTTP/1.1")+" "+h.Line[1]+" "+h.Line[2]+"\r\n"...)
	for _, f := range append(slices.Clip(h.Fields), extra...) {
		b = append(append(append(append(b, f.Name...), ": "...), f.Value...), "\r\n"...)
	}
	return append(b, "\r\n"...)
}
func (h *Head) Clone() *Head { return &Head{h.Line, h.Status, slices.Clone(h.Fields)} }
func (h *Head) Get(name string) string { // the first of that name
	if i := slices.IndexFunc(h.Fields, func(f Field) bool { return isOneOf(f.Name, name) }); i >= 0 {
		return h.Fields[i].Value
	}
	return ""
}
func (h *Head) Del(names ...string) {
	h.Fields = slices.DeleteFunc(h.Fields, func(f Field) bool { return isOneOf(f.Name, names...) })
}
func (h *Head) Set(name, value string) { h.Del(name); h.Fields = append(h.Fields, Field{name, value}) }
func (h *Head) list(name string) (elements []string) { // empty ones too; a quoted comma is none
	for _, f := range h.Fields {
		for i, start, quoted := 0, 0, false; isOneOf(f.Name, name) && i <= len(f.Value); i++ {
			if i == len(f.Value) || f.Value[i] == ',' && !quoted {
				elements, start = append(elements, strings.Trim(f.Value[start:i], " \t")), i+1
			} else if f.Value[i] == '"' && (i == 0 || f.Value[i-1] != '\\') {
				quoted = !quoted
			}
		}
	}
	return elements
}
func (h *Head) has(name, element string) bool { return isOneOf(element, h.list(name)...) }
func (h *Head) old() bool                     { return h.Line[0] == "HTTP/1.0" || h.Line[2] == "HTTP/1.0" }
func (h *Head) keepAlive() bool { // RFC 9112 §9.3
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
func (h *Head) framing(bodiless bool) (int64, error) {
	lengths, codings := h.list("Content-Length"), h.list("Transfer-Encoding")
	length, ok := digits(append(lengths, "0")[0])
	coding := strings.Join(codings, ", ")
	ascii := isToken(coding) // in others ToLower makes a k of a Kelvin sign
	coding = strings.ToLower(coding)
	switch {
	case !ok, length == endless, len(lengths) > 1, len(codings) > 0 && (len(lengths) > 0 || h.old()):
		return 0, refuse(400, "Content-Length %.40q with Transfer-Encoding %.40q", lengths, coding)
	case len(codings) > 0 && (coding != "chunked" || !ascii) && (h.Status == 0 || !ascii ||
		strings.Contains(coding, "chunk") || isOneOf(coding, "gzip", "deflate", "compress", "identity")):
		return 0, refuse(501, "transfer coding %.40q is not supported, only chunked", coding)
	case bodiless, h.Status != 0 && h.Status < 200, h.Status == 204, h.Status == 304:
		return 0, nil
	case coding == "chunked":
		return chunked, nil
	}
	return choose(len(lengths) == 0 && h.Status != 0, untilClose, length), nil
}
func authority(s string) (string, error) { // in one spelling: lower case, IPv6 as in RFC 5952, with a port
	host, port := strings.ToLower(s), "80"
	if i := strings.LastIndexByte(host, ':'); i > strings.LastIndexByte(host, ']') {
		host, port = host[:i], host[i+1:]
	}
	n, err := strconv.ParseUint(port, 10, 16)
	name := host + ":" + strconv.FormatUint(n, 10)
	ip, noIP := netip.ParseAddrPort(name)
	bad := host == "" || strings.Trim(host, "abcdefghijklmnopqrstuvwxyz0123456789-._") != ""
	if err != nil || n == 0 || bad && (noIP != nil || ip.Addr().Zone() != "") {
		return "", refuse(400, "%.200q is no host with or without a port", s)
	}
	return choose(noIP == nil, ip.String(), name), nil
}

func newBody(c *Conn, kind int64) *body {
	return &body{c: c, kind: kind, left: choose(kind == untilClose, endless, max(kind, 0))}
}
func (b *body) Read(p []byte) (n int, err error) {
	if b.kind == chunked && b.left == 0 {
		if err = b.nextChunk(); err != nil {
			return 0, err
		}
	}
	n, err = io.LimitReader(b.c.r, b.left).Read(p)
	b.left -= int64(n)
	return n, choose(b.whole() || b.kind == untilClose, err, noEOF(err))
}

// nextChunk reads what stands between two chunks' data, and after the last one the trailers. These are
// dropped, as nothing may depend on them (RFC 9110 §6.5.1), and so are extensions, which may cost 16 bytes
// a chunk, as much as the data, and 16 KiB beyond: nobody keeps us reading for nothing.
func (b *body) nextChunk() error {
	l := lineReader{Reader: b.c.r, room: maxHead, lines: maxFields + 3, status: 400, strict: true}
	l.check(!b.begun || l.next() == "", 400, "a chunk is longer than its size", "")
	line := l.next()
	size, _, _ := strings.Cut(line, ";")
	n, err := strconv.ParseUint(strings.TrimRight(size, " \t"), 16, 60) // some servers pad it
	b.excess += len(line) - 16
	l.check(err == nil && len(size) < 20 && b.excess < 16<<10, 400, "malformed or too long chunk size", line)
	b.excess, b.left, b.begun = max(0, b.excess-int(min(n, 1<<20))), int64(n), true
	if n == 0 && new(Head).readFields(&l) == nil {
		b.kind = 0
	}
	return l.err
}
func (b *body) whole() bool { return b.left == 0 && b.kind != chunked }
func (b *body) finished() bool { // read and sent to its end; the answer may be a little ahead of that
	for i := 0; i < 100 && b.sending.Load(); i++ {
		time.Sleep(time.Millisecond)
	}
	return !b.sending.Load() && b.whole() && b.err == nil
}
func (b *body) Close() error { // the connection is kept if it stands at the end, with nothing more to say
	if !b.whole() || b.last || b.c.r.Buffered() > 0 || !b.c.upload.finished() {
		return b.c.Close()
	}
	b.c.extend()
	origins.Lock()
	defer origins.Unlock()
	origins.idle = append(origins.idle, b.c)
	return nil
}
func (w chunkWriter) Write(p []byte) (int, error) {
	_, err := fmt.Fprintf(w.c, "%x\r\n%s\r\n", len(p), p)
	return len(p), err
}
func newConn(nc net.Conn) *Conn {
	c := &Conn{Conn: nc, wait: stallWait}
	c.r = bufio.NewReader(c)
	return c
}
func (c *Conn) extend() { // only each quarter of the wait, as it costs 0.3 µs
	if now := time.Now(); now.UnixNano() > c.renew.Load() {
		c.renew.Store(now.Add(c.wait / 4).UnixNano())
		c.SetDeadline(now.Add(c.wait))
	}
}
func (c *Conn) Read(p []byte) (int, error)  { c.extend(); return c.Conn.Read(p) }
func (c *Conn) Write(p []byte) (int, error) { c.extend(); return c.Conn.Write(p) }
func (c *Conn) readHead(h *Head, answer bool) error {
	if _, err := c.r.Peek(1); err != nil {
		return choose(os.IsTimeout(err), err, errNoAnswer)
	}
	if b, _ := c.r.Peek(c.r.Buffered()); string(b[max(0, len(b)-4):]) != "\r\n\r\n" { // more may have to come
		c.SetDeadline(time.Now().Add(headWait))
		c.renew.Store(endless) // no progress moves this deadline on
		defer c.renew.Store(0)
	}
	return h.read(c.r, answer)
}

// alive tells whether an idle connection is open and silent: to ask the socket costs 0.3 µs. Windows, where
// read takes a Handle, cannot be asked so; there a request that fails is sent again all the same.
func alive[FD ~int | ~uintptr](c *Conn, read func(FD, []byte) (int, error)) bool {
	raw, err := c.Conn.(*net.TCPConn).SyscallConn()
	try := func(fd uintptr) bool { _, err = read(FD(fd), make([]byte, 1)); return true }
	return os.PathSeparator == '\\' || err == nil && raw.Read(try) == nil && err == syscall.EAGAIN
}

// ask sends a request with its body, and returns the head and body of the final answer; interim ones go to
// tell. Only what may be sent twice (RFC 9110 §9.2.2) goes to an idle connection: it may just be closing.
// Those that are closed by now, have something to say unasked, or were unused for too long are dropped.
func (o *Origins) ask(origin string, req *Head, upload *body, tell func(*Head)) (*Head, *body, error) {
	twice := upload.kind == 0 && isOneOf(req.Line[0], "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE")
	taken := (*Conn)(nil)
	o.Lock()
	o.idle = slices.DeleteFunc(o.idle, func(c *Conn) bool {
		wanted := twice && taken == nil && c.origin == origin
		if time.Since(time.Unix(0, c.renew.Load())) > stallWait || wanted && !alive(c, syscall.Read) {
			c.Close()
			return true
		}
		taken = choose(wanted, c, taken)
		return wanted
	})
	o.Unlock()
	if taken != nil {
		if res, b, err := taken.ask(origin, req, upload, tell); err != errNoAnswer {
			return res, b, err
		}
	}
	nc, err := o.Dial("tcp", origin)
	if err != nil {
		return nil, nil, err
	}
	return newConn(nc).ask(origin, req, upload, tell)
}
func (c *Conn) ask(origin string, req *Head, upload *body, tell func(*Head)) (*Head, *body, error) {
	c.origin, c.upload, c.out = origin, upload, req.appendTo(c.out[:0])
	_, unsent := c.Write(c.out)
	if upload.kind != 0 && unsent == nil {
		upload.sending.Store(true)
		go func() { // the answer may come before its end (RFC 9112 §9.5)
			to, end := io.Writer(c), ""
			if upload.kind == chunked {
				to, end = chunkWriter{c}, "0\r\n\r\n"
			}
			if _, upload.err = io.Copy(to, upload); upload.err == nil {
				_, upload.err = io.WriteString(c, end)
			}
			if !upload.whole() { // the origin must not wait for the rest
				c.Conn.Close()
			}
			upload.sending.Store(false)
		}()
	}
	for res := new(Head); ; tell(res) {
		err := c.readHead(res, true)
		kind, malformed := res.framing(req.Line[0] == "HEAD")
		if err = choose(err == nil, malformed, err); err != nil {
			c.Close()
			return nil, nil, err
		} else if res.Status >= 200 {
			b := newBody(c, kind)
			b.last = unsent != nil || !res.keepAlive()
			return res, b, nil
		}
	}
}
func choose[T any](first bool, a, b T) T {
	if first {
		return a
	}
	return b
}
func noEOF(err error) error { return choose(err == io.EOF, io.ErrUnexpectedEOF, err) }
func isToken(s string) bool { return s != "" && strings.Trim(s, tchar) == "" }
func isOneOf(s string, of ...string) bool {
	return slices.ContainsFunc(of, func(n string) bool { return len(n) == len(s) && strings.EqualFold(n, s) })
}
func digits(s string) (int64, bool) {
	n, err := strconv.ParseUint(s, 10, 63) // one too large is MaxInt64
	return int64(n), err == nil || n > 0
}
