package main

// The store and the rules of caching (RFC 9111). What is stored is one file, a transcript of the request
// and the answer, under the URL's name: the file system is the index. Nothing here asks an origin.
import (
	"bufio"
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"log"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	temporary  = "+download-"                              // begins the names of files that are not whole
	plain      = "abcdefghijklmnopqrstuvwxyz0123456789-./" // what stands for itself in the name of a file
	dateFormat = "Mon, 02 Jan 2006 15:04:05 GMT"
	maxSeconds = 1 << 31         // of an age or a lifetime (RFC 9111 §1.2.2)
	maxObject  = 1 << 20         // bytes of a body that memory may answer with: a file costs a hit 20 µs
	maxMemory  = 16 << 20        // bytes of all these; twice that where slow clients still get forgotten ones
	joinWait   = 5 * time.Second // for an answer that another has asked for, in vain perhaps
	maxBehind  = 256 << 10       // bytes kept for the slowest reader where the file does not take them
)

var (
	now     = time.Now // tests move it
	extents = regexp.MustCompile(`^bytes (\d+)-(\d+)/(\d+)$`)
	span    = regexp.MustCompile(`^bytes=(\d*)-(\d*)$`)
	// What may be stored though it does not say how long it is fresh (RFC 9110 §15.1).
	heuristic = []int{200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501}
)

// An Entry is an answer: a head, and a body in memory, in a file, or on its way from source. What goes
// into a file is read as it grows by all who ask for it, each at its own pace: none depends on another.
type Entry struct {
	*Head
	req        *Head         // of a stored one: its URL, when it was asked for, and what Vary selects by
	off, size  int64         // where in the file the body begins, its bytes, -1 while unknown
	born, life int64         // Unix seconds when its age was 0, seconds it is fresh
	strict     bool          // it must not be used stale
	first, all int64         // of a part (206): where it begins in the whole, and the size of that
	source     io.ReadCloser // where the body comes from, nil for what was here before
	key        string        // under which others find it
	shared     bool          // once it is known that there is something for them
	file       *os.File
	taken      int64     // bytes that are in the file,
	memory     []byte    // and those after them
	more       sync.Cond // there are more, or no more come, or others know what to expect:
	err        error     // io.EOF, or what broke it
	users      []*Answer // those who read it, if it has come on its way
	broken     bool      // the file does not take more
	used, read time.Time // when its file was last used, and read into memory
	late       time.Time // when those who wait for its head have waited for long enough
}

// An Answer is the use of an entry by one who asks, with a head of his own if he has to have one. It reads
// the body from at on, and waits for what has not arrived.
type Answer struct {
	*Entry
	own *Head
	at  atomic.Int64 // offset in the body, at which Write looks, too
}

// A Cache is a directory of entries.
type Cache struct {
	dir           string
	limit, ttl    int64                  // bytes at most, seconds an answer is fresh that does not say
	uses          int                    // GETs within ten minutes from which on answers are stored
	told          atomic.Int64           // Unix seconds when the operator has been told of trouble
	inMemory      atomic.Int64           // bytes of entries in memory, of forgotten ones in use as well
	sync.Mutex                           // guards what follows, and what changes in entries
	size, files   int64                  // bytes and number of files; trim counts anew
	changes       int64                  // of what is stored, so far
	under, memory map[string]*Entry      // on their way, and held in memory
	seen          map[string][]time.Time // the latest GETs, if uses are counted
}

func (c *Cache) path(key string) string { return c.dir + "/" + fileName(key) }

// fileName returns the name of the file for a key: a URL without its scheme, and after a line feed what a
// variant adds. "/" becomes "_", as in the lab; upper case, "_" and most else is escaped: no two keys
// share a file on any system, and no name is hidden, ends in a dot, or is a device's on Windows.
func fileName(key string) string {
	url, variant, _ := strings.Cut(key, "\n")
	stem, _, _ := strings.Cut(url, ".")
	device := oneOf(strings.TrimRight(stem, "0123456789"), "con", "prn", "aux", "nul", "com", "lpt")
	name := make([]byte, 0, len(url)+20)
	for i, b := range []byte(url) {
		switch {
		case device && i == 0, b == '.' && (i == 0 || i == len(url)-1), strings.IndexByte(plain, b) < 0:
			name = fmt.Appendf(name, "%%%02x", b)
		case b == '/':
			name = append(name, '_')
		default:
			name = append(name, b)
		}
	}
	if len(name) > 160 {
		name = fmt.Appendf(name[:120], "+%.16x", sha256.Sum256([]byte(url)))
	}
	return string(name) + variant
}

// varied returns the fields of req that Vary names (RFC 9111 §4.1), in one spelling for what means the
// same: lines joined, no space around commas; languages and codings in any case and order.
func (e *Entry) varied(req *Head) []Field {
	var h Head
	for _, name := range e.list("Vary") {
		if h.Get(name) != "" {
			continue // to join 60 KiB once for each time that it is named took seconds
		}
		elements := req.list(name)
		if len(elements) > 0 && oneOf(name, "Accept-Language", "Accept-Encoding") {
			all := strings.ToLower(strings.ReplaceAll(strings.Join(elements, ","), " ", ""))
			elements = slices.Sorted(strings.SplitSeq(all, ","))
		}
		value := cmp.Or(strings.Join(elements, ","), `""`) // there is one, and it is empty
		h.Set(strings.ToLower(name), choose(len(elements) > 0, value, ""))
	}
	return h.Fields
}
func (e *Entry) holds(req *Head) bool      { status, _, _ := e.part(req); return status != 0 }
func (e *Entry) selectedBy(req *Head) bool { return slices.Equal(e.varied(e.req), e.varied(req)) }

// lookup returns the entry that req selects, or nil, and the key for one. Under the URL itself is one
// whose Vary tells what selects, others are beside it, by a hash. A part of that is new with each first
// one: after an invalidation the variants of before are out of reach.
func (c *Cache) lookup(url string, req *Head) (e *Answer, key string, changes int64) {
	key = url
	if e, changes = c.find(url); e != nil && !e.selectedBy(req) {
		selected := fmt.Appendf(nil, "%q%q", e.req.Get("Generation"), e.varied(req))
		key = fmt.Sprintf("%s\n~%.8x", url, sha256.Sum256(selected))
		e.Close()
		e, _ = c.find(key)
	}
	if e != nil && (key != url && !e.selectedBy(req) || e.Status == 206 && !e.holds(req)) {
		e.Close()
		e = nil
	}
	return e, key, changes
}

// find returns what is under a key: on its way, in memory, or in the file; and the changes up to then.
// Memory is good for a second, so what is removed, or replaced by another process, is soon forgotten too.
func (c *Cache) find(key string) (a *Answer, changes int64) {
	unlock := lock(c)
	e, changes := c.under[key], c.changes
	if e != nil && e.shared {
		a = &Answer{Entry: e}
		e.users = append(e.users, a)
	} else if e = c.memory[key]; e != nil && now().Sub(e.read) <= time.Second {
		a = &Answer{Entry: e}
	}
	if unlock(); a != nil {
		return a, changes
	} else if e = c.open(fileName(key)); e == nil {
		return nil, changes
	}
	if t := now(); t.Sub(e.used) > time.Minute { // which trim goes by
		os.Chtimes(e.file.Name(), t, t)
	}
	if e.size > maxObject || c.inMemory.Load() > 2*maxMemory { // e.g., slow clients are sent so many
		return &Answer{Entry: e}, changes
	}
	memory, weight := make([]byte, e.size), e.taken+1<<10
	_, err := e.file.ReadAt(memory, e.off)
	e.file.Close()
	runtime.AddCleanup(e, func(weight int64) { c.inMemory.Add(-weight) }, weight) // when nobody uses it
	defer lock(c)()
	if c.inMemory.Add(weight) > maxMemory { // to read them again is cheap
		clear(c.memory)
	}
	if e.file, e.taken, e.memory, e.read = nil, e.off, memory, now(); changes == c.changes && err == nil {
		c.memory[key] = e
	}
	return choose(err == nil, &Answer{Entry: e}, nil), changes
}

// open returns what is in a file, nil if that is damaged or not ours: its name has to follow from the URL
// in it, its size from Content-Length.
func (c *Cache) open(name string) (e *Entry) {
	info, err := os.Lstat(c.dir + "/" + name)
	if err != nil || !info.Mode().IsRegular() { // a pipe would hold us up
		return nil
	}
	file, _ := os.Open(c.dir + "/" + name) // nil reads as an error
	text := Conn{in: bufio.NewReader(file), room: 4 * maxHead}
	if attempt(func() {
		e = &Entry{file: file, used: info.ModTime(), err: io.EOF}
		e.req, e.Head = text.head(false), text.head(true)
		e.size, _ = digits(e.Get("Content-Length"))
		e.off, _ = file.Seek(-int64(text.in.Buffered()), io.SeekCurrent)
		e.taken = e.off + e.size
		ours := strings.HasPrefix(name+"~", fileName(strings.TrimPrefix(e.req.Line[1], "http://"))+"~")
		must(ours && e.taken == info.Size(), "502 damaged")
	}) != nil {
		file.Close()
		return nil
	}
	e.assess(c.ttl)
	e.Del("Age", "Content-Length")
	return e
}

// arguments returns those of all directives of some names in Cache-Control, "" for one that has none; is
// tells whether one has none, seconds is the first as a number, 0 if malformed (RFC 9111 §4.2.1).
func (h *Head) arguments(names ...string) (all []string) {
	for _, directive := range h.list("Cache-Control") {
		if name, argument, _ := strings.Cut(directive, "="); oneOf(name, names...) {
			all = append(all, strings.Trim(argument, `"`))
		}
	}
	return all
}
func (h *Head) is(names ...string) bool { return slices.Contains(h.arguments(names...), "") }
func (h *Head) seconds(name string, otherwise int64) int64 {
	if all := h.arguments(name); len(all) > 0 {
		otherwise, _ = digits(all[0])
	}
	return min(otherwise, maxSeconds)
}

// httpDate reads a date in one of the three formats (RFC 9110 §5.6.7), strictly but for case and the
// day's name, as Unix seconds, 0 if it is none.
func httpDate(s string) int64 {
	if s == "" {
		return 0
	}
	s = strings.ToUpper(s[max(0, strings.IndexAny(s, ", ")):])
	for _, layout := range []string{dateFormat[3:], ", 02-Jan-06 15:04:05 GMT", " Jan _2 15:04:05 2006"} {
		if t, err := time.Parse(layout, s); err == nil && strings.EqualFold(t.Format(layout), s) {
			return t.Unix()
		}
	}
	return 0
}

// assess works out what an answer says about time (RFC 9111 §4.2). Its age counts from the earlier of
// Date and when it was 0 by Age. Where nothing says how long it is fresh, a tenth of the time since its
// last change, at most a week, is a fair guess.
func (e *Entry) assess(ttl int64) {
	age, _ := digits(append(e.list("Age"), "")[0])
	date := httpDate(e.Get("Date"))
	e.born = min(date, httpDate(e.req.Get("Date"))-min(age, maxSeconds))
	e.born = choose(e.born > now().Unix(), 0, e.born) // the clock has been set back: nobody knows
	e.strict = len(e.arguments("s-maxage")) > 0 || e.is("must-revalidate", "proxy-revalidate", "no-cache")
	if len(e.list("Expires")) > 0 {
		e.life = httpDate(e.Get("Expires")) - date
	} else if slices.Contains(heuristic, e.Status) || e.is("public") {
		e.life = max(ttl, min((date-cmp.Or(httpDate(e.Get("Last-Modified")), date))/10, 7*24*3600))
	}
	e.life = choose(e.is("no-cache"), 0, e.seconds("s-maxage", e.seconds("max-age", e.life)))
	e.extent()
}

// extent reads from Content-Range where a part (206) belongs, and tells whether it has that size. Origins
// that count a byte too many at the end are forgiven.
func (e *Entry) extent() bool {
	field := extents.FindStringSubmatch(e.Get("Content-Range"))
	if field == nil || e.Status != 206 {
		return false
	}
	e.first, _ = digits(field[1])
	last, _ := digits(field[2])
	e.all, _ = digits(field[3])
	if last == e.all-1 && last == e.first+e.size {
		last, e.all = last-1, e.all-1
	}
	return last == e.first+e.size-1 && last < e.all
}

// judge tells whether a stored answer may be used as it is, with "", else why not, in the words of
// Cache-Status (RFC 9111 §4, RFC 9211 §2.2). meanwhile says that it may be while it is refreshed. What
// has come since it was asked for, in Unix seconds, is new enough, however long that took.
func (e *Entry) judge(req *Head, asked int64) (why string, meanwhile bool) {
	age := asked - e.born
	switch ttl := e.life - age; {
	case req.is("no-cache"), req.Get("Cache-Control") == "" && oneOf("no-cache", req.list("Pragma")...),
		age >= req.seconds("max-age", age+1), ttl < req.seconds("min-fresh", -endless):
		return "request", false
	case ttl > 0, !e.strict && (req.is("max-stale") || -ttl < req.seconds("max-stale", 0)):
		return "", false
	default:
		return "stale", !e.strict && e.Status != 206 && -ttl < e.seconds("stale-while-revalidate", 0)
	}
}

// standsIn tells whether a stale answer may be used where the origin failed: altogether (status 0) unless
// that is forbidden, with an error if that is allowed (RFC 9111 §4.2.4, RFC 5861 §4).
func (e *Entry) standsIn(req *Head, status int) bool {
	return !e.strict && !req.is("no-cache") && !oneOf("no-cache", req.list("Pragma")...) &&
		(status == 0 && len(e.arguments("stale-if-error")) == 0 ||
			slices.Contains([]int{0, 500, 502, 503, 504}, status) && now().Unix()-e.born-e.life <
				max(e.seconds("stale-if-error", 0), req.seconds("stale-if-error", 0)))
}

// part returns which n bytes of the body, from off on, answer req, with status 206 or 416; 304 if its
// condition says that it has them (RFC 9110 §13.2.2, RFC 9111 §4.3.2); else all, also where several
// ranges are wanted. Status 0 means that what is stored is a part (206), and not the one.
func (e *Entry) part(req *Head) (status int, off, n int64) {
	tags, tag := req.list("If-None-Match"), strings.TrimPrefix(e.Get("ETag"), "W/")
	changed, had := cmp.Or(e.Get("Last-Modified"), e.Get("Date")), httpDate(req.Get("If-Modified-Since"))
	if oneOf("*", tags...) || tag != "" && (slices.Contains(tags, tag) || slices.Contains(tags, "W/"+tag)) ||
		len(tags) == 0 && had > 0 && 0 < httpDate(changed) && httpDate(changed) <= had {
		return 304, 0, 0
	}
	wanted := span.FindStringSubmatch(req.Get("Range"))
	since := cmp.Or(req.Get("If-Range"), e.Get("Last-Modified"))
	same := since == e.Get("Last-Modified") || since[0] == '"' && since == e.Get("ETag")
	all := choose(e.Status == 206, e.all, e.size)
	if wanted != nil && wanted[1]+wanted[2] != "" && req.Line[0] == "GET" && e.size >= 0 && same {
		a, _ := digits(wanted[1])
		b, _ := digits(cmp.Or(wanted[2], "9999999999999999999")) // which saturates
		if wanted[1] == "" {
			a, b = max(0, all-b), all
		}
		if end := min(b, all-1) + 1; e.first <= a && a < end && end <= e.first+e.size {
			return 206, a - e.first, end - a
		} else if a >= all && a <= b {
			return 416, 0, 0
		}
	}
	return choose(e.Status == 206, 0, e.Status), 0, e.size
}

// claim makes the caller the one who asks the origin for a key, unless another does: e is his to give to
// store, or to leave. Else, if he is to wait, he does until it is known what the other gets, or joinWait.
// again tells that this, or what has been stored since changes, may answer him: he is to look once more.
func (c *Cache) claim(key string, changes int64, wait bool) (e *Entry, again bool) {
	defer lock(c)()
	other := c.under[key]
	if other == nil && c.changes == changes {
		e = &Entry{key: key}
		e.more.L, c.under[key] = c, e
		return e, false
	}
	if wait && other != nil && other.late.IsZero() { // one for all, as it wakes all
		other.late = time.Now().Add(joinWait)
		time.AfterFunc(joinWait, other.more.Broadcast)
	}
	for wait && other != nil && !other.shared && c.under[key] == other && time.Now().Before(other.late) {
		other.more.Wait()
	}
	return nil, (other == nil || other.shared) && c.changes != changes
}

// invalidate forgets what is under a key.
func (c *Cache) invalidate(key string) {
	defer lock(c)()
	delete(c.under, key)
	delete(c.memory, key)
	c.changes++
	if err := os.Remove(c.path(key)); err != nil && !os.IsNotExist(err) { // e.g., it is read-only
		os.Truncate(c.path(key), 0)
	}
}

// storable tells whether a shared cache may store e, the answer to req (RFC 9111 §3).
func (e *Entry) storable(req *Head) bool {
	known, fits := slices.Contains(heuristic, e.Status), e.Status != 206 || e.extent()
	forbidden := len(e.arguments("no-store", "must-understand")) > 0 && !(known && e.is("must-understand"))
	shared := e.arguments("s-maxage")
	explicit := len(shared)+len(e.arguments("max-age"))+len(e.list("Expires")) > 0
	ours := func(name string) bool { return oneOf(name, "*", "Date", "Generation", "From") }
	return !forbidden && !e.is("private") && !req.is("no-store") && e.Status != 304 && e.Status != 416 &&
		fits && len(e.Fields) < maxFields-8 && !slices.ContainsFunc(e.list("Vary"), ours) &&
		(req.Get("Authorization") == "" || len(shared) > 0 || e.is("public", "must-revalidate")) &&
		(explicit || e.Get("Set-Cookie") == "" && (known || e.is("public")))
}

// store puts the answer e to req into a file for all, if that has been claimed, it may, and that is of use.
// old is what it replaces, person tells whose its cookies are. What is small and here already is in its
// place before it is answered.
func (c *Cache) store(e, old *Answer, url string, req *Head, asked time.Time, person func() string) {
	if e.key == "" || !e.storable(req) || e.size > c.limit {
		return
	}
	e.own, e.Head = e.Head, e.Clone() // with what is for this client alone, and without
	e.req = &Head{Line: [3]string{"GET", "http://" + url, "HTTP/1.1"}}
	e.req.Fields = append([]Field{{"Date", asked.UTC().Format(dateFormat)}}, e.varied(req)...)
	e.assess(c.ttl)
	useful := e.life > 0 || e.seconds("stale-while-revalidate", 0) > 0
	if !useful && e.Get("ETag")+e.Get("Last-Modified") == "" {
		return
	}
	generation := cmp.Or(cmp.Or(old, e).req.Get("Generation"), rand.Text()) // see lookup; e has none yet
	e.req.Set("Generation", choose(e.Get("Vary") != "", generation, ""),
		"From", choose(e.Get("Set-Cookie") != "", person(), ""))
	os.MkdirAll(c.dir, 0o700)       // somebody may have removed it
	root, err := os.OpenRoot(c.dir) // Windows can rename its files while they are open
	if err == nil {
		e.file, err = root.OpenFile(temporary+rand.Text(), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		root.Close()
	}
	if c.tell(err); err != nil {
		return
	}
	private := strings.Join(e.arguments("private", "no-cache"), ",") // names of fields
	e.Del(append(strings.FieldsFunc(private, separates), "Content-Length")...)
	e.Write(e.text(e.req.text(nil), "Content-Length", fmt.Sprintf("%20d", e.size)))
	e.off = e.end()
	e.own.Del("Age")
	e.Del("Age")
	unlock := lock(c)
	e.shared, c.changes = true, c.changes+1
	e.more.Broadcast()
	e.users = append(e.users, e)
	if unlock(); e.size >= 0 && e.off+e.size <= maxBehind && ready(e.source) {
		e.run(c) // nobody reads yet, so it must not have to wait for that
	} else {
		go e.run(c)
	}
}

// tell has the operator know, once a minute, why things are not stored.
func (c *Cache) tell(err error) {
	if err != nil && now().Unix()-c.told.Load() > 60 {
		c.told.Store(now().Unix())
		log.Printf("not stored: %v", err)
	}
}

// run brings the body into the file, and the file to its place.
func (e *Entry) run(c *Cache) {
	_, err := io.Copy(io.Discard, io.TeeReader(e.source, e))
	defer e.source.Close() // last: until err is set who leaves may close it, which others must not have yet
	if e.size < 0 {
		e.file.WriteAt(fmt.Appendf(nil, "%20d", e.taken-e.off), e.off-24) // its place, before two CR LF
	}
	unlock := lock(c)
	whole := err == nil && c.under[e.key] == e
	unlock() // it has to be in its place before it is forgotten, and nobody is to wait for that
	path := c.path(e.key)
	old, _ := os.Lstat(path)
	whole = whole && os.Rename(e.file.Name(), path) == nil
	defer lock(c)()
	if e.leave() && whole {
		if c.files, c.size = c.files+1, c.size+e.taken; old != nil {
			c.files, c.size = c.files-1, c.size-old.Size()
		}
	} else { // it broke, or has been invalidated, if not before then meanwhile
		os.Remove(choose(whole, path, e.file.Name()))
	}
	delete(c.memory, e.key)
	e.err, c.changes = cmp.Or(err, io.EOF), c.changes+1
	if e.more.Broadcast(); len(e.users) == 0 {
		e.file.Close()
	}
	if c.size > c.limit { // all is counted anew, from 0 on
		c.size = 0
		go c.trim()
	}
}

// Write takes what arrives. To fail would cut all clients: what the file does not take is in memory until
// all have read it, nothing is stored, and the download waits for those who are too far behind.
func (e *Entry) Write(p []byte) (n int, _ error) {
	if !e.broken && e.taken+int64(len(p)) <= cache.limit {
		written, err := e.file.Write(p)
		n = written
		cache.tell(err)
	}
	defer lock(&cache)()
	if e.taken += int64(n); n < len(p) {
		e.broken = true
		e.leave()
		if len(e.memory) > maxBehind {
			for slices.ContainsFunc(e.users, func(a *Answer) bool { return a.off+a.at.Load() < e.end() }) {
				e.more.Wait()
			}
			e.taken, e.memory = e.end(), e.memory[:0]
		}
		e.memory = append(e.memory, p[n:]...)
	}
	e.more.Broadcast()
	return len(p), nil
}

// leave takes e from what others find on its way, so that it is not stored, and tells whether it was there.
func (e *Entry) leave() (found bool) {
	if found = cache.under[e.key] == e; found {
		delete(cache.under, e.key)
	}
	e.more.Broadcast()
	return found
}

// passing tells that the body comes from an origin for one client alone, end how far it has come.
func (e *Entry) passing() bool { return e.source != nil && !e.shared }
func (e *Entry) end() int64    { return e.taken + int64(len(e.memory)) }

// updated is the head after a 304: its fields are in the place of the stored ones, but for those that
// describe the body as it is stored (RFC 9111 §3.2).
func (e *Entry) updated(res *Head) *Head {
	res.Del("Content-Length", "Content-Encoding", "Content-Range")
	h := e.Clone()
	h.Del("Set-Cookie", "Set-Cookie2") // it is of the one who had asked before
	for _, f := range res.Fields {
		h.Del(f.Name)
	}
	h.Fields = append(h.Fields, res.Fields...)
	return h
}

// ready tells whether all of it has arrived, before the first Read.
func (a *Answer) ready() bool {
	defer lock(&cache)()
	a.more.Broadcast() // Write may wait for one who begins beyond what there is
	return a.err == io.EOF || a.end() == a.off+a.size
}
func (a *Answer) Read(p []byte) (n int, err error) {
	at, unlock := a.off+a.at.Load(), lock(&cache)
	for at >= a.end() && a.err == nil {
		a.more.Wait()
	}
	beyond, err := at-a.taken, a.err
	if beyond >= 0 && beyond < int64(len(a.memory)) {
		n, err = copy(p, a.memory[beyond:]), nil
		a.at.Add(int64(n))
		a.more.Broadcast()
	}
	if unlock(); beyond < 0 {
		n, err = a.file.ReadAt(p[:min(int64(len(p)), -beyond)], at)
		err = choose(err == io.EOF, io.ErrUnexpectedEOF, err) // somebody has cut it
		a.at.Add(int64(n))
	}
	return n, err
}

// Close ends the use. What interests nobody goes on only if at most 1 MiB of it is to come.
func (a *Answer) Close() error {
	if a == nil || a.source == nil && a.file == nil { // it is in memory
		return nil
	} else if a.passing() {
		return a.source.Close()
	}
	defer lock(&cache)()
	a.users = slices.DeleteFunc(a.users, func(other *Answer) bool { return other == a })
	if a.more.Broadcast(); len(a.users) > 0 {
		return nil
	} else if a.err != nil {
		return a.file.Close()
	} else if b, ok := a.source.(body); ok && (a.size < 0 || a.off+a.size-a.taken > 1<<20) {
		a.leave()
		b.Conn.Close()
	}
	return nil
}

// due counts a GET that has to be fetched, and tells whether its answer is to be stored.
func (c *Cache) due(url string) bool {
	defer lock(c)()
	if len(c.seen) > 1<<16 {
		clear(c.seen) // to count anew is cheaper than to find out which are old
	}
	name := fileName(url) // which is not long
	times := append(c.seen[name], now())
	c.seen[name] = times[max(0, len(times)-c.uses):]
	return len(times) >= c.uses && now().Sub(c.seen[name][0]) <= 10*time.Minute
}

// trim counts the files, and removes what broken downloads have left an hour ago, and the least recently
// used if they are too much. Only names of ours count.
func (c *Cache) trim() {
	files, size := []os.FileInfo(nil), int64(0)
	entries, _ := os.ReadDir(c.dir)
	for _, file := range entries {
		info, err := file.Info()
		if name := file.Name(); err == nil && info.Mode().IsRegular() && strings.ContainsAny(name[1:], "_+") {
			files, size = append(files, info), size+info.Size()
		} else if err == nil && strings.HasPrefix(name, temporary) && now().Sub(info.ModTime()) > time.Hour {
			os.Remove(c.dir + "/" + name)
		}
	}
	if size > c.limit {
		files = slices.DeleteFunc(files, func(info os.FileInfo) bool { // what is not ours does not count
			e := c.open(info.Name())
			size -= choose(e == nil, info.Size(), 0)
			return e == nil || e.file.Close() != nil
		})
	}
	slices.SortFunc(files, func(a, b os.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	enough := choose(size > c.limit, c.limit-c.limit/16, c.limit) // so that it is not done again at once
	for ; size > enough && len(files) > 0; files = files[1:] {
		os.Remove(c.dir + "/" + files[0].Name())
		size -= files[0].Size()
	}
	defer lock(c)()
	c.size, c.files = c.size+size, int64(len(files))
}
