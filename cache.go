package main

// This file is the store and the rules of caching (RFC 9111). A stored response is one file, a transcript of
// the request and the answer, under the URL's name: the file system is the index. It knows no sockets.

import (
	"bufio"
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	worth      = 1 << 20          // bytes a download may lack to be finished when nobody reads it any more
	maxKept    = 64 << 20         // bytes of one that are kept in memory when the file does not take them
	strayAge   = time.Hour        // after which what a broken download has left is removed
	useAge     = 10 * time.Minute // within which -uses counts
	maxGuess   = 7 * 24 * 3600    // seconds of freshness at most where they are a guess
	temporary  = "+download-"     // begins the names of files that are not whole
	dateFormat = "Mon, 02 Jan 2006 15:04:05 GMT"
)

var now = time.Now // tests move it

// A Response is a head and a body: a text, a file, one that grows, or what comes from an origin. All but the
// last are also io.Seekers.
type Response struct {
	*Head
	io.ReadCloser
	off, size int64 // where the body begins, its bytes, -1 while unknown

	// Of a stored one:
	req        *Head // its URL, when it was asked for, and what Vary selects by
	born, life int64 // Unix seconds when its age was 0, seconds it is fresh
	strict     bool  // it must not be used stale
}

// A Cache is a directory of responses.
type Cache struct {
	dir        string
	limit, ttl int64                // bytes of all files, seconds of freshness where a response says nothing
	uses       int                  // GETs within useAge from which on responses are stored
	mu         sync.Mutex           // guards what follows
	size       int64                // of all files
	under      map[string]*download // under way, by key
	seen       map[string][]time.Time
}

// fileName returns the name of the file for a key: a URL without its scheme, and for a variant a line feed and a hash of what
// selects it. "/" becomes "_", as in the lab. Upper case, "_" and all but a few bytes are escaped: no two keys
// share a file on any system, no name is hidden, ends in a dot, or begins like a device.
func fileName(key string) string {
	url, variant, varies := strings.Cut(key, "\n")
	var name []byte
	for i, b := range []byte(url) {
		switch {
		case b == '/':
			name = append(name, '_')
		case 'a' <= b && b <= 'z' || '0' <= b && b <= '9' || b == '-' || b == '.' && 0 < i && i < len(url)-1:
			name = append(name, b)
		default:
			name = fmt.Appendf(name, "%%%02x", b)
		}
	}
	stem, _, _ := strings.Cut(string(name), ".")
	if isOneOf(strings.TrimRight(stem, "0123456789"), "con", "prn", "aux", "nul", "com", "lpt") {
		name = fmt.Appendf(nil, "%%%02x%s", name[0], name[1:])
	}
	if len(name) > 160 {
		name = fmt.Appendf(nil, "%s+%.16x", name[:120], sha256.Sum256([]byte(url)))
	}
	if varies {
		name = fmt.Appendf(name, "+%s", variant)
	}
	return string(name)
}

func (c *Cache) path(key string) string { return filepath.Join(c.dir, fileName(key)) }

// selectors returns the fields of req that the Vary of res names (RFC 9111 §4.1), in one spelling for what
// means the same: lines joined, no space around commas; languages and codings in any case and order.
func selectors(res, req *Head) (fields []Field) {
	for _, name := range res.list("Vary") {
		values := req.list(name)
		if isOneOf(name, "Accept-Language", "Accept-Encoding") {
			values = strings.Split(strings.ReplaceAll(strings.ToLower(strings.Join(values, ",")), " ", ""), ",")
			slices.Sort(values)
		}
		if value := strings.Join(values, ","); value != "" {
			fields = append(fields, Field{strings.ToLower(name), value})
		}
	}
	return fields
}

// lookup returns the stored response that req selects, nil if there is none, and the key for one. Under the
// URL itself is a response that says in Vary what selects; others are beside it. All bear its generation,
// which is new after an invalidation and puts those of the time before out of reach.
func (c *Cache) lookup(url string, req *Head) (r *Response, key, generation string) {
	r = c.open(url)
	if r == nil || r.selectedBy(req) {
		return r, url, r.generation()
	}
	generation, key = r.generation(), r.variant(url, req)
	r.Close()
	if r = c.open(key); r != nil && !r.selectedBy(req) {
		r.Close()
		r = nil
	}
	return r, key, generation
}

func (r *Response) selectedBy(req *Head) bool {
	return slices.Equal(selectors(r.Head, r.req), selectors(r.Head, req))
}

func (r *Response) generation() string {
	if r != nil && r.req.Get("Generation") != "" {
		return r.req.Get("Generation")
	}
	return rand.Text()
}

func (r *Response) variant(url string, req *Head) string {
	sum := sha256.Sum256(fmt.Append(nil, r.generation(), selectors(r.Head, req)))
	return fmt.Sprintf("%s\n%.8x", url, sum)
}

// open returns what is stored under a key. Whatever is wrong with its file, it is as if there were none.
func (c *Cache) open(key string) *Response {
	url, _, _ := strings.Cut(key, "\n")
	r := c.load(c.path(key))
	if r != nil && r.req.Line[1] != "http://"+url {
		r.Close()
		return nil
	}
	return r
}

func (c *Cache) load(path string) *Response {
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() {
		return nil
	}
	file, err := os.Open(path)
	if err != nil {
		return nil
	}
	r, in := &Response{Head: new(Head), req: new(Head), ReadCloser: file}, bufio.NewReader(file)
	err = errors.Join(r.req.read(in, false), r.Head.read(in, true))
	at, _ := file.Seek(0, io.SeekCurrent)
	size, ok := digits(r.Get("Content-Length"))
	r.size, r.off = size, at-int64(in.Buffered())
	if err != nil || !ok || r.off+size != info.Size() {
		file.Close()
		return nil
	}
	if t := now(); t.Sub(info.ModTime()) > time.Minute {
		os.Chtimes(path, t, t) // when it was last used, for trim
	}
	r.assess(c.ttl)
	return r
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

// seconds returns a directive's argument as a number. A malformed one is 0, so stale (RFC 9111 §4.2.1); of
// several the first counts.
func (h *Head) seconds(directive string) (n int64, ok bool) {
	argument, ok := h.directive(directive)
	n, _ = digits(argument)
	return n, ok
}

// is tells whether a directive is there without an argument.
func (h *Head) is(directive string) bool { return h.has("Cache-Control", directive) }

// httpDate reads a date in one of the three formats (RFC 9110 §5.6.7), strictly but for case and the day's
// name, as Unix seconds, 0 if it is none. A year of two digits is at most 50 years ahead.
func httpDate(s string) int64 {
	for _, layout := range []string{dateFormat, "Monday, 02-Jan-06 15:04:05 GMT", "Mon Jan _2 15:04:05 2006"} {
		t, err := time.Parse(layout, strings.ToUpper(s))
		_, got, _ := strings.Cut(s, " ")
		_, want, _ := strings.Cut(t.Format(layout), " ")
		if err == nil && strings.EqualFold(got, want) {
			if t.Before(now().AddDate(-50, 0, 0)) && strings.Contains(layout, "-06") {
				t = t.AddDate(100, 0, 0)
			}
			return t.Unix()
		}
	}
	return 0
}

// heuristic tells whether the status alone allows to keep an answer (RFC 9110 §15.1); only for these do we
// understand caching, in the sense of RFC 9111 §5.2.2.3.
func (h *Head) heuristic() bool {
	return slices.Contains([]int{200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501}, h.Status)
}

// lifetime returns how many seconds an answer is fresh, and whether it says so itself (RFC 9111 §4.2.1); if
// not, a tenth of its time since the last change is a fair guess (§4.2.2).
func (h *Head) lifetime(ttl int64) (seconds int64, explicit bool) {
	date, changed := httpDate(h.Get("Date")), httpDate(h.Get("Last-Modified"))
	if n, ok := h.seconds("s-maxage"); ok {
		return n, true
	} else if n, ok := h.seconds("max-age"); ok {
		return n, true
	} else if expires := h.Get("Expires"); expires != "" {
		return httpDate(expires) - date, true
	} else if !h.heuristic() && !h.is("public") {
		return 0, false
	} else if changed > 0 {
		return max(ttl, min((date-changed)/10, maxGuess)), false
	}
	return ttl, false
}

// assess works out what a stored answer says about time (RFC 9111 §4.2). Its age counts from the earlier of
// when the origin says it made it, and when that was by Age.
func (r *Response) assess(ttl int64) {
	ages, age := r.list("Age"), int64(0)
	if len(ages) > 0 {
		age, _ = digits(ages[0])
	}
	r.Del("Age", "Content-Length")
	r.born = min(httpDate(r.Get("Date")), httpDate(r.req.Get("Date"))-age)
	r.life, _ = r.lifetime(ttl)
	_, shared := r.directive("s-maxage")
	if r.strict = shared || r.is("must-revalidate") || r.is("proxy-revalidate"); r.is("no-cache") {
		r.life, r.strict = 0, true
	}
}

// judge tells whether a stored response may answer as it is, with "", else why not, in the words of
// Cache-Status (RFC 9111 §4, RFC 9211 §2.2). behind says that it is to be refreshed behind that.
func (r *Response) judge(req *Head) (why string, behind bool) {
	age := now().Unix() - r.born
	limit, limited := req.seconds("max-age")
	fresh, _ := req.seconds("min-fresh")
	stale, any := req.seconds("max-stale")
	grace, _ := r.seconds("stale-while-revalidate")
	switch ttl := r.life - age; {
	case req.is("no-cache"), req.Get("Cache-Control") == "" && req.has("Pragma", "no-cache"),
		limited && (age > limit || limit == 0), 0 < ttl && ttl < fresh:
		return "request", false
	case ttl > 0, !r.strict && any && (-ttl <= stale || req.is("max-stale")):
		return "", false
	case !r.strict && -ttl < grace:
		return "", true
	}
	return "stale", false
}

// standsIn tells whether a stale response may answer where the origin failed: altogether (status 0) unless
// that is forbidden, with an error if that is allowed (RFC 9111 §4.2.4, RFC 5861 §4).
func (r *Response) standsIn(req *Head, status int) bool {
	if r == nil || r.strict || req.is("no-cache") || req.has("Pragma", "no-cache") {
		return false
	}
	spare, limited := r.seconds("stale-if-error")
	asked, _ := req.seconds("stale-if-error")
	within := now().Unix()-r.born-r.life < max(spare, asked)
	return status == 0 && !limited || within && slices.Contains([]int{0, 500, 502, 503, 504}, status)
}

// unchanged evaluates a client's condition (RFC 9110 §13.2.2): true if it has what we have.
func (r *Response) unchanged(req *Head) bool {
	if tags := req.list("If-None-Match"); len(tags) > 0 {
		return slices.ContainsFunc(tags, func(tag string) bool {
			return tag == "*" || r.Get("ETag") != "" && strings.TrimPrefix(tag, "W/") == strings.TrimPrefix(r.Get("ETag"), "W/")
		})
	}
	changed := httpDate(r.Get("Last-Modified"))
	return changed > 0 && changed <= httpDate(req.Get("If-Modified-Since"))
}

// span returns which n bytes of the body req wants, with status 206 or 416; else all, also where it wants
// several ranges (RFC 9110 §14.2).
func (r *Response) span(req *Head) (status int, off, n int64) {
	spec, ok := strings.CutPrefix(req.Get("Range"), "bytes=")
	from, to, _ := strings.Cut(spec, "-")
	a, isFrom := digits(from)
	b, isTo := digits(to)
	if from == "" && isTo {
		a, b, isFrom = max(0, r.size-b), r.size-1, true
	} else if to == "" && strings.HasSuffix(spec, "-") || b >= r.size {
		b, isTo = r.size-1, true
	}
	since := req.Get("If-Range")
	same := since == "" || since[0] == '"' && since == r.Get("ETag") || since == r.Get("Last-Modified")
	switch {
	case !ok || !isFrom || !isTo || r.size < 0 || r.Status != 200 || !same || b < a && a < r.size:
		return r.Status, 0, r.size
	case a >= r.size:
		return 416, 0, 0
	}
	return 206, a, b - a + 1
}

// storable tells whether a shared cache may keep the answer r to req, and has use for it (RFC 9111 §3).
func (c *Cache) storable(req *Head, r *Response) bool {
	life, explicit := r.lifetime(c.ttl)
	_, shared := r.directive("s-maxage")
	_, grace := r.directive("stale-while-revalidate")
	switch {
	case req.is("no-store"), r.is("private"), r.has("Vary", "*"), r.Status == 206, r.Status == 304, r.size > c.limit,
		r.is("no-store") && !r.is("must-understand"), r.is("must-understand") && !r.heuristic(),
		!explicit && (r.Get("Set-Cookie") != "" || !r.heuristic() && !r.is("public")),
		req.Get("Authorization") != "" && !shared && !r.is("public") && !r.is("must-revalidate"):
		return false
	}
	return life > 0 || grace || r.Get("ETag") != "" || r.Get("Last-Modified") != ""
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

// A download is a body on its way into a file. Who asked for it, and who asks while it is under way, read
// the file as it grows, each at its own pace: none depends on another.
type download struct {
	Response               // what is answered from it
	key      string        // under which it is found
	ready    chan struct{} // closed when it is known whether there is anything to answer from:
	shared   bool          // there is
	source   *Response     // where the body comes from
	file     *os.File

	sync.Mutex           // guards what follows; taken after that of the cache
	more       sync.Cond // some of it has changed
	got, taken int64     // bytes that have arrived, and those of them that are in the file
	kept       []byte    // the others
	users      int       // who waits or reads
	void, done bool      // it is not to be kept; it has ended,
	err        error     // so
}

// join takes part in the download under way for a key. If there is none it begins one, which the caller has
// to lead: to ask the origin, and then to call store or drop.
func (c *Cache) join(key string) (d *download, leads bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d = c.under[key]; d == nil {
		d, leads = &download{key: key, ready: make(chan struct{})}, true
		d.more.L, c.under[key] = d, d
	}
	d.Lock()
	d.users++
	d.Unlock()
	return d, leads
}

// drop says that there is nothing to answer from: who waits asks for himself.
func (c *Cache) drop(d *download) { c.forget(d); close(d.ready) }

func (c *Cache) forget(d *download) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.under[d.key] == d {
		delete(c.under, d.key)
	}
}

// answer is what answers somebody who takes part.
func (d *download) answer() *Response { r := d.Response; r.ReadCloser = &tail{download: d}; return &r }

// store keeps r, the answer to req, from now on if it may, and returns what answers in its place, with the
// fields that are for this client alone; else r.
func (c *Cache) store(d *download, url string, req *Head, r *Response, asked time.Time,
	generation string) *Response {
	if !c.storable(req, r) {
		return r
	}
	d.Response, d.source = Response{Head: &Head{r.Line, r.Status, slices.Clone(r.Fields)}, size: r.size}, r
	d.Del("Set-Cookie", "Set-Cookie2")
	for _, directive := range []string{"private", "no-cache"} {
		names, _ := r.directive(directive)
		d.Del(strings.FieldsFunc(names, func(c rune) bool { return c == ',' || c == ' ' })...)
	}
	d.req = &Head{[3]string{"GET", "http://" + url, "HTTP/1.1"}, 0, append(selectors(r.Head, req),
		Field{"Date", asked.UTC().Format(dateFormat)})}
	if len(r.list("Vary")) > 0 {
		d.req.Set("Generation", generation)
	}
	b := d.appendTo(d.req.appendTo(nil), Field{"Content-Length", fmt.Sprintf("%20d", r.size)})
	d.off = int64(len(b))
	os.MkdirAll(c.dir, 0o700)
	root, err := os.OpenRoot(c.dir) // Windows can rename its files while they are open
	if err == nil {
		d.file, err = root.OpenFile(temporary+rand.Text(), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		root.Close()
	}
	if err == nil {
		if _, err = d.file.Write(b); err != nil {
			d.file.Close()
			os.Remove(d.file.Name())
		}
	}
	if err != nil {
		log.Printf("not stored: %v", err)
		return r
	}
	d.assess(c.ttl)
	own := slices.DeleteFunc(r.Fields, func(f Field) bool { return slices.Contains(d.Fields, f) || isOneOf(f.Name, "Age") })
	d.shared = true
	close(d.ready)
	go d.run(c, c.path(d.key))
	answer := d.answer()
	answer.Head = &Head{d.Line, d.Status, append(slices.Clone(d.Fields), own...)}
	return answer
}

func (d *download) run(c *Cache, path string) {
	if file, ok := d.source.ReadCloser.(io.Seeker); ok {
		file.Seek(d.source.off, io.SeekStart)
	}
	_, err := io.Copy(io.Discard, io.TeeReader(d.source, d))
	d.source.Close()
	d.Lock()
	if d.size < 0 {
		d.file.WriteAt(fmt.Appendf(nil, "%20d", d.got), d.off-24)
	}
	if d.err = err; err != nil || d.void || d.taken < d.got || os.Rename(d.file.Name(), path) != nil {
		os.Remove(d.file.Name())
	}
	if d.done = true; d.users == 0 {
		d.file.Close()
	}
	d.more.Broadcast()
	d.Unlock()
	c.forget(d)
	c.mu.Lock()
	c.size += d.off + d.got
	full := c.size > c.limit
	c.mu.Unlock()
	if full {
		c.trim()
	}
}

// Write takes what arrives. It never fails while that can be helped, as this would end the io.TeeReader and
// cut all clients: what the file does not take is kept in memory, and the response not stored.
func (d *download) Write(p []byte) (n int, err error) {
	if d.taken == d.got {
		n, err = d.file.Write(p)
	}
	d.Lock()
	defer d.Unlock()
	if d.got += int64(len(p)); err == nil && n == len(p) {
		d.taken = d.got
	} else if d.kept = append(d.kept, p...); len(d.kept) > maxKept {
		return 0, cmp.Or(err, io.ErrShortWrite)
	}
	d.more.Broadcast()
	return len(p), nil
}

// A tail reads a download from at on, and waits for what has not arrived.
type tail struct {
	*download
	at int64
}

func (t *tail) Read(p []byte) (n int, err error) {
	t.Lock()
	defer t.Unlock()
	for t.at >= t.got && !t.done {
		t.more.Wait()
	}
	if t.at >= t.got {
		return 0, cmp.Or(noEOF(t.err), io.EOF)
	} else if t.at < t.taken {
		n, err = t.file.ReadAt(p[:min(int64(len(p)), t.taken-t.at)], t.off+t.at)
	} else {
		n = copy(p, t.kept[t.at-t.taken:])
	}
	t.at += int64(n)
	return n, err
}

func (t *tail) Seek(offset int64, _ int) (int64, error) { t.at = offset - t.off; return offset, nil }

// Close ends somebody's part. A download that interests nobody goes on only if it is nearly whole.
func (t *tail) Close() error {
	cache.mu.Lock()
	defer cache.mu.Unlock()
	t.Lock()
	defer t.Unlock()
	if t.users--; t.users > 0 || !t.shared {
		return nil
	}
	b, fromOrigin := t.source.ReadCloser.(*body)
	if t.done {
		t.file.Close()
	} else if fromOrigin && (t.size < 0 || t.size-t.got > worth) {
		if t.void = true; cache.under[t.key] == t.download {
			delete(cache.under, t.key)
		}
		b.c.Conn.Close()
	}
	return nil
}

// invalidate forgets what is stored for a URL, and what is about to be.
func (c *Cache) invalidate(url string) {
	c.mu.Lock()
	if d := c.under[url]; d != nil {
		d.Lock()
		d.void = true
		d.Unlock()
		delete(c.under, url)
	}
	c.mu.Unlock()
	os.Remove(c.path(url))
}

// due counts a GET that has to be fetched, and tells whether its answer is to be stored.
func (c *Cache) due(url string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.seen) > 1<<16 {
		clear(c.seen) // to count anew is cheaper than to find out which are old
	}
	times := append(c.seen[url], now())
	for now().Sub(times[0]) > useAge || len(times) > c.uses {
		times = times[1:]
	}
	c.seen[url] = times
	return len(times) == c.uses
}

// trim counts the files, and removes what broken downloads have left, and if they are too much those that
// were least recently used. Only names that the cache itself makes count.
func (c *Cache) trim() {
	entries, _ := os.ReadDir(c.dir)
	var files []fs.FileInfo
	size := int64(0)
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil || !info.Mode().IsRegular() {
			continue
		}
		if strings.HasPrefix(info.Name(), temporary) && now().Sub(info.ModTime()) > strayAge {
			os.Remove(filepath.Join(c.dir, info.Name()))
		} else if strings.Contains(info.Name(), "_") {
			files = append(files, info)
			size += info.Size()
		}
	}
	slices.SortFunc(files, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	for ; size > c.limit && len(files) > 0; files = files[1:] {
		if path := filepath.Join(c.dir, files[0].Name()); c.made(path) && os.Remove(path) == nil {
			size -= files[0].Size()
		}
	}
	c.mu.Lock()
	c.size = size
	c.mu.Unlock()
}

// made tells whether a file was made by the cache: its name follows from the URL in it.
func (c *Cache) made(path string) bool {
	file, err := os.Open(path)
	if err != nil {
		return false
	}
	defer file.Close()
	line, _ := bufio.NewReader(file).ReadString('\n')
	url, _, _ := strings.Cut(strings.TrimPrefix(line, "GET http://"), " ")
	name := filepath.Base(path)
	return name == fileName(url) || strings.HasPrefix(name, fileName(url)+"+")
}
