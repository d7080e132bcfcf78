package main

// This file is the store and the rules of caching (RFC 9111). A stored response is one file, a transcript of
// the request and the answer, under the URL's name: the file system is the index. It knows no sockets.

import (
	"bufio"
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"log"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// temporary begins the names of files that are not whole. Answers whose status is understood may be kept even
// if they do not say so (RFC 9110 §15.1, RFC 9111 §5.2.2.3). Tests move now.
const temporary, dateFormat = "+download-", "Mon, 02 Jan 2006 15:04:05 GMT"
const maxSeconds = 1 << 31 // RFC 9111 §1.2.2

var now, understood = time.Now, []int{200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501}

// A Response is a head and a body: a text, a file, one that grows (these seek), or what comes from an origin.
type Response struct {
	*Head
	io.ReadCloser
	off, size  int64 // where the body begins, its bytes, -1 while unknown
	req        *Head // of a stored one: its URL, when it was asked for, and what Vary selects by
	born, life int64 // Unix seconds when its age was 0, seconds it is fresh
	strict     bool  // it must not be used stale
}

// A Cache is a directory of responses.
type Cache struct {
	dir              string
	limit, ttl, size int64      // bytes at most, seconds of freshness if nothing is said, bytes of all files
	uses             int        // GETs within ten minutes from which on responses are stored
	mu               sync.Mutex // guards size and what follows, and what changes in downloads
	under            map[string]*download
	seen             map[string][]time.Time
}

func (c *Cache) lock() (unlock func())  { c.mu.Lock(); return c.mu.Unlock }
func (c *Cache) path(key string) string { return c.dir + "/" + fileName(key) }

// fileName returns the name of the file for a key: a URL without its scheme, and after a line feed what a
// variant adds. "/" becomes "_", as in the lab; upper case, "_" and most else is escaped: no two keys share a
// file on any system, no name is hidden, ends in a dot, or begins like a device.
func fileName(key string) string {
	url, variant, _ := strings.Cut(key, "\n")
	stem, _, _ := strings.Cut(url, ".")
	device := isOneOf(strings.TrimRight(stem, "0123456789"), "con", "prn", "aux", "nul", "com", "lpt")
	var name []byte
	for i, b := range []byte(url) {
		if strings.IndexByte("abcdefghijklmnopqrstuvwxyz0123456789-/", b) >= 0 && (i > 0 || !device) ||
			b == '.' && 0 < i && i < len(url)-1 {
			name = append(name, b)
		} else {
			name = fmt.Appendf(name, "%%%02x", b)
		}
	}
	if len(name) > 160 {
		name = fmt.Appendf(nil, "%s+%.16x", name[:120], sha256.Sum256([]byte(url)))
	}
	return strings.ReplaceAll(string(name), "/", "_") + variant
}

// varied returns the fields of req that Vary names (RFC 9111 §4.1), in one spelling for what means the same:
// lines joined, no space around commas; languages and codings in any case and order.
func (r *Response) varied(req *Head) []Field {
	var h Head
	for _, name := range r.list("Vary") {
		value := strings.Join(req.list(name), ",")
		if isOneOf(name, "Accept-Language", "Accept-Encoding") {
			value = strings.ToLower(strings.ReplaceAll(value, " ", ""))
			value = strings.Join(slices.Sorted(strings.SplitSeq(value, ",")), ",")
		}
		h.Set(strings.ToLower(name), value)
	}
	return h.Fields
}

func (r *Response) selectedBy(req *Head) bool { return slices.Equal(r.varied(r.req), r.varied(req)) }
func (r *Response) generation() string        { return r.req.Get("Generation") }
func (r *Response) variant(url string, req *Head) string {
	selected := fmt.Appendf(nil, "%q%q", r.generation(), r.varied(req))
	return fmt.Sprintf("%s\n~%.8x", url, sha256.Sum256(selected))
}

// lookup returns the stored response that req selects, or nil, and the key for one. Under the URL itself is
// one that says in Vary what selects, others are beside it. All bear its generation, which is new after an
// invalidation: those of the time before are out of reach.
func (c *Cache) lookup(url string, req *Head) (r *Response, key, generation string) {
	if r, key = c.load(fileName(url)), url; r != nil {
		generation = r.generation()
	}
	if r != nil && !r.selectedBy(req) {
		key = r.variant(url, req)
		r.Close()
		if r = c.load(fileName(key)); r != nil && !r.selectedBy(req) {
			r.Close()
			r = nil
		}
	}
	return r, key, generation
}

// load returns what is stored in a file, nil if that is damaged or not ours: its name has to follow from the
// URL in it, its size from Content-Length. Its time tells trim when it was last used.
func (c *Cache) load(name string) *Response {
	info, err := os.Lstat(c.dir + "/" + name)
	if err != nil || !info.Mode().IsRegular() { // a pipe would hold us up
		return nil
	}
	file, _ := os.Open(c.dir + "/" + name) // nil reads as an error
	r, in := &Response{Head: new(Head), req: new(Head), ReadCloser: file}, bufio.NewReader(file)
	err = cmp.Or(r.req.read(in, false), r.Head.read(in, true))
	r.size, _ = digits(r.Get("Content-Length"))
	r.off, _ = file.Seek(-int64(in.Buffered()), io.SeekCurrent)
	ours := strings.HasPrefix(name+"~", fileName(strings.TrimPrefix(r.req.Line[1], "http://"))+"~")
	if err != nil || !ours || r.off+r.size != info.Size() {
		file.Close()
		return nil
	}
	if t := now(); t.Sub(info.ModTime()) > time.Minute {
		os.Chtimes(file.Name(), t, t)
	}
	r.assess(c.ttl)
	r.Del("Age", "Content-Length")
	return r
}

// arguments returns those of the directives of some names in Cache-Control, "" for one that has none.
func (h *Head) arguments(names ...string) (all []string) {
	for _, directive := range h.list("Cache-Control") {
		if name, argument, _ := strings.Cut(directive, "="); isOneOf(name, names...) {
			all = append(all, strings.Trim(argument, `"`))
		}
	}
	return all
}

// is tells whether a directive is there without an argument, seconds what that is as a number: of several the
// first; a malformed one is 0, so stale (RFC 9111 §4.2.1).
func (h *Head) is(names ...string) bool { return slices.Contains(h.arguments(names...), "") }
func (h *Head) seconds(name string, otherwise int64) int64 {
	if all := h.arguments(name); len(all) > 0 {
		otherwise, _ = digits(all[0])
	}
	return min(otherwise, maxSeconds)
}

// httpDate reads a date in one of the three formats (RFC 9110 §5.6.7), strictly but for case and the day's
// name, as Unix seconds, 0 if it is none. A year of two digits is one from 1969 to 2068.
func httpDate(s string) int64 {
	s = strings.ToUpper(s[max(0, strings.IndexAny(s, ", ")):])
	for _, layout := range []string{dateFormat[3:], ", 02-Jan-06 15:04:05 GMT", " Jan _2 15:04:05 2006"} {
		if t, err := time.Parse(layout, s); err == nil && strings.EqualFold(t.Format(layout), s) {
			return t.Unix()
		}
	}
	return 0
}

// assess works out what an answer says about time (RFC 9111 §4.2). Its age counts from the earlier of Date
// and when it was 0 by Age. Where nothing says how long it is fresh, a tenth of its time since the last
// change, at most a week, is a fair guess.
func (r *Response) assess(ttl int64) {
	age, _ := digits(append(r.list("Age"), "")[0])
	date, expires := httpDate(r.Get("Date")), r.Get("Expires")
	r.born = min(date, httpDate(r.req.Get("Date"))-min(age, maxSeconds))
	r.strict = len(r.arguments("s-maxage")) > 0 || r.is("must-revalidate", "proxy-revalidate", "no-cache")
	if expires != "" {
		r.life = httpDate(expires) - date
	} else if slices.Contains(understood, r.Status) || r.is("public") {
		r.life = max(ttl, min((date-cmp.Or(httpDate(r.Get("Last-Modified")), date))/10, 7*24*3600))
	}
	if r.life = r.seconds("s-maxage", r.seconds("max-age", r.life)); r.is("no-cache") {
		r.life = 0
	}
}

// judge tells whether a stored response may answer as it is, with "", else why not, in the words of
// Cache-Status (RFC 9111 §4, RFC 9211 §2.2). behind says that it is to be refreshed behind that.
func (r *Response) judge(req *Head) (why string, behind bool) {
	age := now().Unix() - r.born
	switch ttl := r.life - age; {
	case req.is("no-cache"), req.Get("Cache-Control") == "" && req.has("Pragma", "no-cache"),
		age >= req.seconds("max-age", age+1), 0 < ttl && ttl < req.seconds("min-fresh", 0):
		return "request", false
	case ttl > 0, !r.strict && (req.is("max-stale") || -ttl < req.seconds("max-stale", 0)):
		return "", false
	case !r.strict && -ttl < r.seconds("stale-while-revalidate", 0):
		return "", true
	}
	return "stale", false
}

// standsIn tells whether a stale response may answer where the origin failed: altogether (status 0) unless
// that is forbidden, with an error if that is allowed (RFC 9111 §4.2.4, RFC 5861 §4).
func (r *Response) standsIn(req *Head, status int) bool {
	return r != nil && !r.strict && !req.is("no-cache") && !req.has("Pragma", "no-cache") &&
		(status == 0 && len(r.arguments("stale-if-error")) == 0 ||
			slices.Contains([]int{0, 500, 502, 503, 504}, status) && now().Unix()-r.born-r.life <
				max(r.seconds("stale-if-error", 0), req.seconds("stale-if-error", 0)))
}

// unchanged evaluates a client's condition (RFC 9110 §13.2.2): true if it has what we have.
func (r *Response) unchanged(req *Head) bool {
	tags, tag := req.list("If-None-Match"), strings.TrimPrefix(r.Get("ETag"), "W/")
	same := tag != "" && (slices.Contains(tags, tag) || slices.Contains(tags, "W/"+tag))
	changed := httpDate(r.Get("Last-Modified"))
	return same || slices.Contains(tags, "*") ||
		len(tags) == 0 && 0 < changed && changed <= httpDate(req.Get("If-Modified-Since"))
}

// span returns which n bytes of the body req wants, with status 206 or 416; else all, also where it wants
// several ranges (RFC 9110 §14.2).
func (r *Response) span(req *Head) (status int, off, n int64) {
	spec, ok := strings.CutPrefix(req.Get("Range"), "bytes=")
	from, to, dash := strings.Cut(spec, "-")
	a, isA := digits(from)
	b, isB := digits(cmp.Or(to, "9999999999999999999")) // which saturates
	if from == "" {
		a, b, isA = max(0, r.size-b), r.size, to != ""
	}
	since := cmp.Or(req.Get("If-Range"), r.Get("Last-Modified"))
	same := since == r.Get("Last-Modified") || since[0] == '"' && since == r.Get("ETag")
	if req.Line[0] != "GET" || !ok || !dash || !isA || !isB || b < a || r.size < 0 || !same {
		return r.Status, 0, r.size
	} else if a >= r.size {
		return 416, 0, 0
	}
	return 206, a, min(b, r.size-1) - a + 1
}

// update puts the fields of a 304 in the place of the stored ones, but for those that describe the body as it
// is stored (RFC 9111 §3.2).
func (r *Response) update(res *Head) {
	res.Del("Content-Length", "Content-Encoding", "Content-Range")
	for _, f := range res.Fields {
		r.Del(f.Name)
	}
	r.Fields = append(r.Fields, res.Fields...)
}

// A download is a response on its way into a file. Who asked for it, and who asks while it is under way, read
// the file as it grows, each at its own pace: none depends on another.
type download struct {
	Response               // what is answered from it
	key      string        // under which it is found
	ready    chan struct{} // closed when it is known whether there is anything to answer from:
	shared   bool          // there is
	source   *Response     // where the body comes from
	file     *os.File
	taken    int64     // bytes that are in the file
	kept     []byte    // those that have arrived after them
	more     sync.Cond // there is more of it, or it has ended:
	err      error     // io.EOF, or what broke it
	users    int       // who waits or reads
}

// join takes part in the download under way for a key. If there is none it begins one, which the caller has
// to lead: to ask the origin, and then to call store or drop.
func (c *Cache) join(key string) (d *download, leads bool) {
	defer c.lock()()
	if d = c.under[key]; d == nil {
		d, leads = &download{key: key, ready: make(chan struct{})}, true
		d.more.L, c.under[key] = &c.mu, d
	}
	d.users++
	return d, leads
}

// forget takes a download away if it still is where it is found: only then it is kept in the end. drop says
// there is nothing to answer from; invalidate forgets what is stored for a URL, and what is about to be.
func (c *Cache) forget(d *download) (found bool) {
	if found = c.under[d.key] == d; found {
		delete(c.under, d.key)
	}
	return found
}
func (c *Cache) drop(d *download)    { defer c.lock()(); c.forget(d); close(d.ready) }
func (c *Cache) invalidate(u string) { defer c.lock()(); delete(c.under, u); os.Remove(c.path(u)) }

// answer is what answers somebody who takes part, once it is known whether there is anything.
func (d *download) answer() *Response {
	<-d.ready // the answer may be in the making until then
	r := d.Response
	r.ReadCloser = &tail{d, d.off}
	return &r
}

// store keeps r, the answer to req, if a shared cache may and has use for it (RFC 9111 §3), and returns what
// answers in its place, with the fields that are for this client alone; else r.
func (c *Cache) store(d *download, url string, req *Head, r *Response, at time.Time, gen string) *Response {
	d.Response, d.source = Response{Head: r.Clone(), size: r.size}, r
	d.req = &Head{Line: [3]string{"GET", "http://" + url, "HTTP/1.1"}}
	d.req.Fields = append([]Field{{"Date", at.UTC().Format(dateFormat)}}, r.varied(req)...)
	d.assess(c.ttl)
	explicit := len(r.arguments("s-maxage", "max-age")) > 0 || r.Get("Expires") != ""
	shared, known := len(r.arguments("s-maxage")) > 0, slices.Contains(understood, r.Status)
	never := len(r.arguments("no-store", "must-understand"))
	ok := r.Status != 206 && r.Status != 304 && r.size <= c.limit && !r.has("Vary", "*") &&
		!r.is("private") && (never == 0 || known && r.is("must-understand")) &&
		(req.Get("Authorization") == "" || shared || r.is("public", "must-revalidate")) &&
		(explicit || r.Get("Set-Cookie") == "" && (known || r.is("public"))) && !req.is("no-store") &&
		(d.life > 0 || d.seconds("stale-while-revalidate", 0) > 0 ||
			r.Get("ETag")+r.Get("Last-Modified") != "")
	if !ok {
		return r
	}
	if len(r.list("Vary")) > 0 {
		d.req.Set("Generation", cmp.Or(gen, rand.Text()))
	}
	os.MkdirAll(c.dir, 0o700)
	root, err := os.OpenRoot(c.dir) // Windows can rename its files while they are open
	if err == nil {
		d.file, err = root.OpenFile(temporary+rand.Text(), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		root.Close()
	}
	if err != nil {
		log.Printf("not stored: %v", err)
		return r
	}
	private := strings.ReplaceAll(strings.Join(r.arguments("private", "no-cache"), ","), " ", "")
	d.Del(append(strings.Split(private, ","), "Set-Cookie", "Set-Cookie2")...)
	head := d.appendTo(d.req.appendTo(nil), Field{"Content-Length", fmt.Sprintf("%20d", r.size)})
	d.off = int64(len(head))
	d.Write(head)
	d.Del("Age")
	d.shared = true
	close(d.ready)
	go d.run(c)
	answer := d.answer()
	answer.Head = r.Head
	answer.Del("Age")
	return answer
}

func (d *download) run(c *Cache) {
	_, err := io.Copy(io.Discard, io.TeeReader(d.source, d))
	d.source.Close()
	if d.size < 0 {
		d.file.WriteAt(fmt.Appendf(nil, "%20d", d.taken-d.off), d.off-24)
	}
	unlock := c.lock()
	found := c.under[d.key] == d
	unlock() // it has to be in its place before it is forgotten, and nobody is to wait for that
	if err != nil || !found || len(d.kept) > 0 || os.Rename(d.file.Name(), c.path(d.key)) != nil {
		os.Remove(d.file.Name())
	}
	defer c.lock()()
	if !c.forget(d) && found && err == nil { // it has been invalidated meanwhile
		os.Remove(c.path(d.key))
	}
	if d.err = cmp.Or(err, io.EOF); d.users == 0 {
		d.file.Close()
	}
	d.more.Broadcast()
	if c.size += d.taken; c.size > c.limit {
		go c.trim()
	}
}

// Write takes what arrives. To fail would cut all clients: up to 64 MiB that the file does not take are in
// memory, and nothing is stored.
func (d *download) Write(p []byte) (n int, err error) {
	if len(d.kept) == 0 {
		n, _ = d.file.Write(p)
	}
	defer cache.lock()()
	d.taken, d.kept = d.taken+int64(n), append(d.kept, p[n:]...)
	if d.more.Broadcast(); len(d.kept) > 64<<20 {
		return 0, io.ErrShortWrite
	}
	return len(p), nil
}

// A tail reads a download's file from at on, and waits for what has not arrived.
type tail struct {
	*download
	at int64
}

func (t *tail) Seek(offset int64, _ int) (int64, error) { t.at = offset; return offset, nil }
func (t *tail) Read(p []byte) (n int, err error) {
	cache.mu.Lock()
	for t.at >= t.taken+int64(len(t.kept)) && t.err == nil {
		t.more.Wait()
	}
	beyond, kept, err := t.at-t.taken, t.kept, t.err
	cache.mu.Unlock()
	if beyond < 0 {
		n, err = t.file.ReadAt(p[:min(int64(len(p)), -beyond)], t.at)
	} else if beyond < int64(len(kept)) {
		n, err = copy(p, kept[beyond:]), nil
	}
	t.at += int64(n)
	return n, err
}

// Close ends somebody's part. What interests nobody goes on only if at most 1 MiB of it is to come.
func (t *tail) Close() error {
	defer cache.lock()()
	if t.users--; t.users > 0 || !t.shared {
		return nil
	} else if t.err != nil {
		return t.file.Close()
	} else if b, ok := t.source.ReadCloser.(*body); ok && (t.size < 0 || t.off+t.size-t.taken > 1<<20) {
		cache.forget(t.download)
		b.c.Conn.Close()
	}
	return nil
}

// due counts a GET that has to be fetched, and tells whether its answer is to be stored.
func (c *Cache) due(url string) bool {
	defer c.lock()()
	if len(c.seen) > 1<<16 {
		clear(c.seen) // to count anew is cheaper than to find out which are old
	}
	times := append(c.seen[url], now())
	c.seen[url] = times[max(0, len(times)-c.uses):]
	return len(times) >= c.uses && now().Sub(c.seen[url][0]) <= 10*time.Minute
}

// trim counts the files, and removes what broken downloads have left an hour ago, and the least recently used
// if they are too much. Only names that the cache itself makes count.
func (c *Cache) trim() {
	files, size := []os.FileInfo(nil), int64(0)
	entries, _ := os.ReadDir(c.dir)
	for _, entry := range entries {
		info, err := entry.Info()
		if name := entry.Name(); err == nil && info.Mode().IsRegular() && strings.Contains(name, "_") {
			files, size = append(files, info), size+info.Size()
		} else if err == nil && strings.HasPrefix(name, temporary) && now().Sub(info.ModTime()) > time.Hour {
			os.Remove(c.dir + "/" + name)
		}
	}
	slices.SortFunc(files, func(a, b os.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	for ; size > c.limit && len(files) > 0; files = files[1:] {
		r := c.load(files[0].Name()) // nil if it is not ours
		if r != nil && r.Close() == nil && os.Remove(c.dir+"/"+files[0].Name()) == nil {
			size -= files[0].Size()
		}
	}
	defer c.lock()()
	c.size = size
}
