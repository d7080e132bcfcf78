package main

// HTTP/1.1 on the wire (RFC 9110, RFC 9112): heads, where bodies end, connections. Nothing here caches.
import (
	"bufio"
	"cmp"
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
	maxPiece   = 256 << 10        // bytes that a slow reader has to take within stallWait
	maxCopied  = 4 << 10          // bytes that are copied to be written with others
	maxIdle    = 512              // connections to origins that wait for use, of 8 KiB each
	headWait   = 30 * time.Second // from a head's first byte to its last, however they trickle in
	stallWait  = 60 * time.Second // for a request, for an idle connection's use, for any progress
	tunnelWait = 15 * time.Minute // for any progress of a tunnel

	chunked, untilClose, endless = -1, -2, 1 << 62 // what framing returns besides a length; more than any
)

var unread = new(Head)                                                // for what could not be read
var errSilent = errors.New("closed the connection without an answer") // as an idle one may at any time

// An Error is what a client is told: a status and a sentence. must ends an exchange with one, fail with
// any error, by a panic that attempt turns into an error again: so a check takes one line.
type Error string

func (e Error) Error() string { return string(e[4:]) }
func must(ok bool, sentence string, about ...string) {
	if !ok {
		for _, text := range about {
			sentence += fmt.Sprintf(" %+.200q", text)
		}
		panic(Error(sentence))
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

// line reads a line. Control characters are refused, and a bare LF where it is strict, as another program
// may see an end there: that is how requests are smuggled and answers split (RFC 9112 §2.2, §11).
func (c *Conn) line(strict bool, long string) (text string) {
	for !strings.HasSuffix(text, "\n") {
		part, err := c.in.ReadSlice('\n') // a full buffer is no error
		c.room -= int64(len(part))
		must(c.room >= 0, long)
		fail(choose(err == bufio.ErrBufferFull, nil, err))
		text += string(part)
	}
	text, crlf := strings.CutSuffix(text[:len(text)-1], "\r")
	bad := slices.ContainsFunc([]byte(text), func(b byte) bool { return b < ' ' && b != '\t' || b == 0x7f })
	must(!bad && (crlf || !strict), "400 control character in a line, or the end of one without CR:", text)
	return text
}

// fields reads fields up to an empty line. A folded one is malformed (RFC 9112 §5.2).
func (c *Conn) fields(strict bool) (fields []Field) {
	const long = "431 more than 256 fields, or 64 KiB"
	fields = make([]Field, 0, 12)
	for text := c.line(strict, long); text != ""; text = c.line(strict, long) {
		name, value, colon := strings.Cut(text, ":")
		must(colon && isToken(name), "400 malformed field", text)
		must(len(fields) < maxFields, long)
		fields = append(fields, Field{name, strings.Trim(value, " \t")})
	}
	return fields
}

// head reads the head of a request, or of an answer.
func (c *Conn) head(answer bool) *Head {
	const long = "414 a first line of more than 64 KiB"
	line := c.line(false, long)
	if line == "" { // one before it is let pass (RFC 9112 §2.2)
		line = c.line(false, long)
	}
	h := new(Head)
	h.Line[0], h.Line[1], _ = strings.Cut(line, " ")
	h.Line[1], h.Line[2], _ = strings.Cut(h.Line[1], " ")
	version, valid := h.Line[2], isToken(h.Line[0]) && h.Line[1] != "" && !strings.Contains(line, "\t")
	if answer { // 101 is refused, as no Upgrade is passed on
		h.Status, _ = strconv.Atoi(h.Line[1])
		version, valid = h.Line[0], len(h.Line[1]) == 3 && h.Status >= 100 && h.Status != 101
	}
	must(valid && strings.HasPrefix(version, "HTTP/"), "400 malformed first line", line)
	must(len(version) == 8 && "HTTP/1.0" <= version && version <= "HTTP/1.9", "505 unknown version", version)
	h.Fields = c.fields(false)
	return h
}

// text appends the head to b, and more fields, given by name and value in turn, but for those without a
// value. Set takes them in the same way, and puts them in the place of all fields of those names.
func (h *Head) text(b []byte, pairs ...string) []byte {
	first := choose(h.Status == 0, h.Line[0], "HTTP/1.1") // an answer's version is ours (RFC 9110 §6.2)
	line := func(name, separator, value string) {
		b = append(append(append(append(b, name...), separator...), value...), "\r\n"...)
	}
	line(first+" "+h.Line[1], " ", h.Line[2])
	for _, f := range h.Fields {
		line(f.Name, ": ", f.Value)
	}
	for ; len(pairs) > 0; pairs = pairs[2:] {
		if pairs[1] != "" {
			line(pairs[0], ": ", pairs[1])
		}
	}
	return append(b, "\r\n"...)
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
		if h.Del(pairs[0]); pairs[1] != "" {
			h.Fields = append(h.Fields, Field{pairs[0], pairs[1]})
		}
	}
}

// list splits all fields of a name at commas, but not at those in quoted strings (RFC 9110 §5.6.1).
func (h *Head) list(name string) (elements []string) {
	for _, f := range h.Fields {
		for i, start, quoted := 0, 0, false; i <= len(f.Value) && (i > 0 || same(f.Name, name)); i++ {
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
func (h *Head) old() bool { return h.Line[choose(h.Status == 0, 2, 0)] == "HTTP/1.0" }
func (h *Head) keepAlive() bool { // RFC 9112 §9.3
	options := append(h.list("Connection"), h.list("Proxy-Connection")...)
	return !oneOf("close", options...) && (!h.old() || oneOf("keep-alive", options...))
}

// endToEnd removes what concerns one connection only (RFC 9110 §7.6.1): what Connection names, but not
// what framing, routing and caching need, as to name that is an attack; and Trailer, as we drop them.
func (h *Head) endToEnd() {
	h.Del(slices.DeleteFunc(h.list("Connection"), func(name string) bool {
		return oneOf(name, "Host", "Content-Length", "Via", "Max-Forwards", "Cache-Control", "Vary")
	})...)
	h.Del("Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authentication-Info",
		"Proxy-Authorization", "Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade")
}

// via is what we say of a message (RFC 9110 §7.6.3).
func via(h *Head) string { return choose(h.old(), "1.0 ", "1.1 ") + pseudonym }

// framing decides, and nothing else does, where the body behind h ends (RFC 9112 §6.3): after a length,
// with the last chunk, or with the connection. What two readers could take in two ways is refused:
// several lengths, one beside a transfer coding, a coding in HTTP/1.0, or any but one chunked. Only an
// answer may have one that nobody knows.
func (h *Head) framing(bodiless bool) int64 {
	lengths, codings := h.list("Content-Length"), h.list("Transfer-Encoding")
	length, ok := digits(append(lengths, "0")[0])
	ok = ok && length < endless && len(lengths) < 2 && (len(lengths) == 0 || len(codings) == 0)
	coding := strings.Join(codings, ", ")
	must(ok, "400 contradictory Content-Length and Transfer-Encoding:", strings.Join(lengths, ", "), coding)
	plain := same(coding, "chunked") && !h.old()
	other := h.Status != 0 && isToken(coding) && !strings.Contains(strings.ToLower(coding), "chunk") &&
		!oneOf(coding, "gzip", "deflate", "compress", "identity")
	must(len(codings) == 0 || plain || other, "501 no transfer coding but one chunked is supported:", coding)
	if bodiless || 100 <= h.Status && h.Status < 200 || h.Status == 204 || h.Status == 304 {
		return 0
	}
	length = choose(len(lengths) == 0 && h.Status != 0, untilClose, length)
	return choose(plain, chunked, length)
}

// authority returns host[:port] in one spelling: lower case, IPv6 as in RFC 5952, and with a port.
func authority(s string) string {
	host, port := s, "80"
	if i := strings.LastIndexByte(host, ':'); i > strings.LastIndexByte(host, ']') {
		host, port = host[:i], host[i+1:]
	}
	n, err := strconv.ParseUint(cmp.Or(port, "80"), 10, 16)
	ok := host != "" && err == nil && n > 0
	if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		ip, _ := netip.ParseAddr(host[1 : len(host)-1])
		host, ok = "["+ip.String()+"]", ok && ip.Is6() && ip.Zone() == ""
	} else { // checked before lower case makes a k of a Kelvin sign
		ok = ok && isToken(host) && !strings.ContainsAny(host, "!#$%&'*+^`|~")
	}
	must(ok, "400 no host with or without a port:", s)
	return strings.ToLower(host) + ":" + strconv.FormatUint(n, 10)
}

func portOf(address string) string { return address[strings.LastIndexByte(address, ':')+1:] }
func hostOf(address string) string { host, _, _ := net.SplitHostPort(address); return host }

// authority remembers the last: Host, the URL and the next request have the same, and one costs 0.5 µs.
func (c *Conn) authority(s string) string {
	if s == "" || s != c.named {
		c.named, c.address = s, authority(s)
	}
	return c.address
}

// A Conn is a connection to a client or an origin, on which no read or write waits longer than wait, or a
// file, and the message that is being read from it; expect begins its body, of a kind as framing says.
type Conn struct {
	net.Conn
	in             *bufio.Reader
	out            []byte      // what goes out with the next Write
	pair           [2][]byte   // what goes out at once, here so that it leaves no garbage,
	gather         net.Buffers // and as the system takes it
	written        int64       // bytes of the exchange
	wait           time.Duration
	renew          atomic.Int64 // Unix nanoseconds from which on the deadline has to be moved
	room           int64        // bytes that lines may have until they are too long
	origin         string       // where it leads to, host:port
	peer           string       // whom it leads to, without a port
	kind, left     int64        // what framing said, 0 after the last chunk; bytes to come, of it or a chunk
	begun, last    bool         // a chunk has been read, but for the CR LF behind it; no message follows
	upload         transfer     // of the request's body from the client to the origin, if it has one
	named, address string       // the authority that has been read last, and its one spelling
}

func newConn(nc net.Conn, origin string) *Conn {
	c := &Conn{Conn: nc, wait: stallWait, origin: origin, peer: hostOf(nc.RemoteAddr().String())}
	c.in = bufio.NewReader(c)
	return c
}
func (c *Conn) extend() { // once in a sixteenth of the wait, as it costs 0.3 µs
	if t := time.Now(); t.UnixNano() > c.renew.Load() {
		c.renew.Store(t.Add(c.wait / 16).UnixNano())
		c.SetDeadline(t.Add(c.wait + c.wait/16))
	}
}
func (c *Conn) Read(p []byte) (int, error) { c.extend(); return c.Conn.Read(p) }

// Write writes out and p: a small p as one with out, as each write costs 5 µs, else not copied, in pieces
// that a slow reader takes in time.
func (c *Conn) Write(p []byte) (n int, err error) {
	if n = len(p); n <= maxCopied {
		c.out, p = append(c.out, p...), nil
	}
	for err == nil && len(c.out)+len(p) > 0 {
		head, piece := c.out, p[:min(len(p), maxPiece)]
		c.out, p = choose(cap(c.out) > 2*maxCopied, nil, c.out[:0]), p[len(piece):]
		c.extend()
		c.pair, c.gather = [2][]byte{head, piece}, c.pair[:]
		written, failed := c.gather.WriteTo(c.Conn)
		c.written, err = c.written+written, failed
	}
	return n, err
}
func (c *Conn) expect(kind int64) {
	c.kind, c.left, c.begun, c.upload = kind, choose(kind == untilClose, endless, max(kind, 0)), false, nil
	c.room = maxHead
}
func (c *Conn) whole() bool { return c.left == 0 && c.kind != chunked }

// next reads the next head. Begun, it has to be whole in headWait.
func (c *Conn) next(answer bool) (h *Head, err error) {
	if _, err := c.in.Peek(1); err != nil {
		return nil, choose(os.IsTimeout(err), err, errSilent)
	}
	if b, _ := c.in.Peek(c.in.Buffered()); string(b[max(0, len(b)-4):]) != "\r\n\r\n" { // more may come
		c.SetDeadline(time.Now().Add(headWait))
		c.renew.Store(endless) // no progress moves this one
		defer c.renew.Store(0)
	}
	c.room = maxHead
	err = attempt(func() { h = c.head(answer) })
	err = choose[error](os.IsTimeout(err), Error("408 the head has not come in 30 seconds"), err)
	return cmp.Or(h, unread), err
}

// A body is what follows a head, decoded. What breaks it off is an Error, as no failure to write is. ready
// tells of it, or of any reader, that all it has, or of the chunk that it is in, is here.
type body struct{ *Conn }

func (b body) ready() bool   { return b.whole() || b.left > 0 && b.left <= int64(b.in.Buffered()) }
func ready(r io.Reader) bool { w, waits := r.(interface{ ready() bool }); return !waits || w.ready() }
func (b body) Read(p []byte) (n int, err error) {
	if b.kind == chunked && b.left == 0 {
		err = attempt(b.nextChunk)
	}
	if err == nil {
		n, err = io.LimitReader(b.in, b.left).Read(p)
		b.left -= int64(n)
	}
	ends := err == io.EOF && (b.whole() || b.kind == untilClose)
	if _, told := err.(Error); err != nil && !told && !ends {
		err = Error(choose(os.IsTimeout(err), "408 the body's rest has not come", "400 the body breaks off"))
	}
	return n, err
}

// nextChunk reads what stands between two chunks' data, and behind the last one trailers. These are
// dropped, as nothing may depend on them (RFC 9110 §6.5.1), and so are extensions: all that is not data
// has room for 16 bytes a chunk and 64 KiB beyond, so nobody keeps us reading for nothing.
func (b body) nextChunk() {
	const long = "400 chunk extensions of more than 64 KiB"
	must(!b.begun || b.line(true, long) == "", "400 a chunk is longer than its size")
	line := b.line(true, long)
	size, _, _ := strings.Cut(line, ";")
	n, err := strconv.ParseUint(strings.TrimRight(size, " \t"), 16, 60) // some servers pad it
	must(err == nil && len(size) < 20, "400 malformed chunk size", line)
	if b.left, b.begun, b.room = int64(n), true, b.room+16; n == 0 {
		b.fields(true)
		b.kind = 0
	}
}

// Close keeps an origin's connection for another request if this one is over, and nothing more is said.
func (b body) Close() error {
	if !b.whole() || b.last || b.in.Buffered() > 0 || b.upload.unfinished() != nil {
		return b.Conn.Close()
	}
	b.extend()
	defer lock(&origins)()
	origins.idle = append(origins.idle, b.Conn)
	return nil
}

// A chunkWriter writes each piece that it is given as one chunk.
type chunkWriter struct{ *Conn }

func (w chunkWriter) Write(p []byte) (int, error) {
	_, err := fmt.Fprintf(w.Conn, "%x\r\n%s\r\n", len(p), p)
	return len(p), err
}

// send writes a body, each piece as it comes, to its end.
func (c *Conn) send(from io.Reader, chunks bool) (n int64, err error) {
	to := choose[io.Writer](chunks, chunkWriter{c}, c)
	if n, err = io.Copy(to, from); err == nil {
		_, err = to.Write(nil) // the last chunk, or what has been gathered
	}
	return n, err
}

// A transfer carries a body from one connection to another beside what else goes on, and says how it ended.
type transfer chan error

// carry sends the body that comes on another connection, and then, in a tunnel, that nothing more comes.
// Where it breaks off the connection is closed: a part must not be taken for the whole. But where it is
// not taken any more there may be an answer to it.
func (c *Conn) carry(from *Conn) transfer {
	t := make(transfer, 1)
	go func() {
		_, err := c.send(body{from}, from.kind == chunked)
		if _, cut := err.(Error); cut || err != nil && from.kind == untilClose {
			c.Conn.Close()
		} else if from.kind == untilClose {
			c.Conn.(*net.TCPConn).CloseWrite()
		}
		t <- err
	}()
	return t
}

// unfinished is what broke it, or that it goes on; an answer may be a moment ahead of the end.
func (t transfer) unfinished() error {
	if t == nil {
		return nil
	}
	select {
	case err := <-t:
		t <- err // for who asks next
		return err
	case <-time.After(100 * time.Millisecond):
		return errors.New("goes on")
	}
}

// Origins are where requests go: it keeps idle connections to them.
type Origins struct {
	net.Dialer
	sync.Mutex // guards idle
	idle       []*Conn
}

// take returns an idle connection to an address, or nil, and closes those that are too many or too old.
func (o *Origins) take(address string) (taken *Conn) {
	defer lock(o)()
	unused, behind := time.Now().Add(-stallWait).UnixNano(), len(o.idle)
	o.idle = slices.DeleteFunc(o.idle, func(c *Conn) bool {
		wanted := taken == nil && c.origin == address
		behind--
		if behind >= maxIdle || c.renew.Load() < unused || wanted && !alive(c, syscall.Read) {
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
func (o *Origins) ask(address string, req *Head, client *Conn, tell func(*Head)) (*Head, *Conn, error) {
	twice := client.kind == 0 && oneOf(req.Line[0], "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE")
	if c := o.take(choose(twice, address, "")); c != nil { // none leads to ""
		if res, err := c.ask(req, client, tell); err != errSilent {
			return res, c, err
		}
	}
	nc, err := o.Dial("tcp", address)
	if err != nil {
		return nil, nil, err
	}
	c := newConn(nc, address)
	res, err := c.ask(req, client, tell)
	return res, c, err
}

// ask does this on one connection, and closes it where it fails.
func (c *Conn) ask(req *Head, client *Conn, tell func(*Head)) (res *Head, err error) {
	c.out = req.text(c.out)
	_, unsent := c.Write(nil)
	if client.kind != 0 && unsent == nil { // the answer may come before its end (RFC 9112 §9.5)
		client.upload = c.carry(client)
	}
	for n := 0; err == nil && (res == nil || res.Status < 200); n++ {
		if res, err = c.next(true); err == nil {
			err = attempt(func() { c.expect(res.framing(req.Line[0] == "HEAD")) })
			err = choose[error](n > maxFields, Error("502 more than 256 interim answers"), err)
			c.last, c.upload = unsent != nil || !res.keepAlive(), client.upload
		}
		if err == nil && res.Status < 200 {
			tell(res)
		}
	}
	if err != nil {
		c.Close()
	}
	return res, err
}

func choose[T any](first bool, a, b T) T {
	if first {
		return a
	}
	return b
}
func same(a, b string) bool { return len(a) == len(b) && strings.EqualFold(a, b) } // a Kelvin sign is no k
func oneOf(s string, of ...string) bool {
	return slices.ContainsFunc(of, func(t string) bool { return same(s, t) })
}
func lock(l sync.Locker) (unlock func()) { l.Lock(); return l.Unlock } // defer lock(l)() holds it to the end
func separates(c rune) bool              { return c <= ' ' || c == ',' }
func isToken(s string) bool { // as methods and names of fields are (RFC 9110 §5.6.2)
	return s != "" && !slices.ContainsFunc([]byte(s), func(b byte) bool {
		return b <= ' ' || b > '~' || strings.IndexByte(`"(),/:;<=>?@[\]{}`, b) >= 0
	})
}
func digits(s string) (int64, bool) { // one too large is the largest
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err == nil || n > 0
}
