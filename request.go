package main

// This file is HTTP/1.1 on the wire (RFC 9110, 9112): heads, the framing of bodies, targets, and the
// connections to clients and origins. It knows nothing of caching.

import (
	"bufio"
	"bytes"
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
	maxHead   = 64 << 10 // bytes of a head: browsers send up to 16 KiB of cookies, servers stop at 8 to 64
	maxTarget = 32 << 10 // bytes of its first line: RFC 9112 §3 asks for 8,000 at least
	maxFields = 256      // lines of a header section: browsers send about 20
	maxIdle   = 128      // idle connections kept for one origin

	dialWait   = 10 * time.Second
	headWait   = 30 * time.Second // from a head's first byte to its last, however they trickle
	stallWait  = 60 * time.Second // for the next request, and for a read or write that makes no progress
	tunnelWait = 15 * time.Minute // a tunnel silent both ways

	chunked    = -1 // what framing returns besides a length
	untilClose = -2
)

// An Error is what a client is told when its request cannot be answered.
type Error struct {
	Status int
	Text   string
}

func (e *Error) Error() string { return e.Text }

func refuse(status int, format string, args ...any) error {
	return &Error{status, fmt.Sprintf(format, args...)}
}

// errNoAnswer: a connection ended before the first byte of an answer, as an idle one may at any time.
var errNoAnswer = errors.New("closed the connection without an answer")

// A Field is one line of a header section. Names compare without regard to case.
type Field struct{ Name, Value string }

// A Head is all of a message but its body.
type Head struct {
	Line   [3]string // method, target, version; or version, status, reason
	Status int       // of a response, 0 for a request
	Fields []Field
}

// parse reads a head from its lines. It takes nothing that another program could see as the end of a
// line or a name: that is how requests are smuggled and answers split (RFC 9112 §11). A line that
// continues the one before (obs-fold) and space before the colon make no name, so both are refused.
func (h *Head) parse(s string, response bool) error {
	first, s, _ := strings.Cut(s, "\n")
	first = strings.TrimSuffix(first, "\r")
	*h = Head{Fields: h.Fields[:0]}
	var rest string
	h.Line[0], rest, _ = strings.Cut(first, " ")
	h.Line[1], h.Line[2], _ = strings.Cut(rest, " ")
	version, valid := h.Line[2], isToken(h.Line[0]) && h.Line[1] != "" && !strings.Contains(h.Line[1], "\t")
	if response {
		h.Status, _ = strconv.Atoi(h.Line[1])
		version, valid = h.Line[0], len(h.Line[1]) == 3 && h.Status >= 100
	}
	switch {
	case !valid || !isText(first) || !strings.HasPrefix(version, "HTTP/"):
		return refuse(400, "malformed first line %.200q", first)
	case len(version) != 8 || version[5:7] != "1." || version[7] < '0' || version[7] > '9':
		return refuse(505, "version %q is not supported, only HTTP/1.1 and 1.0", version)
	}
	return h.parseFields(s)
}

func (h *Head) parseFields(s string) error {
	for s != "" {
		var line string
		line, s, _ = strings.Cut(s, "\n")
		line = strings.TrimSuffix(line, "\r")
		name, value, colon := strings.Cut(line, ":")
		if !colon || !isToken(name) || !isText(value) {
			return refuse(400, "malformed header field %.200q", line)
		}
		if len(h.Fields) == maxFields {
			return refuse(431, "more than %d header fields", maxFields)
		}
		h.Fields = append(h.Fields, Field{name, strings.Trim(value, " \t")})
	}
	return nil
}

// appendTo appends h as it stands on the wire, the extra fields last, up to and with the empty line.
func (h *Head) appendTo(b []byte, extra ...Field) []byte {
	b = append(append(append(b, h.Line[0]...), ' '), h.Line[1]...)
	b = append(append(append(b, ' '), h.Line[2]...), "\r\n"...)
	for _, fields := range [][]Field{h.Fields, extra} {
		for _, f := range fields {
			b = append(append(append(append(b, f.Name...), ": "...), f.Value...), "\r\n"...)
		}
	}
	return append(b, "\r\n"...)
}

// Get returns the value of the first field of that name, "" if there is none.
func (h *Head) Get(name string) string {
	for _, f := range h.Fields {
		if len(f.Name) == len(name) && strings.EqualFold(f.Name, name) {
			return f.Value
		}
	}
	return ""
}

// Del removes all fields of the names and returns them.
func (h *Head) Del(names ...string) (removed []Field) {
	h.Fields = slices.DeleteFunc(h.Fields, func(f Field) bool {
		named := isOneOf(f.Name, names...)
		if named {
			removed = append(removed, f)
		}
		return named
	})
	return removed
}

// Set puts one field in the place of all of that name, at the end.
func (h *Head) Set(name, value string) {
	h.Del(name)
	h.Fields = append(h.Fields, Field{name, value})
}

// Clone returns a copy with fields of its own: parse uses those of a Head again.
func (h *Head) Clone() *Head {
	return &Head{h.Line, h.Status, slices.Clone(h.Fields)}
}

// values returns the values of all fields of that name.
func (h *Head) values(name string) (values []string) {
	for _, f := range h.Fields {
		if isOneOf(f.Name, name) {
			values = append(values, f.Value)
		}
	}
	return values
}

// list returns the elements of a field that is a list, over all its lines, without the space around
// them. A comma within a quoted string separates nothing (RFC 9110 §5.6.1, §5.6.4).
func (h *Head) list(name string) (elements []string) {
	for _, value := range h.values(name) {
		quoted, start := false, 0
		for i, c := range []byte(value + ",") {
			switch {
			case c == '"' && (i == 0 || value[i-1] != '\\'):
				quoted = !quoted
			case c == ',' && (!quoted || i == len(value)):
				if element := strings.Trim(value[start:i], " \t"); element != "" {
					elements = append(elements, element)
				}
				start = i + 1
			}
		}
	}
	return elements
}

// has tells whether a list has the element, in any case.
func (h *Head) has(name, element string) bool {
	return isOneOf(element, h.list(name)...)
}

// old tells whether the message is of HTTP/1.0: no chunks, no interim answers.
func (h *Head) old() bool { return h.Line[0] == "HTTP/1.0" || h.Line[2] == "HTTP/1.0" }

// keepAlive tells whether the sender keeps its connection open (RFC 9112 §9.3).
func (h *Head) keepAlive() bool {
	if h.has("Connection", "close") || h.has("Proxy-Connection", "close") {
		return false
	}
	return !h.old() || h.has("Connection", "keep-alive") || h.has("Proxy-Connection", "keep-alive")
}

// hopByHop are the fields that concern one connection only (RFC 9110 §7.6.1). Trailer is among them
// because trailers are dropped; Proxy-Connection was never standard, but old clients send it.
var hopByHop = []string{"Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authentication-Info",
	"Proxy-Authorization", "Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade"}

// endToEnd removes what must not travel on: hopByHop, and the fields that Connection names, except
// those that framing and routing need: to name them there is an attack.
func (h *Head) endToEnd() {
	names := slices.DeleteFunc(h.list("Connection"), func(name string) bool {
		return isOneOf(name, "Host", "Content-Length", "Via", "Max-Forwards", "Cache-Control")
	})
	h.Del(append(names, hopByHop...)...)
}

// framing decides, and nothing else does, where the body after h ends (RFC 9112 §6.3): after a length,
// after the last chunk, or with the connection. What two readers could take differently is an error: a
// transfer coding beside a length, in HTTP/1.0, or that is not just chunked. In an answer a coding
// nobody knows is delimited by close, as the RFC says. bodiless is an answer without a body whatever
// its fields say.
func (h *Head) framing(bodiless bool) (kind int64, err error) {
	lengths, codings := h.values("Content-Length"), h.values("Transfer-Encoding")
	switch {
	case len(codings) > 0 && (len(lengths) > 0 || h.old()):
		return 0, refuse(400, "Transfer-Encoding with Content-Length or in HTTP/1.0")
	case len(lengths) > 0:
		var ok bool
		if kind, ok = digits(lengths[0]); !ok || kind == math.MaxInt64 || len(slices.Compact(lengths)) > 1 {
			return 0, refuse(400, "malformed or contradictory Content-Length %.40q", lengths)
		}
	case len(codings) == 1 && strings.EqualFold(codings[0], "chunked"):
		kind = chunked
	case len(codings) > 0 && (h.Status == 0 || strings.Contains(strings.ToLower(codings[0]), "chunk") ||
		!isToken(codings[0]) || isOneOf(codings[0], "gzip", "deflate", "compress", "identity")):
		return 0, refuse(501, "transfer coding %.40q is not supported, only chunked", codings)
	case h.Status != 0:
		kind = untilClose
	}
	if bodiless {
		kind = 0
	}
	return kind, nil
}

// splitAuthority takes "host[:port]" apart and makes of all its spellings one: lower case, IPv6 as
// RFC 5952 has it, no port 80. Userinfo has no place in it (RFC 9110 §4.2.4).
func splitAuthority(s string) (authority, host string, err error) {
	authority = strings.ToLower(s)
	host, port := authority, ""
	if i := strings.LastIndexByte(authority, ':'); i > strings.LastIndexByte(authority, ']') {
		host, port = authority[:i], authority[i+1:]
		if n, ok := digits(port); !ok || n == 0 || n > 65535 {
			return "", "", refuse(400, "bad port in %.200q", s)
		}
	}
	if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		ip, err := netip.ParseAddr(host[1 : len(host)-1])
		if err != nil || ip.Zone() != "" || !ip.Is6() {
			return "", "", refuse(400, "bad address in %.200q", s)
		}
		host = ip.String()
		authority = "[" + host + "]:" + port
	} else if host == "" || strings.Trim(host, "abcdefghijklmnopqrstuvwxyz0123456789-._") != "" {
		return "", "", refuse(400, "bad host in %.200q", s)
	}
	return strings.TrimSuffix(strings.TrimSuffix(authority, ":80"), ":"), host, nil
}

// readLines reads lines up to an empty one and returns them without it. In a head bare line feeds are
// taken too (RFC 9112 §2.2), in trailers (strict) not. EOF before the first byte is io.EOF.
func readLines(r *bufio.Reader, strict bool) (string, error) {
	for buf, start := make([]byte, 0, 1024), 0; ; {
		part, err := r.ReadSlice('\n')
		buf = append(buf, part...)
		switch {
		case err != nil && err != bufio.ErrBufferFull && len(buf) > 0:
			return "", noEOF(err)
		case err != nil && err != bufio.ErrBufferFull:
			return "", err
		case start == 0 && len(buf) > maxTarget:
			return "", refuse(414, "first line longer than %d bytes", maxTarget)
		case len(buf) > maxHead:
			return "", refuse(431, "head longer than %d bytes", maxHead)
		case strict && err == nil && !bytes.HasSuffix(buf, []byte("\r\n")):
			return "", refuse(400, "line without CR LF")
		case string(buf[start:]) == "\r\n" || string(buf[start:]) == "\n":
			return string(buf[:start]), nil
		case err == nil:
			start = len(buf)
		}
	}
}

// noEOF makes an end where more was promised an error.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// A body reads what follows a head, decoded.
type body struct {
	c      *Conn
	kind   int64         // as framing returned it, 0 after the last chunk
	left   int64         // bytes to come, of the chunk or of the whole
	inside bool          // a chunk's data has been read, its CR LF not
	last   bool          // the connection ends with it
	sent   chan struct{} // closed by sendTo
	err    error         // why sending ended
	broken bool          // reading failed
	excess int           // bytes spent on chunk sizes beyond what the data justifies
}

func newBody(c *Conn, kind int64) *body {
	b := &body{c: c, kind: kind, left: max(kind, 0)}
	if kind == untilClose {
		b.left = math.MaxInt64
	}
	return b
}

func (b *body) Read(p []byte) (int, error) {
	if b.kind == chunked && b.left == 0 {
		if err := b.nextChunk(); err != nil {
			return 0, noEOF(err)
		}
	}
	if b.left == 0 {
		return 0, io.EOF
	}
	n, err := b.c.r.Read(p[:min(int64(len(p)), b.left)])
	if b.left -= int64(n); b.kind != untilClose {
		err = noEOF(err)
	}
	return n, err
}

// nextChunk reads what stands between two chunks' data, and after the last the trailers. Those are
// dropped, as nothing may depend on them (RFC 9110 §6.5.1), and so are extensions. The latter may cost
// 16 bytes a chunk, the data's length, and 16 KiB beyond: nobody keeps us reading for nothing.
func (b *body) nextChunk() error {
	line, err := b.c.r.ReadSlice('\n')
	if b.inside && err == nil {
		if string(line) != "\r\n" {
			return refuse(400, "chunk longer than its size")
		}
		line, err = b.c.r.ReadSlice('\n')
	}
	if err != nil && err != bufio.ErrBufferFull {
		return err
	}
	text, crlf := strings.CutSuffix(string(line), "\r\n")
	size, extension, _ := strings.Cut(text, ";")
	n, err := strconv.ParseUint(strings.TrimRight(size, " \t"), 16, 60) // some servers pad with spaces
	if b.excess += len(line) - 16; err != nil || !crlf || !isText(extension) || b.excess > 16<<10 {
		return refuse(400, "malformed chunk size or too many extensions: %.40q", line)
	}
	b.excess, b.left, b.inside = max(0, b.excess-int(min(n, 1<<20))), int64(n), true
	if n > 0 {
		return nil
	}
	b.kind = 0
	trailers, err := readLines(b.c.r, true)
	if err != nil {
		return err
	}
	return new(Head).parseFields(trailers)
}

// A chunkWriter writes each piece it is given as one chunk; an empty one would be the last.
type chunkWriter struct{ c *Conn }

func (w chunkWriter) Write(p []byte) (int, error) {
	_, err := w.c.Write(fmt.Appendf(make([]byte, 0, len(p)+20), "%x\r\n%s\r\n", len(p), p))
	return len(p), err
}

// A Conn is a connection to a client or an origin. Nothing waits on it longer than wait without
// progress in either direction.
type Conn struct {
	net.Conn
	r      *bufio.Reader
	wait   time.Duration
	renew  atomic.Int64 // when the deadline is to be moved on, Unix nanoseconds
	out    []byte       // what is written next
	origin string       // the authority it leads to
	pool   *Origins
	upload *body
	idle   time.Time // since when it is idle; zero for a new one
	probe  syscall.RawConn
}

func newConn(nc net.Conn) *Conn {
	c := &Conn{Conn: nc, wait: stallWait}
	c.r = bufio.NewReaderSize(c, 4096)
	return c
}

// extend moves the deadline on, but only every quarter of the wait: moving it four times an exchange
// costs 1 µs, of the 8 that a small hit takes in all.
func (c *Conn) extend() {
	if now := time.Now(); now.UnixNano() > c.renew.Load() {
		c.renew.Store(now.Add(c.wait / 4).UnixNano())
		c.SetDeadline(now.Add(c.wait))
	}
}

func (c *Conn) Read(p []byte) (int, error) {
	c.extend()
	return c.Conn.Read(p)
}

func (c *Conn) Write(p []byte) (int, error) {
	c.extend()
	return c.Conn.Write(p)
}

// readHead waits for a head and reads it into h.
func (c *Conn) readHead(h *Head, response bool) error {
	if _, err := c.r.Peek(1); err != nil {
		return err
	}
	if head, _ := c.r.Peek(c.r.Buffered()); !bytes.Contains(head, []byte("\r\n\r\n")) {
		c.renew.Store(math.MaxInt64) // the rest must come in time, whatever progress it makes
		c.SetDeadline(time.Now().Add(headWait))
		defer c.renew.Store(0)
	}
	lines, err := readLines(c.r, false)
	if lines == "" && err == nil && !response {
		lines, err = readLines(c.r, false) // one empty line before a request is let pass (RFC 9112 §2.2)
	}
	if err != nil {
		return noEOF(err)
	}
	return h.parse(lines, response)
}

// alive tells whether an idle connection is open and silent. Asking the socket takes 0.3 µs; Windows
// cannot be asked so, there a request that fails is tried again all the same.
func (c *Conn) alive() bool {
	silent := runtime.GOOS == "windows"
	err := c.probe.Read(func(fd uintptr) bool {
		silent = silent || readNow(syscall.Read, fd) == syscall.EAGAIN
		return true
	})
	return err == nil && silent && time.Since(c.idle) < stallWait
}

// readNow calls read, whose first parameter is an int on Unix and a Handle on Windows.
func readNow[T ~int | ~uintptr](read func(T, []byte) (int, error), fd uintptr) error {
	_, err := read(T(fd), make([]byte, 1))
	return err
}

// Origins are where requests go, and the idle connections to them.
type Origins struct {
	control func(network, address string, _ syscall.RawConn) error // may refuse an address to be dialed
	mu      sync.Mutex                                             // guards idle
	idle    map[string][]*Conn                                     // by authority, the longest idle first
}

// get returns a connection to an authority, an idle one if it may be.
func (o *Origins) get(authority string, reuse bool) (*Conn, error) {
	for o.mu.Lock(); reuse && len(o.idle[authority]) > 0; {
		last := len(o.idle[authority]) - 1
		c := o.idle[authority][last]
		if o.idle[authority] = o.idle[authority][:last]; c.alive() {
			o.mu.Unlock()
			return c, nil
		}
		c.Close()
	}
	o.mu.Unlock()
	address := authority
	if _, host, _ := splitAuthority(authority); strings.LastIndexByte(address, ':') <= strings.LastIndexByte(address, ']') {
		address = net.JoinHostPort(host, "80")
	}
	d := net.Dialer{Timeout: dialWait, Control: o.control}
	nc, err := d.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	c := newConn(nc)
	c.origin, c.pool = authority, o
	c.probe, err = nc.(*net.TCPConn).SyscallConn()
	return c, err
}

// put keeps a connection that has nothing left to say for the next request.
func (o *Origins) put(c *Conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.idle[c.origin]) >= maxIdle || c.r.Buffered() > 0 {
		c.Close()
		return
	}
	c.idle = time.Now()
	o.idle[c.origin] = append(o.idle[c.origin], c)
}

// sweep closes, now and then, idle connections that nobody asked for.
func (o *Origins) sweep() {
	for range time.Tick(stallWait / 4) {
		o.mu.Lock()
		for origin, idle := range o.idle {
			o.idle[origin] = slices.DeleteFunc(idle, func(c *Conn) bool { return !c.alive() && c.Close() == nil })
			if len(o.idle[origin]) == 0 {
				delete(o.idle, origin)
			}
		}
		o.mu.Unlock()
	}
}

// ask sends a request, with its body if it has one, to its origin and returns the head of the final
// answer and its body; interim answers go to tell. A request that may be sent twice (RFC 9110 §9.2.2)
// is tried once more where an idle connection turns out to be closed; others get a new one.
func (o *Origins) ask(origin string, req *Head, upload *body, tell func(*Head)) (*Head, *body, error) {
	again := upload.kind == 0 && isOneOf(req.Line[0], "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE")
	for {
		c, err := o.get(origin, again)
		if err != nil {
			return nil, nil, err
		}
		res, b, err := c.ask(req, upload, tell)
		if err == nil {
			return res, b, nil
		}
		c.Close()
		if err != errNoAnswer || c.idle.IsZero() {
			return nil, nil, err
		}
		again = false
	}
}

func (c *Conn) ask(req *Head, upload *body, tell func(*Head)) (*Head, *body, error) {
	c.upload = upload
	c.out = req.appendTo(c.out[:0])
	if _, err := c.Write(c.out); err != nil {
		return nil, nil, errNoAnswer
	}
	if upload.kind != 0 {
		upload.sent = make(chan struct{})
		go upload.sendTo(c)
	}
	for {
		if _, err := c.r.Peek(1); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return nil, nil, err
			}
			return nil, nil, errNoAnswer
		}
		res := new(Head)
		if err := c.readHead(res, true); err != nil {
			return nil, nil, err
		}
		kind, err := res.framing(req.Line[0] == "HEAD" || res.Status < 200 || res.Status == 204 || res.Status == 304)
		if err != nil || res.Status >= 200 {
			b := newBody(c, kind)
			b.last = kind == untilClose || !res.keepAlive()
			return res, b, err
		}
		if res.Status == 101 {
			return nil, nil, refuse(502, "switched protocols unasked")
		}
		tell(res)
	}
}

// sendTo sends a request's body, while its answer may already be coming (RFC 9112 §9.5).
func (b *body) sendTo(c *Conn) {
	var w io.Writer = c
	if b.kind == chunked {
		w = chunkWriter{c}
	}
	wasChunked := b.kind == chunked
	_, err := io.Copy(w, b)
	if err == nil && wasChunked {
		_, err = c.Write([]byte("0\r\n\r\n"))
	}
	if b.err = err; b.broken { // the origin must not take it for whole
		c.Close()
	}
	close(b.sent)
}

// finished tells whether a request's body has been sent whole. The origin may have answered at its last byte, before
// sendTo knew.
func (b *body) finished() bool {
	if b.sent == nil {
		return b.kind == 0 && b.left == 0
	}
	select {
	case <-b.sent:
		return b.err == nil
	case <-time.After(100 * time.Millisecond):
		return false
	}
}

// Close gives the connection back that an answer has come on, if it stands at the end of it.
func (b *body) Close() error {
	if b.left > 0 || b.kind == chunked || b.last || !b.c.upload.finished() {
		b.c.Close()
	} else {
		b.c.pool.put(b.c)
	}
	return nil
}

func (b *body) abort() { b.c.Conn.Close() }

func isOneOf(s string, names ...string) bool {
	for _, name := range names {
		if len(s) == len(name) && strings.EqualFold(s, name) {
			return true
		}
	}
	return false
}

// digits reads a number; one too large is MaxInt64.
func digits(s string) (int64, bool) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err == nil || errors.Is(err, strconv.ErrRange)
}

func isText(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f })
}

func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(c rune) bool {
		return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' ||
			strings.ContainsRune("!#$%&'*+-.^_`|~", c))
	})
}
