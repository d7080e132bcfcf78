package main

// HTTP/1.1 on the wire (RFC 9110, RFC 9112): heads, where bodies end, connections. Nothing here caches.
import (
	"bufio"
	"bytes"
	"errors"
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
	maxFields  = 256              // fields of one; browsers send about 20
	headWait   = 30 * time.Second // from a head's first byte to its last, however they trickle in
	stallWait  = 60 * time.Second // for a request, for an idle connection's use, for any progress
	tunnelWait = 15 * time.Minute // for any progress of a tunnel

	hostChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._"

	chunked, untilClose, endless = -1, -2, 1 << 62 // what framing returns besides a length; more than any
)

var (
	errSilent = errors.New("closed the connection without an answer") // as an idle one may at any time
	errLong   = errors.New("too long")
)

// An Error is what a client is told: a status and a sentence. must ends an exchange with one, fail with
// any error, by a panic that attempt turns into an error again: so a check takes one line. Strings alone,
// as any would be allocated.
type Error string

func (e Error) Error() string { return string(e[4:]) }
func must(ok bool, format string, args ...string) {
	if !ok {
		var all []any
		for _, arg := range args {
			all = append(all, arg)
		}
		panic(Error(fmt.Sprintf(format, all...)))
	}
}
func fail(err error) {
	if err != nil {
		panic(err)
	}
}
func attempt(do func()) (err error) {
	defer func() {
		if failure := recover(); failure != nil {
			err = failure.(error) // a bug, too, ends an exchange and not the program
		}
	}()
	do()
	return nil
}

// A Head is all of a message but its body. Line is method, target, version or version, status, reason.
type Head struct {
	Line   [3]string
	Status int // of an answer, 0 for a request
	Fields []Field
}
type Field struct{ Name, Value string }

// readText reads a line, or lines up to an empty one, and returns them ended by LF alone, in one string
// that the parts of a head share. It lets nothing pass that another program could take for the end of a
// line: that is how requests are smuggled and answers split (RFC 9112 §2.2, §11). Where it is strict a
// bare LF is no end either.
func readText(r *bufio.Reader, lines, strict bool, long string) string {
	var space [1 << 10]byte
	text, start := space[:0], 0
	for n := 0; ; n++ {
		for err := bufio.ErrBufferFull; err == bufio.ErrBufferFull; {
			var part []byte
			part, err = r.ReadSlice('\n')
			text = append(text, part...)
			tooLong := choose(start > 0, "431 more than 256 fields, or 64 KiB", long)
			must(err != errLong && n < maxFields+2, tooLong)
			if err != bufio.ErrBufferFull {
				fail(noEOF(err))
			}
		}
		line, crlf := bytes.CutSuffix(text[start:len(text)-1], []byte{'\r'})
		for _, c := range line {
			must(c >= ' ' && c != 0x7f || c == '\t', "400 control character in a line")
		}
		must(crlf || !strict, "400 no CR before LF")
		text = append(text[:start+len(line)], '\n')
		if !lines || len(line) == 0 {
			return string(text[:len(text)-1])
		}
		start = len(text)
	}
}

// parseFields takes fields apart. A folded one is malformed (RFC 9112 §5.2).
func parseFields(text string) (fields []Field) {
	fields = make([]Field, 0, 12)
	for line := range strings.Lines(text) {
		name, value, colon := strings.Cut(line[:len(line)-1], ":")
		must(colon && isToken(name), "400 malformed field %.200q", line)
		fields = append(fields, Field{name, strings.Trim(value, " \t")})
	}
	return fields
}

// readHead reads the head of a request, or of an answer.
func readHead(r *bufio.Reader, answer bool) *Head {
	const long = "414 a first line of more than 64 KiB"
	h, text := new(Head), readText(r, true, false, long)
	if text == "" { // one before it is let pass (RFC 9112 §2.2)
		text = readText(r, true, false, long)
	}
	line, text, _ := strings.Cut(text, "\n")
	h.Line[0], h.Line[1], _ = strings.Cut(line, " ")
	h.Line[1], h.Line[2], _ = strings.Cut(h.Line[1], " ")
	version, valid := h.Line[2], isToken(h.Line[0]) && h.Line[1] != "" && !strings.Contains(line, "\t")
	if answer { // but not to an Upgrade, as that has not been passed on
		h.Status, _ = strconv.Atoi(h.Line[1])
		version, valid = h.Line[0], len(h.Line[1]) == 3 && h.Status >= 100 && h.Status != 101
	}
	must(valid && strings.HasPrefix(version, "HTTP/"), "400 malformed first line %.200q", line)
	known := len(version) == 8 && "HTTP/1.0" <= version && version <= "HTTP/1.9"
	must(known, "505 unknown version %.200q", version)
	h.Fields = parseFields(text)
	return h
}

// appendTo appends the head as it is written. More fields are given by name and value in turn; those that
// have no value are left out, as Set does it, which puts them in the place of all of those names.
func (h *Head) appendTo(b []byte, pairs ...string) []byte {
	version := choose(h.Status == 0, h.Line[0], "HTTP/1.1") // an answer's is ours (RFC 9110 §6.2)
	b = join(b, version, " ", h.Line[1], " ", h.Line[2], "\r\n")
	for _, f := range h.Fields {
		b = join(b, f.Name, ": ", f.Value, "\r\n")
	}
	for ; len(pairs) > 0; pairs = pairs[2:] {
		if pairs[1] != "" {
			b = join(b, pairs[0], ": ", pairs[1], "\r\n")
		}
	}
	return join(b, "\r\n")
}
func (h *Head) Clone() *Head { return &Head{h.Line, h.Status, slices.Clone(h.Fields)} }
func (h *Head) Get(name string) string { // the first of that name
	for _, f := range h.Fields {
		if same(f.Name, name) {
			return f.Value
		}
	}
	return ""
}
func (h *Head) Del(names ...string) {
	h.Fields = slices.DeleteFunc(h.Fields, func(f Field) bool { return oneOf(f.Name, names...) })
}
func (h *Head) Set(pairs ...string) {
	for ; len(pairs) > 0; pairs = pairs[2:] {
		h.Del(pairs[0])
		h.Fields = append(h.Fields, Field{pairs[0], pairs[1]})[:len(h.Fields)+min(1, len(pairs[1]))]
	}
}

// list returns what commas separate in all fields of a name, commas in quoted strings aside (RFC 9110
// §5.6.1).
func (h *Head) list(name string) (elements []string) {
	for _, f := range h.Fields {
		for i, start, quoted := 0, 0, false; same(f.Name, name) && i <= len(f.Value); i++ {
			if i == len(f.Value) || f.Value[i] == ',' && !quoted {
				elements, start = append(elements, strings.Trim(f.Value[start:i], " \t")), i+1
			} else if f.Value[i] == '"' {
				quoted = !quoted
			} else if f.Value[i] == '\\' && quoted && i+1 < len(f.Value) {
				i++
			}
		}
	}
	return elements
}
func (h *Head) has(name, element string) bool { return oneOf(element, h.list(name)...) }
func (h *Head) old() bool                     { return h.Line[choose(h.Status == 0, 2, 0)] == "HTTP/1.0" }
func (h *Head) keepAlive() bool { // RFC 9112 §9.3
	options := append(h.list("Connection"), h.list("Proxy-Connection")...)
	return !oneOf("close", options...) && (!h.old() || oneOf("keep-alive", options...))
}

// endToEnd removes what concerns one connection only (RFC 9110 §7.6.1): what Connection names, but not
// what framing, routing and caching need, as to name that is an attack; Trailer too, as trailers are
// dropped.
func (h *Head) endToEnd() {
	h.Del(append(slices.DeleteFunc(h.list("Connection"), func(name string) bool {
		return oneOf(name, "Host", "Content-Length", "Via", "Max-Forwards", "Cache-Control", "Vary")
	}), "Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authentication-Info", "Proxy-Authorization",
		"Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade")...)
}

// framing decides, and nothing else does, where the body behind h ends (RFC 9112 §6.3): after a length,
// with the last chunk, or with the connection. What two readers could take in two ways is refused:
// several lengths, one beside a transfer coding, a coding in HTTP/1.0, or any but one chunked.
func (h *Head) framing(bodiless bool) int64 {
	lengths, codings := h.list("Content-Length"), h.list("Transfer-Encoding")
	length, ok := digits(append(lengths, "0")[0])
	ok = ok && length < endless && len(lengths) < 2 && (len(lengths) == 0 || len(codings) == 0)
	coding := strings.Join(codings, ", ")
	must(ok, "400 Content-Length %.40q with Transfer-Encoding %.40q", strings.Join(lengths, ", "), coding)
	plain := same(coding, "chunked") && !h.old()
	other := h.Status != 0 && isToken(coding) && !strings.Contains(strings.ToLower(coding), "chunk") &&
		!oneOf(coding, "gzip", "deflate", "compress", "identity")
	ok = len(codings) == 0 || plain || other
	must(ok, "501 transfer coding %.40q is not supported, only chunked", coding)
	if bodiless || 100 <= h.Status && h.Status < 200 || h.Status == 204 || h.Status == 304 {
		return 0
	}
	length = choose(len(lengths) == 0 && h.Status != 0, untilClose, length)
	return choose(plain, chunked, length)
}

// authority reads host[:port], and returns it in one spelling: lower case, IPv6 as in RFC 5952, with a
// port.
func authority(s string) string {
	host, port := s, "80"
	if i := strings.LastIndexByte(host, ':'); i > strings.LastIndexByte(host, ']') {
		host, port = host[:i], host[i+1:]
	}
	n, err := strconv.ParseUint(port, 10, 16)
	ok := host != "" && strings.Trim(host, hostChars) == "" // before lower case makes a k of a Kelvin sign
	if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		ip, _ := netip.ParseAddr(host[1 : len(host)-1])
		host, ok = "["+ip.String()+"]", ip.Is6() && ip.Zone() == ""
	}
	must(ok && err == nil && n > 0, "400 %+.200q is no host with or without a port", s)
	return strings.ToLower(host) + ":" + strconv.FormatUint(n, 10)
}

// A Conn is a connection to a client or an origin on which nothing waits longer than wait, and the
// message that is being read from it; expect begins its body, of a kind that framing has found.
type Conn struct {
	net.Conn
	r           *bufio.Reader
	wait        time.Duration
	renew       atomic.Int64 // Unix nanoseconds from which on the deadline has to be moved
	room        int64        // bytes that may be read until something is too long
	out         []byte       // the head that is written; kept for the room that the next has in it
	origin      string       // where it leads to, host:port
	peer        string       // whom it leads to, without a port
	client      *Conn        // whose request's body it carries
	kind, left  int64        // what framing said, 0 after the last chunk; bytes to come, of it or a chunk
	begun, last bool         // a chunk has been read, but for the CR LF behind it; no message follows
	sending     atomic.Bool  // the body is being sent to an origin
	failed, cut error        // how that has ended, and what broke the reading of the body
}

func newConn(nc net.Conn, origin string) *Conn {
	c := &Conn{Conn: nc, wait: stallWait, origin: origin, peer: hostOf(nc.RemoteAddr().String())}
	c.r = bufio.NewReader(c)
	return c
}
func (c *Conn) extend() { // once in a sixteenth of the wait, as it costs 0.3 µs
	if t := time.Now(); t.UnixNano() > c.renew.Load() {
		c.renew.Store(t.Add(c.wait / 16).UnixNano())
		c.SetDeadline(t.Add(c.wait + c.wait/16))
	}
}
func (c *Conn) Write(p []byte) (int, error) { c.extend(); return c.Conn.Write(p) }
func (c *Conn) Read(p []byte) (n int, err error) {
	if c.extend(); c.room < 0 {
		return 0, errLong
	}
	n, err = c.Conn.Read(p)
	c.room -= int64(n)
	return n, err
}
func (c *Conn) expect(kind int64) {
	c.kind, c.left, c.begun = kind, choose(kind == untilClose, endless, max(kind, 0)), false
	c.room = choose[int64](kind == chunked, maxHead, endless)
}
func (c *Conn) whole() bool { return c.left == 0 && c.kind != chunked }

// writeAll writes a head and all of a body at once, not copied, in pieces that a slow reader takes in time.
func (c *Conn) writeAll(head, data []byte) (n int64, err error) {
	for len(data) > 0 && err == nil {
		piece := net.Buffers{head, data[:min(len(data), 256<<10)]}
		head, data = nil, data[len(piece[1]):]
		c.extend()
		written, failed := piece.WriteTo(c.Conn)
		n, err = n+written, failed
	}
	return n, err
}

// next reads the next head. Begun, it has to be whole in headWait.
func (c *Conn) next(answer bool) (h *Head, err error) {
	c.room = maxHead
	if _, err := c.r.Peek(1); err != nil {
		return nil, choose(os.IsTimeout(err), err, errSilent)
	}
	if b, _ := c.r.Peek(c.r.Buffered()); string(b[max(0, len(b)-4):]) != "\r\n\r\n" { // more may have to come
		c.SetDeadline(time.Now().Add(headWait))
		c.renew.Store(endless) // no progress moves this one
		defer c.renew.Store(0)
	}
	err = attempt(func() { h = readHead(c.r, answer) })
	return h, choose[error](os.IsTimeout(err), Error("408 the head has not come in 30 seconds"), err)
}

// A body is what follows a head, decoded.
type body struct{ *Conn }

func (b body) ready() int64 { return min(b.left, int64(b.r.Buffered())) } // bytes that need no wait
func (b body) Read(p []byte) (n int, err error) {
	if b.kind == chunked && b.left == 0 {
		err = attempt(b.nextChunk)
	}
	if err == nil {
		n, err = io.LimitReader(b.r, b.left).Read(p)
		b.left -= int64(n)
	}
	if err = choose(b.whole() || b.kind == untilClose, err, noEOF(err)); err != nil && err != io.EOF {
		b.cut = err
	}
	return n, err
}

// nextChunk reads what stands between two chunks' data, and behind the last one trailers. These are
// dropped, as nothing may depend on them (RFC 9110 §6.5.1), and so are extensions: all that is not data
// has room for 16 bytes a chunk and 64 KiB beyond, so nobody keeps us reading for nothing.
func (b body) nextChunk() {
	const long = "400 chunk extensions of more than 64 KiB"
	must(!b.begun || readText(b.r, false, true, long) == "", "400 a chunk is longer than its size")
	line := readText(b.r, false, true, long)
	size, _, _ := strings.Cut(line, ";")
	n, err := strconv.ParseUint(strings.TrimRight(size, " \t"), 16, 60) // some servers pad it
	must(err == nil && len(size) < 20, "400 malformed chunk size %.200q", line)
	if b.left, b.begun, b.room = int64(n), true, b.room+int64(n)+16; n == 0 {
		parseFields(readText(b.r, true, true, long))
		b.kind = 0
	}
}

// Close keeps an origin's connection for another request if this one is over, and nothing more is said.
func (b body) Close() error {
	if !b.whole() || b.last || b.r.Buffered() > 0 || b.client != nil && !b.client.finished() {
		return b.Conn.Close()
	}
	b.extend()
	defer origins.lock()()
	origins.idle = append(origins.idle, b.Conn)
	return nil
}

// A chunkWriter writes each piece that it is given as one chunk.
type chunkWriter struct{ *Conn }

func (w chunkWriter) Write(p []byte) (int, error) {
	_, err := fmt.Fprintf(w.Conn, "%x\r\n%s\r\n", len(p), p)
	return len(p), err
}

// send sends the body that comes on another connection, and then, in a tunnel, that nothing more comes.
// Where it breaks off the connection is closed: a part must not be taken for the whole. But where it is
// not taken any more there may be an answer to it.
func (c *Conn) send(from *Conn) (n int64) {
	to, end := io.Writer(c), ""
	if from.kind == chunked {
		to, end = chunkWriter{c}, "0\r\n\r\n"
	}
	if n, from.failed = io.Copy(to, body{from}); from.failed == nil {
		_, from.failed = io.WriteString(c, end)
	}
	if from.failed == nil && from.kind == untilClose {
		c.Conn.(*net.TCPConn).CloseWrite()
	} else if from.cut != nil || from.failed != nil && from.kind == untilClose {
		c.Conn.Close()
	}
	from.sending.Store(false)
	return n
}

// finished tells whether the body has come and been sent to its end; the answer may be a moment ahead of
// that.
func (c *Conn) finished() bool {
	for i := 0; i < 100 && c.sending.Load(); i++ {
		time.Sleep(time.Millisecond)
	}
	return !c.sending.Load() && c.whole() && c.failed == nil
}

// Origins are where requests go: it keeps idle connections to them.
type Origins struct {
	net.Dialer
	sync.Mutex // guards idle
	idle       []*Conn
}

func (o *Origins) lock() (unlock func()) { o.Lock(); return o.Unlock }

// take returns an idle connection to an address, or nil, and closes those that were not needed for too
// long.
func (o *Origins) take(address string) (taken *Conn) {
	defer o.lock()()
	unused := time.Now().Add(-stallWait).UnixNano()
	o.idle = slices.DeleteFunc(o.idle, func(c *Conn) bool {
		wanted := taken == nil && c.origin == address
		if c.renew.Load() < unused || wanted && !alive(c, syscall.Read) {
			c.Close()
			return true
		}
		taken = choose(wanted, c, taken)
		return wanted
	})
	return taken
}

// alive tells whether an idle connection is open and silent: to ask the socket costs 0.5 µs. Windows,
// where read takes a Handle, cannot be asked so; a request that fails is sent again there all the same.
func alive[FD ~int | ~uintptr](c *Conn, read func(FD, []byte) (int, error)) bool {
	raw, err := c.Conn.(*net.TCPConn).SyscallConn()
	try := func(fd uintptr) bool { _, err = read(FD(fd), make([]byte, 1)); return true }
	return os.PathSeparator == '\\' || err == nil && raw.Read(try) == nil && err == syscall.EAGAIN
}

// ask sends a client's request to an address, and returns the final answer's head and the connection that
// has its body; interim ones go to tell. Only what may be sent twice (RFC 9110 §9.2.2) goes to an idle
// connection, and if that was just closing once more to a new one.
func (o *Origins) ask(address string, req *Head, client *Conn,
	tell func(*Head)) (res *Head, c *Conn, err error) {
	twice := client.kind == 0 && oneOf(req.Line[0], "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE")
	for again := twice; ; again = false {
		if c = o.take(choose(again, address, "")); c == nil {
			nc, err := o.Dial("tcp", address)
			if err != nil {
				return nil, nil, err
			}
			c, again = newConn(nc, address), false
		}
		if res, err = c.ask(req, client, tell); err == nil {
			return res, c, nil
		} else if c.Close(); !again || err != errSilent {
			return nil, nil, err
		}
	}
}

// ask does this on one connection.
func (c *Conn) ask(req *Head, client *Conn, tell func(*Head)) (res *Head, err error) {
	c.client, c.out = nil, req.appendTo(c.out[:0])
	_, unsent := c.Write(c.out)
	if client.kind != 0 && unsent == nil {
		c.client = client
		client.sending.Store(true)
		go c.send(client) // the answer may come before its end (RFC 9112 §9.5)
	}
	for {
		if res, err = c.next(true); err != nil {
			return nil, err
		} else if err = attempt(func() { c.expect(res.framing(req.Line[0] == "HEAD")) }); err != nil {
			return nil, err
		} else if c.last = unsent != nil || !res.keepAlive(); res.Status >= 200 {
			return res, nil
		}
		tell(res)
	}
}

func choose[T any](first bool, a, b T) T {
	if first {
		return a
	}
	return b
}
func noEOF(err error) error { return choose(err == io.EOF, io.ErrUnexpectedEOF, err) }
func same(a, b string) bool { return len(a) == len(b) && strings.EqualFold(a, b) } // a Kelvin sign is no k
func oneOf(s string, of ...string) bool {
	return slices.ContainsFunc(of, func(t string) bool { return same(s, t) })
}
func isToken(s string) bool { // as methods and names of fields are (RFC 9110 §5.6.2)
	for _, c := range []byte(s) {
		if c <= ' ' || c > '~' || strings.IndexByte(`"(),/:;<=>?@[\]{}`, c) >= 0 {
			return false
		}
	}
	return s != ""
}
func digits(s string) (int64, bool) { // one too large is the largest
	if s == "" {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err == nil || n > 0
}
func join(b []byte, parts ...string) []byte {
	for _, part := range parts {
		b = append(b, part...)
	}
	return b
}
