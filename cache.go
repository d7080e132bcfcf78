package main

// This file is the store and the rules of caching (RFC 9111). It knows nothing of sockets. A stored
// response is one file, a transcript of the request and the answer, under the URL's name; the file
// system is the index. What is kept in memory only saves reading, and is checked against the files.

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	hotBody    = 64 << 10         // largest body answered from memory
	hotRoom    = 64 << 20         // bytes of all those bodies
	window     = 1 << 20          // bytes a download may be ahead of its readers where there is no file
	worth      = 1 << 20          // bytes that a download nobody reads may still lack to be finished
	strayAge   = time.Hour        // of what a broken download has left
	useAge     = 10 * time.Minute // within which -uses counts
	dateFormat = "Mon, 02 Jan 2006 15:04:05 GMT"
	lengthRoom = 20
	maxHeur    = 7 * 24 * 3600 // seconds: a longer guess at freshness is none
)

var now = time.Now // a test moves it

// A Response is a head and its body: in memory, in a file, in one that still grows, or on its way.
type Response struct {
	*Head
	size int64 // of the body in bytes, -1 while unknown
	mem  []byte
	file *os.File
	off  int64 // where the body begins in file
	tail *tail
	body *body

	// Of a stored one:
	req          *Head // the request it answered, with the fields that Vary selects by
	first, total int64 // which part of how much a 206 is
	born, life   int64 // Unix seconds when its age was 0, seconds it is fresh
	grace, spare int64 // seconds it may serve stale while it is revalidated, or if that fails
	strict       bool  // it must not serve stale
	info         fs.FileInfo
	checked      int64 // atomic: Unix second when info was compared with the file last
}

// A Cache is a directory of responses.
type Cache struct {
	dir   string
	limit int64 // bytes of all files
	ttl   int64 // seconds of freshness where a response says nothing
	uses  int   // GETs within useAge before a response is stored
	root  atomic.Pointer[os.Root]
	full  chan struct{} // wakes evict

	mu      sync.Mutex             // guards what follows, and the users of downloads
	under   map[string]*download   // downloads under way
	hot     map[string]*Response   // small bodies, by key
	seen    map[string][]time.Time // latest GETs, where uses is not 1
	hotSize int64
	size    int64 // of all files
	files   int
}

// fileName returns the name for a key: a URL without scheme, or one, a line feed and a hash of what a
// variant was selected by. "/" becomes "_", as in the lab; all but a few bytes are escaped, upper case
// and "_" included, so that no two share a name on any file system, none is hidden, and none ends in a
// dot or begins with a device's name, which Windows cannot hold.
func fileName(key string) string {
	url, variant, varies := strings.Cut(key, "\n")
	var b strings.Builder
	for i := range len(url) {
		switch c := url[i]; {
		case c == '/':
			b.WriteByte('_')
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '=', c == '.' && 0 < i && i < len(url)-1:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02x", c)
		}
	}
	name := b.String()
	stem, _, _ := strings.Cut(name, ".")
	if isOneOf(strings.TrimRight(stem, "0123456789"), "con", "prn", "aux", "nul", "com", "lpt") {
		name = fmt.Sprintf("%%%02x%s", name[0], name[1:])
	}
	if len(name) > 160 {
		name = fmt.Sprintf("%.120s+%.16x", name, sha256.Sum256([]byte(url)))
	}
	if varies {
		name += "+" + variant
	}
	return name
}

// variant returns the key of the response that req selects where the fields that select are named by
// the Vary of marker, the response stored under the URL itself (RFC 9111 §4.1). The marker's ETag, new
// with each marker, makes variants of an older one unreachable.
func variant(url string, marker, req *Head) string {
	h := sha256.New()
	fmt.Fprintln(h, marker.Get("ETag"), selectors(marker, req))
	return fmt.Sprintf("%s\n%.8x", url, h.Sum(nil))
}

// selectors returns the fields of req that the Vary of res names, in one spelling for what means the
// same: lines joined, no space around commas; languages and codings in lower case and in any order.
func selectors(res, req *Head) (fields []Field) {
	for _, name := range res.list("Vary") {
		values := req.list(name)
		if isOneOf(name, "Accept-Language", "Accept-Encoding") {
			values = strings.Split(strings.ToLower(strings.ReplaceAll(strings.Join(values, ","), " ", "")), ",")
			slices.Sort(values)
		}
		if value := strings.Join(values, ","); value != "" {
			fields = append(fields, Field{strings.ToLower(name), value})
		}
	}
	return fields
}

// lookup returns the stored response for a URL that req selects, nil if there is none, and the key that
// such a response has.
func (c *Cache) lookup(url string, req *Head) (*Response, string) {
	r, key := c.open(url), url
	if r != nil && r.Get("Vary") != "" {
		key = variant(url, r.Head, req)
		if r = c.open(key); r != nil && !slices.Equal(selectors(r.Head, r.req), selectors(r.Head, req)) {
			r.Close()
			r = nil
		}
	}
	return r, key
}

// open returns the response stored under a key. Whatever is wrong with its file makes it nil.
func (c *Cache) open(key string) *Response {
	c.mu.Lock()
	r := c.hot[key]
	c.mu.Unlock()
	t := now()
	if r != nil && atomic.LoadInt64(&r.checked) == t.Unix() {
		return r
	}
	name := fileName(key)
	info, err := c.root.Load().Stat(name)
	if r != nil && err == nil && os.SameFile(info, r.info) && info.ModTime().Equal(r.info.ModTime()) {
		atomic.StoreInt64(&r.checked, t.Unix())
	} else {
		r = c.read(key, name)
	}
	if r != nil && t.Sub(info.ModTime()) > time.Minute {
		c.root.Load().Chtimes(name, t, t) // the last use, for evict
	}
	return r
}

// read opens a file, compares it with its key and its length, and parses its heads.
func (c *Cache) read(key, name string) *Response {
	url, _, _ := strings.Cut(key, "\n")
	r := &Response{Head: new(Head), req: new(Head)}
	f, err := c.root.Load().Open(name)
	if err == nil {
		r.file = f
		r.info, err = f.Stat()
	}
	in := bufio.NewReader(f)
	for _, h := range []*Head{r.req, r.Head} {
		var lines string
		if err == nil {
			lines, err = readLines(in, true)
			r.off += int64(len(lines)) + 2
		}
		if err == nil {
			err = h.parse(lines, h == r.Head)
		}
	}
	n, ok := digits(r.Get("Content-Length"))
	if err == nil && ok && r.req.Line[1] == "http://"+url && r.off+n == r.info.Size() {
		r.size = n
		r.Del("Content-Length")
		r.assess(c.ttl)
		if n > hotBody {
			return r
		}
		r.mem = make([]byte, n)
		if _, err := io.ReadFull(in, r.mem); err == nil {
			r.Close()
			c.heat(key, r)
			return r
		}
	}
	r.Close()
	c.heat(key, nil)
	return nil
}

// heat keeps a response in memory, in the place of any other of that key.
func (c *Cache) heat(key string, r *Response) {
	c.mu.Lock()
	defer c.mu.Unlock()
	drop := func(key string) {
		if old := c.hot[key]; old != nil {
			c.hotSize -= old.size + 1024
			delete(c.hot, key)
		}
	}
	drop(key)
	if r == nil {
		return
	}
	for victim := range c.hot { // any will do: what is asked again soon comes back with one read
		if c.hotSize < hotRoom {
			break
		}
		drop(victim)
	}
	c.hot[key] = r
	c.hotSize += r.size + 1024 // and about so much for its heads
}

func (r *Response) Close() error {
	switch {
	case r.file != nil:
		r.file.Close()
		r.file = nil
	case r.tail != nil:
		r.tail.leave()
	case r.body != nil:
		r.body.Close()
	}
	return nil
}

// reader returns n bytes of the body from off on.
func (r *Response) reader(off, n int64) io.Reader {
	switch {
	case r.tail != nil:
		r.tail.off = off
		if n < 0 {
			n = math.MaxInt64
		}
		return io.LimitReader(r.tail, n)
	case r.file != nil:
		r.file.Seek(r.off+off, io.SeekStart)
		return &io.LimitedReader{R: r.file, N: n}
	case r.body != nil:
		return r.body
	}
	return bytes.NewReader(r.mem[off : off+n])
}

// directive returns the argument of a directive of Cache-Control, and whether it is there.
func (h *Head) directive(name string) (argument string, ok bool) {
	for _, d := range h.list("Cache-Control") {
		if n, argument, _ := strings.Cut(d, "="); strings.EqualFold(n, name) {
			return strings.Trim(argument, `"`), true
		}
	}
	return "", false
}

// seconds returns the argument of a directive as a number; a malformed one is 0, which is stale
// (RFC 9111 §4.2.1). Of several the first counts.
func (h *Head) seconds(directive string) (int64, bool) {
	argument, ok := h.directive(directive)
	n, _ := digits(argument)
	return n, ok
}

// is tells whether a directive is there, without an argument.
func (h *Head) is(directive string) bool { return h.has("Cache-Control", directive) }

// httpDate reads a date in one of the three formats (RFC 9110 §5.6.7), strictly but for case and the
// name of the day, as Unix seconds; 0 if it is none. Two digits are a year at most 50 years ahead.
func httpDate(s string) int64 {
	for _, layout := range []string{dateFormat, "Monday, 02-Jan-06 15:04:05 GMT", "Mon Jan _2 15:04:05 2006"} {
		t, err := time.Parse(layout, strings.ToUpper(s))
		_, got, _ := strings.Cut(s, " ")
		_, want, _ := strings.Cut(t.Format(layout), " ")
		if err == nil && strings.EqualFold(got, want) {
			if strings.Contains(layout, "-06") && t.Before(now().AddDate(-50, 0, 0)) {
				t = t.AddDate(100, 0, 0)
			}
			return t.Unix()
		}
	}
	return 0
}

// heuristic tells whether the status alone allows to keep a response (RFC 9110 §15.1); these are also
// the ones whose caching is understood (RFC 9111 §5.2.2.3).
func (h *Head) heuristic() bool {
	return slices.Contains([]int{200, 203, 204, 206, 300, 301, 308, 404, 405, 410, 414, 501}, h.Status)
}

// lifetime returns for how many seconds a response of this date is fresh, and whether it says so
// itself (RFC 9111 §4.2.1). If not, a tenth of the time since the last change is a fair guess (§4.2.2).
func (h *Head) lifetime(date, ttl int64) (seconds int64, explicit bool) {
	for _, name := range []string{"s-maxage", "max-age"} {
		if n, ok := h.seconds(name); ok {
			return n, true
		}
	}
	if expires := h.Get("Expires"); expires != "" {
		return httpDate(expires) - date, true
	}
	if changed := httpDate(h.Get("Last-Modified")); changed > 0 {
		seconds = min((date-changed)/10, maxHeur)
	}
	if !h.heuristic() && !h.is("public") {
		return 0, false
	}
	return max(seconds, ttl), false
}

// assess works out once what a stored response says about time (RFC 9111 §4.2): its age is the time
// since born, the earlier of when the origin says it made it and when that would have been by Age.
func (r *Response) assess(ttl int64) {
	date, age := httpDate(r.Get("Date")), int64(0)
	if ages := r.list("Age"); len(ages) > 0 {
		age, _ = digits(ages[0])
	}
	r.born = min(date, httpDate(r.req.Get("Date"))-age)
	r.Del("Age")
	r.life, _ = r.lifetime(date, ttl)
	r.grace, _ = r.seconds("stale-while-revalidate")
	r.spare, _ = r.seconds("stale-if-error")
	_, shared := r.directive("s-maxage")
	if r.strict = shared || r.is("must-revalidate") || r.is("proxy-revalidate"); r.is("no-cache") {
		r.life, r.strict = 0, true
	}
	r.total = r.size
	if last := int64(0); r.Status == 206 {
		fmt.Sscanf(r.Get("Content-Range"), "bytes %d-%d/%d", &r.first, &last, &r.total)
		if last+1 == r.total { // it reaches the end, and what came says where that is
			r.total = r.first + r.size
		}
	}
}

// judge tells whether a stored response may answer req as it is (RFC 9111 §4), and with refresh that
// it is to be refreshed behind that; if not why, in the words of Cache-Status (RFC 9211 §2.2).
func (r *Response) judge(req *Head) (why string, refresh bool) {
	age := now().Unix() - r.born
	ttl := r.life - age
	if _, _, n := r.span(req); r.Status == 206 && n < 0 {
		return "partial", false
	}
	if req.is("no-cache") || req.Get("Cache-Control") == "" && req.has("Pragma", "no-cache") {
		return "request", false
	}
	if n, ok := req.seconds("max-age"); ok && (age > n || n == 0) {
		return "request", false
	}
	if n, _ := req.seconds("min-fresh"); ttl > 0 && ttl < n {
		return "request", false
	}
	stale, any := req.seconds("max-stale")
	switch {
	case ttl > 0:
		return "", false
	case !r.strict && any && (-ttl <= stale || req.is("max-stale")):
		return "", false
	case !r.strict && -ttl < r.grace:
		return "", true
	}
	return "stale", false
}

// standsIn tells whether a stale response may answer where the origin failed, with a status or, 0,
// altogether (RFC 5861 §4, RFC 9111 §4.2.4). Who asked for validation does not want it.
func (r *Response) standsIn(req *Head, status int) bool {
	spare, asked := req.seconds("stale-if-error")
	if r == nil || r.strict || req.is("no-cache") || req.has("Pragma", "no-cache") {
		return false
	}
	stale := now().Unix() - r.born - r.life
	return status == 0 && r.spare == 0 && !asked || stale < max(r.spare, spare) &&
		(status == 0 || slices.Contains([]int{500, 502, 503, 504}, status))
}

// condition evaluates a client's condition (RFC 9110 §13.2.2): true if it has what there is.
func (r *Response) condition(req *Head) bool {
	etag := strings.TrimPrefix(r.Get("ETag"), "W/")
	if req.Get("If-None-Match") != "" {
		for _, tag := range req.list("If-None-Match") {
			if tag == "*" || etag != "" && strings.TrimPrefix(tag, "W/") == etag {
				return true
			}
		}
		return false
	}
	changed := httpDate(r.Get("Last-Modified"))
	return changed > 0 && changed <= httpDate(req.Get("If-Modified-Since"))
}

// span returns which bytes of the body req wants, and the status for that: 200 for the whole, also
// where several ranges are asked for (RFC 9110 §14.2), 206 or 416; n is -1 where a part is not there.
func (r *Response) span(req *Head) (status int, off, n int64) {
	spec, ok := strings.CutPrefix(req.Get("Range"), "bytes=")
	from, to, dash := strings.Cut(spec, "-")
	a, isFrom := digits(from)
	b, isTo := digits(to)
	since := req.Get("If-Range")
	switch {
	case !ok || !dash || r.size < 0 || r.Status != 200 && r.Status != 206 || req.Line[0] != "GET",
		since != "" && (since != r.Get("ETag") || since[0] != '"') && since != r.Get("Last-Modified"):
		isFrom, isTo = false, false
	case from == "" && isTo:
		a, b, isFrom = max(0, r.total-b), r.total-1, true
	case to == "" || b >= r.total:
		b, isTo = r.total-1, to == "" || isTo
	}
	asked := isFrom && isTo && (a <= b || a >= r.total)
	switch {
	case r.Status == 206 && (!asked || a < r.first || b >= r.first+r.size):
		return 206, 0, -1
	case !asked:
		return r.Status, 0, r.size
	case a >= r.total:
		return 416, 0, 0
	}
	return 206, a - r.first, b - a + 1
}

// storable tells whether a shared cache may keep the answer r to req, and has use for it (RFC 9111 §3).
func (c *Cache) storable(req *Head, r *Response) bool {
	life, explicit := r.lifetime(httpDate(r.Get("Date")), c.ttl)
	_, shared := r.directive("s-maxage")
	_, grace := r.directive("stale-while-revalidate")
	_, spare := r.directive("stale-if-error")
	_, _, part := r.span(req)
	switch {
	case r.Status == 304, r.Status == 206 && part < 0, r.size > c.limit, req.is("no-store"), r.is("private"),
		r.has("Vary", "*"), r.is("no-store") && !r.is("must-understand"),
		r.is("must-understand") && !r.heuristic(),
		!explicit && (r.Get("Set-Cookie") != "" || !r.heuristic() && !r.is("public")),
		req.Get("Authorization") != "" && !r.is("public") && !r.is("must-revalidate") && !shared:
		return false
	}
	return life > 0 || r.Get("ETag") != "" || r.Get("Last-Modified") != "" || grace || spare
}

// A download is a body on its way into a file. Who asked for it, and who asks while it is under way,
// read the file as it grows, each at its own pace: none depends on another.
type download struct {
	Response // what is answered from it
	key      string
	ready    chan struct{} // closed when it is known whether there is anything to answer from:
	shared   bool          // there is
	c        *Cache
	temp     string // the file's name until it is whole
	src      source

	mu    sync.Mutex // guards what follows, and is taken after c.mu
	more  sync.Cond  // some of it has changed
	got   int64      // bytes that have arrived
	taken int64      // bytes the file has taken, MaxInt64 as long as it takes all
	kept  []byte     // what came after and somebody has still to read,
	base  int64      // from here on
	tails map[*tail]bool
	void  bool // it must not be kept
	done  bool
	err   error
}

// A source is where a download's body comes from: an origin, or again the file of a response that has
// been validated. abort ends it early.
type source interface {
	io.ReadCloser
	abort()
}

type again struct {
	io.Reader
	*Response
}

func (again) abort() {} // a file is soon read

// response is what answers somebody with an interest in the download.
func (t *tail) response() *Response {
	t.d.mu.Lock()
	defer t.d.mu.Unlock()
	r := t.d.Response
	r.tail, r.file = t, nil
	return &r
}

// A tail is somebody's interest in a download, and how far it has been read.
type tail struct {
	d   *download
	off int64
}

// join gives an interest in the download under way for a key. If there is none it begins one, which
// the caller has to lead: to ask the origin, and then to call store or drop.
func (c *Cache) join(key string) (t *tail, leads bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.under[key]
	if leads = d == nil; leads {
		d = &download{ready: make(chan struct{}), c: c, taken: math.MaxInt64, tails: map[*tail]bool{}}
		d.more.L, d.key = &d.mu, key
		c.under[key] = d
	}
	t = &tail{d: d}
	d.mu.Lock()
	d.tails[t] = true
	d.mu.Unlock()
	return t, leads
}

// drop says that there will be nothing to answer from: those who wait ask for themselves.
func (c *Cache) drop(d *download) {
	c.mu.Lock()
	if c.under[d.key] == d {
		delete(c.under, d.key)
	}
	c.mu.Unlock()
	close(d.ready)
}

// store keeps res, the answer to req with a body of size bytes or -1, if that is allowed. Fields that
// are for the one who asked alone are taken out and returned.
func (c *Cache) store(d *download, url string, req, res *Head, size int64, asked time.Time,
	src source) (own []Field, err error) {
	d.Head, d.size, d.src, d.total = res, size, src, size
	if !c.storable(req, &d.Response) {
		return nil, errors.ErrUnsupported
	}
	d.req = &Head{[3]string{"GET", "http://" + url, "HTTP/1.1"}, 0, selectors(res, req)}
	d.req.Set("Date", asked.UTC().Format(dateFormat))
	names := []string{"Set-Cookie", "Set-Cookie2"}
	for _, directive := range []string{"private", "no-cache"} {
		fields, _ := res.directive(directive)
		names = append(names, strings.FieldsFunc(fields, func(r rune) bool { return r == ',' || r == ' ' })...)
	}
	own = res.Del(names...)
	key, err := c.place(url, req, res)
	if err == nil {
		d.file, d.temp, d.off, err = c.create(d.req, res, size)
	}
	if err != nil {
		log.Print(err)
		res.Fields = append(res.Fields, own...)
		return nil, err
	}
	d.assess(c.ttl)
	c.mu.Lock()
	if c.under[d.key] == d {
		delete(c.under, d.key)
		c.under[key] = d
	}
	d.key, d.shared = key, true
	c.mu.Unlock()
	close(d.ready)
	go d.run()
	return own, nil
}

// place returns the key for an answer. Where it varies that is not the URL, whose own file becomes a
// marker then: an answer without a body that says by which fields to select.
func (c *Cache) place(url string, req, res *Head) (string, error) {
	vary := strings.Join(res.list("Vary"), ", ")
	if vary == "" {
		return url, nil
	}
	marker := c.open(url)
	if marker == nil || marker.Get("Vary") != vary {
		head := &Head{[3]string{"HTTP/1.1", "200", "OK"}, 200, []Field{{"Vary", vary}, {"ETag", rand.Text()}}}
		marker = &Response{Head: head, req: &Head{[3]string{"GET", "http://" + url, "HTTP/1.1"}, 0, nil}}
		file, temp, _, err := c.create(marker.req, head, 0)
		if err != nil {
			return "", err
		}
		file.Close()
		if err := c.root.Load().Rename(temp, fileName(url)); err != nil {
			return "", err
		}
		c.heat(url, nil)
	}
	return variant(url, marker.Head, req), nil
}

// create makes a temporary file with the two heads. The length has room in its field, to be written
// when it is known.
func (c *Cache) create(req, res *Head, size int64) (f *os.File, name string, off int64, err error) {
	name = "+download-" + rand.Text()
	f, err = c.root.Load().OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrNotExist) { // the directory has been removed
		if err = c.openDir(); err == nil {
			f, err = c.root.Load().OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		}
	}
	if err != nil {
		return nil, "", 0, err
	}
	length := ""
	if size >= 0 {
		length = fmt.Sprint(size)
	}
	b := res.appendTo(req.appendTo(nil), Field{"Content-Length", fmt.Sprintf("%*s", lengthRoom, length)})
	if _, err = f.Write(b); err != nil {
		f.Close()
		c.root.Load().Remove(name)
	}
	return f, name, int64(len(b)), err
}

func (d *download) run() {
	_, err := io.Copy(counter{d}, io.TeeReader(d.src, d))
	d.src.Close()
	root := d.c.root.Load()
	d.mu.Lock()
	if d.err = err; err == nil && d.size < 0 {
		d.size = d.got
		d.file.WriteAt(fmt.Appendf(nil, "%*d", lengthRoom, d.got), d.off-4-lengthRoom)
	}
	if err != nil || d.void || d.taken < math.MaxInt64 || root.Rename(d.temp, fileName(d.key)) != nil {
		root.Remove(d.temp)
	}
	d.done = true
	d.more.Broadcast()
	if len(d.tails) == 0 {
		d.file.Close()
	}
	d.mu.Unlock()
	d.c.heat(d.key, nil)
	d.c.mu.Lock()
	if d.c.under[d.key] == d {
		delete(d.c.under, d.key)
	}
	d.c.size += d.off + d.got
	d.c.files++
	if d.c.size > d.c.limit {
		select {
		case d.c.full <- struct{}{}:
		default:
		}
	}
	d.c.mu.Unlock()
}

// Write puts what arrives into the file. It never fails, as an error here would end the io.TeeReader and
// so cut all clients: what the file does not take is kept for those who read, and the body waits for
// the slowest of them while it is a window ahead.
func (d *download) Write(p []byte) (int, error) {
	n := 0
	if d.taken == math.MaxInt64 {
		err := error(nil)
		if n, err = d.file.Write(p); err == nil && d.got+int64(n) <= d.c.limit {
			return n, nil
		}
		log.Printf("not stored: %s: %v", d.key, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.taken == math.MaxInt64 {
		d.taken = d.got + int64(n)
		d.base = d.taken
	}
	for len(d.kept) > window && len(d.tails) > 0 {
		d.more.Wait()
	}
	d.kept = append(d.kept, p[n:]...)
	return len(p), nil
}

// A counter tells those who wait that bytes have arrived.
type counter struct{ d *download }

func (c counter) Write(p []byte) (int, error) {
	c.d.mu.Lock()
	c.d.got += int64(len(p))
	c.d.more.Broadcast()
	c.d.mu.Unlock()
	return len(p), nil
}

func (t *tail) Read(p []byte) (n int, err error) {
	d := t.d
	d.mu.Lock()
	defer d.mu.Unlock()
	for t.off >= d.got && !d.done {
		d.more.Wait()
	}
	switch p = p[:min(int64(len(p)), d.got-t.off)]; {
	case len(p) == 0 && d.err != nil:
		return 0, noEOF(d.err)
	case len(p) == 0:
		return 0, io.EOF
	case t.off < d.taken:
		p = p[:min(int64(len(p)), d.taken-t.off)]
		d.mu.Unlock()
		n, err = d.file.ReadAt(p, d.off+t.off)
		d.mu.Lock()
		t.off += int64(n)
		return n, err
	}
	n = copy(p, d.kept[t.off-d.base:])
	t.off += int64(n)
	slowest := t.off
	for other := range d.tails {
		slowest = min(slowest, other.off)
	}
	if read := slowest - d.base; read > 0 {
		d.kept, d.base = d.kept[read:], slowest
		d.more.Broadcast()
	}
	return n, nil
}

// leave ends an interest. A download that interests nobody goes on only if it is nearly whole.
func (t *tail) leave() {
	d := t.d
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.tails, t)
	d.more.Broadcast()
	if len(d.tails) > 0 || !d.shared {
		return
	}
	if d.done {
		d.file.Close()
	} else if d.size < 0 || d.size-d.got > worth || d.taken < math.MaxInt64 {
		if d.c.under[d.key] == d {
			delete(d.c.under, d.key)
		}
		d.src.abort()
	}
}

// invalidate forgets what is stored for a URL, and what is being stored.
func (c *Cache) invalidate(url string) {
	c.mu.Lock()
	d := c.under[url]
	delete(c.under, url)
	c.mu.Unlock()
	if d != nil {
		d.mu.Lock()
		d.void = true
		d.mu.Unlock()
	}
	c.root.Load().Remove(fileName(url))
	c.heat(url, nil)
}

// update puts the fields of a 304 in the place of the stored ones, but for those that describe the stored
// body (RFC 9111 §3.2).
func (r *Response) update(res *Head) *Head {
	h, n := r.Clone(), res.Clone()
	n.Del("Content-Length", "Content-Encoding", "Content-Range")
	for _, f := range n.Fields {
		h.Del(f.Name)
	}
	h.Fields = append(h.Fields, n.Fields...)
	return h
}

// due counts a GET that has to be fetched, and tells whether its answer is to be stored.
func (c *Cache) due(url string) bool {
	if c.uses <= 1 {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.seen) > 1<<16 {
		clear(c.seen) // counted anew: cheaper than to find out which are old
	}
	t := now()
	times := append(c.seen[url], t)
	times = slices.DeleteFunc(times[max(0, len(times)-c.uses):], func(s time.Time) bool { return t.Sub(s) > useAge })
	c.seen[url] = times
	return len(times) == c.uses
}

// tend keeps the directory within its limit: it looks at it at the start, whenever the limit may be
// passed, and every ten minutes.
func (c *Cache) tend() {
	for {
		c.trim()
		select {
		case <-c.full:
		case <-time.After(useAge):
		}
	}
}

// trim counts the files, removes what broken downloads have left, and over the limit the files least
// recently used, a twentieth more than need be so that it is not at once to be done again.
func (c *Cache) trim() {
	dir, err := c.root.Load().Open(".")
	if err != nil {
		return
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	var infos []fs.FileInfo
	size := int64(0)
	for _, name := range names {
		info, err := c.root.Load().Lstat(name)
		if err != nil || !info.Mode().IsRegular() {
			continue
		}
		if strings.HasPrefix(name, "+download-") && now().Sub(info.ModTime()) > strayAge {
			c.root.Load().Remove(name)
		} else if strings.Contains(name, "_") {
			infos = append(infos, info)
			size += info.Size()
		}
	}
	if size > c.limit {
		slices.SortFunc(infos, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
		for len(infos) > 0 && size > c.limit-c.limit/20 {
			if c.ours(infos[0].Name()) && c.root.Load().Remove(infos[0].Name()) == nil {
				size -= infos[0].Size()
			}
			infos = infos[1:]
		}
	}
	c.mu.Lock()
	c.size, c.files = size, len(infos)
	c.mu.Unlock()
}

// ours tells whether the cache has made a file: its first line has the URL that its name is made of.
func (c *Cache) ours(name string) bool {
	f, err := c.root.Load().Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	line, _ := bufio.NewReader(f).ReadString('\n')
	url, ok := strings.CutPrefix(line, "GET http://")
	url, _, _ = strings.Cut(url, " ")
	made := fileName(url)
	return ok && (name == made || strings.HasPrefix(name, made+"+"))
}

func newCache(dir string, limit, ttl int64, uses int) *Cache {
	return &Cache{dir: dir, limit: limit, ttl: ttl, uses: uses, full: make(chan struct{}, 1),
		under: map[string]*download{}, hot: map[string]*Response{}, seen: map[string][]time.Time{}}
}

func (c *Cache) openDir() error {
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return err
	}
	root, err := os.OpenRoot(c.dir)
	if err == nil {
		c.root.Store(root)
	}
	return err
}
