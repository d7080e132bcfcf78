package main

// The store, and the rules of caching (RFC 9111). A stored response is one
// file, a transcript of the request and the response, under the name of the
// URL: the file system is the index. Nothing in this file knows a connection.
//
// Its story comes first: roundTrip, which answers one request from the store
// or with the help of its origin; how an entry is found; how one request
// fetches for all; how a response is stored; and the download, which several
// clients may follow while it grows. Then come the rules, small functions of
// headers and times in the order of the RFC, and the files: their names, what
// is in them, and how they are trimmed.

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
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

// A Cache answers requests from a directory of files where RFC 9111 lets a
// shared cache do so, and fills the directory with what origins answer.
type Cache struct {
	CacheConfig
	root     atomic.Pointer[os.Root] // the directory
	memory   sync.Map                // name to *Entry: small ones that were read lately
	inMemory atomic.Int64            // bytes of them and of those that only a client still reads
	version  atomic.Int64            // counts what is stored and removed
	files    atomic.Int64            // in the directory, and
	size     atomic.Int64            // their bytes
	warned   atomic.Int64            // when the operator was last warned, in Unix seconds
	trimmed  atomic.Int64            // when room was made last on a full disk, likewise
	trimming sync.Mutex              // is held by trim

	// The lock guards what follows, what changes in each download, and renaming.
	sync.Mutex
	downloads map[string]*download // by the name that the file is to have
	unshared  map[string]time.Time // when an answer could not be shared: nobody waits for the next
	oversized map[string]time.Time // when a body of unknown length was larger than the limit
	misses    map[string]int       // counted if -uses asks for that
	counting  time.Time            // since when
}

// A CacheConfig is what the rest of the program decides about a cache.
type CacheConfig struct {
	dir        string
	limit      int64            // bytes that the directory may hold
	ttl        time.Duration    // least freshness of a response that states none
	uses       int              // store a response from that request on, within usesWindow
	shareInner bool             // whether responses from inner addresses may be stored
	now        func() time.Time // the clock
	warn       func(error)      // tells the operator what is wrong
	guard      func(func())     // runs what a goroutine does, and survives its bugs
}

// A transaction is one request on its way through the cache.
type transaction struct {
	*Cache
	req    *Request
	ask    func(*Request) (*Response, error) // sends a request to its origin
	asked  time.Time
	name   string // of the file of the variant that the request selects
	stored *Entry // what it selects, or nil
	seen   int64  // Cache.version before that was looked up
	status CacheStatus
}

// roundTrip answers a request from the store if it may. Otherwise it calls ask,
// which sends a request to its origin, and stores the response if that is
// allowed. The status tells how the request was answered or, with an error, how
// far it got.
func (c *Cache) roundTrip(req *Request, ask func(*Request) (*Response, error)) (
	*Response, CacheStatus, error) {
	t := &transaction{Cache: c, req: req, ask: ask}
	t.asked = c.now().Truncate(time.Second) // as dates in fields are
	t.status.Outcome = miss
	res, err := t.respond()
	t.drop()
	return res, t.status, err
}

// respond finds the response:
//  1. What the store can't answer goes straight to the origin.
//  2. A fresh entry answers by itself, and so does a download under way.
//  3. The first who asks for what is missing or stale fetches it for all. The
//     others wait for that, once, and look again.
func (t *transaction) respond() (*Response, error) {
	h := t.req.Header
	switch {
	case t.req.Method != "GET" && t.req.Method != "HEAD":
		return t.forward(nil, "method")
	case t.req.hasBody(), h.Has("If-Match"), h.Has("If-Unmodified-Since"),
		len(h.Values("Range")) > 1: // it wants several
		return t.forward(nil, "bypass")
	}
	waited := "" // the name for which this request has waited already
	for {
		fresh, why := t.lookup()
		if fresh {
			return t.serveStored(), nil
		}
		unfit := t.stored != nil && t.stored.isGrowing() // a download that may not answer this
		if unfit || t.req.Method == "HEAD" || !t.due() {
			return t.forward(nil, why)
		}
		d, mine := t.claim()
		if mine {
			defer t.release(d)
			return t.forward(d, why)
		}
		if d == nil { // the store has changed since the look-up: look again
			continue
		}
		if waited == t.name { // once is enough
			return t.forward(nil, why)
		}
		if !t.wait(d) {
			return t.forward(nil, why)
		}
		waited = t.name
	}
}

// serveStored answers with what is stored, as it is.
func (t *transaction) serveStored() *Response {
	e := t.stored
	t.stored = nil // the response closes its body
	t.status.TTL = e.lifetime - t.asked.Sub(e.born)
	t.status.Outcome = e.hit
	if e.isGrowing() {
		t.status.Collapsed = true
		t.status.Forward = "uri-miss"
	}
	age := min(max(0, t.now().Sub(e.born)/time.Second), maxSeconds)
	e.Header = append(slices.Clip(e.Header), Field{"Age", strconv.FormatInt(int64(age), 10)})
	tailor(&e.Response, t.req)
	if e.Status == 304 {
		t.status.Outcome = notModifiedHit
	}
	return &e.Response
}

// forward asks the origin: for all of it, or whether a stale entry is still
// good. The answer goes into the download that the caller has claimed, if any.
func (t *transaction) forward(d *download, why reason) (*Response, error) {
	if cacheControl(t.req.Header).Has("only-if-cached") {
		return nil, errorf(504, "not in the cache: %s", t.req.URL)
	}
	req := *t.req
	validates := t.stored != nil && hasValidator(t.stored.Header) && req.Method == "GET"
	if validates {
		req.Header = withValidators(req.Header, t.stored.Header)
	}
	t.status.Forward = why
	res, err := t.ask(&req)
	if err == nil {
		t.status.ForwardStatus = res.Status
	}
	if t.stored != nil && t.stored.mayStandIn(t.req.Header, res, err, t.now()) {
		if err == nil {
			res.Body.Close()
		}
		res = t.serveStored()
		t.status.Outcome = refreshFailed
		return res, nil
	}
	if err != nil {
		return nil, err
	}
	if validates && res.Status == 304 {
		return t.renew(d, res)
	}
	switch {
	case validates:
		t.status.Outcome = refreshModified
	case why == "request":
		t.status.Outcome = clientRefresh
	}
	if !isSafe(req.Method) && res.Status < 400 {
		t.invalidateBy(res)
	}
	if t.keep(d, res) {
		client := *t.req
		if !validates { // the origin has seen the client's own date, and has answered in full
			client.Header = client.Without("If-Modified-Since")
		}
		tailor(res, &client)
	}
	return res, nil
}

// renew answers with what is stored, as the origin has just said that it is
// still good, and stores it again with the fields of the 304 (RFC 9111 §4.3.4).
// The body goes from the old file to a new one.
func (t *transaction) renew(d *download, validation *Response) (*Response, error) {
	validation.Body.Close()
	old := t.stored
	if !sameRepresentation(old.Header, validation.Header) {
		t.drop() // the origin means another representation: ask for all of that
		return t.forward(d, t.status.Forward)
	}
	t.status.Outcome = refreshUnmodified
	res := old.Response
	res.Header = updated(old.Header, validation.Header)
	res.Origin = validation.Origin
	t.keep(d, &res)
	t.stored = nil // who has its body now, the download or the response, closes it
	for _, f := range validation.Header {
		if equalFold(f.Name, "Set-Cookie") {
			res.Header = append(res.Header, f) // for this client alone
		}
	}
	tailor(&res, t.req)
	return &res, nil
}

// sent returns the fields of the request as they are passed on: Vary selects by
// those.
func (t *transaction) sent() Header { return t.req.endToEnd() }

// drop lets go of an entry that is of no use.
func (t *transaction) drop() {
	if t.stored != nil {
		t.stored.Body.Close()
		t.stored = nil
	}
}

// An Entry is a stored response, or one that is just being stored. Each look-up
// makes one of its own, whose Body is an io.Seeker: it can be read from any
// place on.
type Entry struct {
	Response                 // without Age in the header
	request        Header    // when it was asked for, and what Vary selects by
	born           time.Time // when its age was 0
	lifetime       time.Duration
	mustRevalidate bool      // it must not be used when it is stale
	weight         int64     // bytes of the file
	used           time.Time // when the file was last used; in memory, when it was read
	hit            outcome   // fileHit or memoryHit: how an answer from it is logged
	text           []byte    // the body, if it is in memory
}

// isGrowing reports whether an entry is still on its way.
func (e *Entry) isGrowing() bool {
	_, growing := e.Body.(*follower)
	return growing
}

// A memoryBody reads a body in memory.
type memoryBody struct{ *bytes.Reader }

func (b memoryBody) Close() error { return nil }

// A fileBody reads a part of a file.
type fileBody struct {
	*io.SectionReader
	file  *os.File
	start int64
}

// newFileBody returns the n bytes of a file from start on.
func newFileBody(file *os.File, start, n int64) fileBody {
	return fileBody{io.NewSectionReader(file, start, n), file, start}
}

func (b fileBody) Close() error { return b.file.Close() }

// lookup finds the stored response that the request selects (RFC 9111 §4.1). It
// reports whether that may answer as it is, or else why the origin must be asked.
//
// The first variant of a URL has the plain name of the URL. Its Vary field says
// which request fields tell the variants apart, and its Generation is a random
// text. The name of any other variant ends in a hash of those fields and of
// that text. So removing the first file makes all of them unreachable.
func (t *transaction) lookup() (fresh bool, why reason) {
	t.drop() // what an earlier look-up has found
	t.name = fileName(t.req.URL.Host() + t.req.URL.Path)
	t.seen = t.version.Load()
	t.stored = t.find()
	why = "uri-miss"
	if t.stored != nil && t.stored.Has("Vary") {
		sent := t.sent()
		if !t.stored.selectedBy(sent) {
			why = "vary-miss"
			t.findVariant(sent)
		}
	}
	if t.stored == nil {
		return false, why
	}
	return t.stored.satisfies(t.req.Header, t.asked)
}

// findVariant goes on from the first variant of a URL to the one that the fields of
// a request select.
func (t *transaction) findVariant(sent Header) {
	selecting := selectingFields(t.stored.Header, sent)
	hash := sha256.Sum256(fmt.Appendf(nil, "%q%q", t.stored.request.Get("Generation"), selecting))
	t.name += fmt.Sprintf("~%x", hash[:8])
	t.drop()
	t.stored = t.find()
	if t.stored != nil && !t.stored.selectedBy(sent) { // its own Vary may differ
		t.drop()
	}
}

// find returns what there is under the name: in memory, on its way, or in a file.
// Memory may answer for memoryTrust, so what another process stores or removes
// is soon noticed.
func (t *transaction) find() *Entry {
	kept, found := t.memory.Load(t.name)
	if found && t.now().Sub(kept.(*Entry).used).Abs() <= memoryTrust {
		e := *kept.(*Entry)
		e.hit = memoryHit
		e.Body = memoryBody{bytes.NewReader(e.text)}
		return &e
	}
	var e *Entry
	t.Lock()
	if d := t.downloads[t.name]; d != nil && d.entry != nil {
		growing := *d.entry
		growing.Body = d.join()
		e = &growing
	}
	t.Unlock()
	if e == nil {
		e = t.open()
	}
	return e
}

// open returns the entry in the file of the name. A damaged file is a miss. So is one
// that this proxy would not store: an older version may have stored a part or a
// cookie, and a proxy for this machine only what came from an inner address.
func (t *transaction) open() *Entry {
	e := readEntry(t.root.Load(), t.name)
	if e == nil {
		return nil
	}
	if e.Status == 206 || e.Has("Set-Cookie") || e.request.Has("Inner") && !t.shareInner {
		e.Body.Close()
		return nil
	}
	now := t.now()
	if now.Sub(e.used) > time.Minute {
		t.root.Load().Chtimes(t.name, now, now) // trim removes the oldest
	}
	e.used = now
	e.assess(t.ttl, now)
	if e.Length <= maxInMemory {
		t.remember(e)
	}
	return e
}

// remember reads a body into memory, and lets e read it from there: to open a file
// takes 20 µs. inMemory falls when the garbage collector has found that no client
// reads the body any more.
func (t *transaction) remember(e *Entry) {
	if t.inMemory.Load() > maxMemory {
		t.memory.Clear() // to read them again is cheap
		return
	}
	body := e.Body.(fileBody)
	text := make([]byte, e.weight) // with the head, as AddCleanup needs a byte
	if _, err := body.file.ReadAt(text, 0); err != nil {
		return
	}
	c := t.Cache
	c.inMemory.Add(e.weight)
	runtime.AddCleanup(&text[0], func(weight int64) { c.inMemory.Add(-weight) }, e.weight)
	body.Close()
	e.text = text[body.start:]
	e.Body = memoryBody{bytes.NewReader(e.text)}
	e.Ready = true
	kept := *e
	t.Lock()
	defer t.Unlock()
	// It must not hide a newer one, stored since or on its way.
	if t.seen == t.version.Load() && t.downloads[t.name] == nil {
		t.memory.Store(t.name, &kept)
	}
}

// claim decides who asks the origin. It returns a new download and true if this
// request does, and the download of another request and false if that one
// already does. It returns nil and false if the store has changed since the
// look-up: the caller must look again.
func (t *transaction) claim() (d *download, mine bool) {
	t.Lock()
	defer t.Unlock()
	d = t.downloads[t.name]
	if d != nil || t.seen != t.version.Load() {
		return d, false
	}
	d = &download{cache: t.Cache, name: t.name, began: time.Now(),
		known: make(chan struct{}), grew: sync.NewCond(&t.Cache.Mutex), users: 1}
	t.downloads[t.name] = d
	return d, true
}

// wait waits until it is known what the download of another request brings, and
// reports whether the caller should look again. A request does not wait for an
// answer that is perhaps for one client alone, and never for longer than joinWait.
func (t *transaction) wait(d *download) bool {
	unshared := t.wasNoted(t.unshared)
	t.Lock()
	d.awaited = true
	t.Unlock()
	part := t.stored == nil && t.req.Has("Range") // which the origin may send at once
	if unshared || part || t.req.Has("Authorization") || wantsReload(t.req.Header) {
		return false
	}
	select {
	case <-d.known:
		return true
	case <-time.After(time.Until(d.began.Add(joinWait))):
		return false
	}
}

// release tells those who wait for a claim that they can look again. If no
// download has come from it, because the answer to a plain GET could not be
// shared, that is remembered: else they would be served one after another.
func (t *transaction) release(d *download) {
	t.Lock()
	defer t.Unlock()
	close(d.known)
	if d.entry != nil {
		return
	}
	t.forget(d)
	answered := t.status.ForwardStatus != 0 && t.status.ForwardStatus != 304
	personal := t.req.Has("Authorization") || cacheControl(t.req.Header).Has("no-store")
	if d.awaited && answered && !personal && !t.req.Has("Range") {
		t.note(t.unshared, d.name)
	}
}

// wasNoted reports whether the name has been noted in the last unsharedWait.
func (t *transaction) wasNoted(times map[string]time.Time) bool {
	t.Lock()
	defer t.Unlock()
	return t.now().Sub(times[t.name]) <= unsharedWait
}

// note remembers a name for unsharedWait. The caller holds the lock.
func (c *Cache) note(times map[string]time.Time, name string) {
	if len(times) >= maxNames {
		clear(times)
	}
	times[name] = c.now()
}

// forget takes a download off the map, and reports whether it was there. The
// caller holds the lock.
func (c *Cache) forget(d *download) bool {
	found := c.downloads[d.name] == d
	if found {
		delete(c.downloads, d.name)
	}
	return found
}

// due counts a request that has to be fetched, and reports whether its answer
// is to be stored. When the window is over all counts begin anew: that is cheaper
// than to find out which of them are old.
func (t *transaction) due() bool {
	if t.uses <= 1 || t.stored != nil {
		return true
	}
	t.Lock()
	defer t.Unlock()
	if t.now().Sub(t.counting) > usesWindow || len(t.misses) >= maxNames {
		t.counting = t.now()
		clear(t.misses)
	}
	t.misses[t.name]++
	return t.misses[t.name] >= t.uses
}

// keep begins to store a response if it may. If it returns true, the body is read
// from the store, and can be read from any place on. d is the caller's claim, if any.
func (t *transaction) keep(d *download, res *Response) bool {
	may, why := storable(t.req, res, t.CacheConfig)
	if may && res.Length < 0 && t.wasNoted(t.oversized) {
		may = false
		why = "too-large"
	}
	t.status.Detail = why
	if d == nil {
		return false
	}
	if may {
		return t.store(d, res)
	}
	if t.isOutdatedBy(res) {
		t.invalidate(t.name)
	}
	return false
}

// isOutdatedBy reports whether a response that is not stored takes the place of what
// is: it tells how the resource is now, and not even a plain GET could have stored
// it.
func (t *transaction) isOutdatedBy(res *Response) bool {
	current := t.status.ForwardStatus == 304 || isHeuristic(res.Status) // and not, e.g., a 503
	if t.stored == nil || !current {
		return false
	}
	mayForOthers, _ := storable(&Request{Method: "GET"}, res, t.CacheConfig)
	return !mayForOthers
}

// store begins to store a response, and reports whether it does.
func (t *transaction) store(d *download, res *Response) bool {
	e := t.newEntry(res)
	file, err := t.create(t.req.URL, e)
	if err != nil {
		t.status.Detail = "disk-error"
		t.trouble(err)
		return false
	}
	e.assess(t.ttl, t.now()) // only now, as the file has Age, too
	if t.stored != nil {
		d.replaces = t.stored.weight
	}

	t.Lock()
	d.entry = e
	d.file = file
	d.body = res.Body
	t.memory.Delete(d.name)
	res.Body = d.join()
	t.Unlock()
	t.status.Stored = true
	if !res.Ready {
		go t.guard(d.run)
		return true
	}
	d.run() // a body that is here already, as most are, needs no goroutine
	if d.rest != nil {
		t.status.Stored = false
		t.status.Detail = "disk-error"
	}
	return true
}

// newEntry makes an entry of a response.
func (t *transaction) newEntry(res *Response) *Entry {
	e := &Entry{Response: *res, hit: fileHit}
	e.Header = res.endToEnd()
	e.request = append(Header{dateField("Date", t.asked)}, selectingFields(e.Header, t.sent())...)
	if isInner(res.Origin) {
		e.request = append(e.request, Field{"Inner", res.Origin.String()})
	}
	if e.Has("Vary") {
		generation := rand.Text()
		if t.stored != nil {
			generation = cmp.Or(t.stored.request.Get("Generation"), generation)
		}
		e.request = append(e.request, Field{"Generation", generation})
	}
	return e
}

// commit puts a finished file in its place, and reports whether it is there. The
// caller holds the lock.
func (d *download) commit() bool {
	c := d.cache
	if d.entry.Length < 0 {
		d.file.WriteAt(fmt.Appendf(nil, lengthFormat, d.size), d.file.start-lengthBytes)
	}
	if err := d.file.root.Rename(d.file.name, d.name); err != nil {
		c.trouble(err)
		return false
	}
	c.version.Add(1)
	c.memory.Delete(d.name)
	delete(c.unshared, d.name)
	if d.replaces == 0 { // a new entry
		c.files.Add(1)
	}
	size := c.size.Add(d.file.start + d.size - d.replaces)
	if size > c.limit {
		c.size.Store(0) // so that no other commit starts to trim; that counts anew
		go c.guard(func() { c.trim(false) })
	}
	return true
}

// invalidate removes what is stored under a name, or on its way there.
func (c *Cache) invalidate(name string) {
	c.Lock()
	defer c.Unlock()
	delete(c.downloads, name)
	c.memory.Delete(name)
	c.version.Add(1)
	c.root.Load().Remove(name)
}

// invalidateBy removes what is stored for the URLs that an unsafe request may have
// changed: its own, and those that the response names (RFC 9111 §4.4).
func (t *transaction) invalidateBy(res *Response) {
	here := t.req.URL.Host()
	for _, reference := range []string{t.req.URL.Path,
		res.Get("Location"), res.Get("Content-Location")} {
		if path := strings.TrimPrefix(reference, "http://"+here); strings.HasPrefix(path, "/") {
			t.invalidate(fileName(here + path))
		}
	}
}

// trouble tells the operator, once a minute, why things are not stored. If the
// disk is full it makes room, once a second.
func (c *Cache) trouble(err error) {
	now := c.now().Unix()
	if errors.Is(err, syscall.ENOSPC) && c.trimmed.Swap(now) != now {
		go c.guard(func() { c.trim(true) })
	}
	last := c.warned.Load()
	if err != errTooLarge && now-last >= 60 && c.warned.CompareAndSwap(last, now) {
		c.warn(fmt.Errorf("not stored: %w", err))
	}
}

// A download is a response on its way into the store. It begins as the claim
// of the one who asks the origin, and has an entry once it is known that there
// is something to store. Every client, also the one who caused it, reads the
// file as it grows, at its own pace, and none depends on another.
//
// What ends too early is seen as a cut by every client, and is not stored. What
// ends well is in its place before any client has the last byte, so whoever
// has the answer finds the entry.
type download struct {
	cache    *Cache
	name     string // that the file gets when it is whole
	began    time.Time
	replaces int64         // bytes of the file in whose place it comes
	known    chan struct{} // is closed when it is known whether there is something to share
	body     io.ReadCloser // from the origin, or of the entry that is renewed
	file     *cacheFile    // shared by all readers: somebody may have removed the name

	// What follows is guarded by the cache's lock. Only run changes size and rest, so
	// run reads size without the lock. Readers look at rest when err is set.
	awaited bool       // another request has come for it
	entry   *Entry     // what there is to share, once that is known
	grew    *sync.Cond // there is more, or no more comes
	size    int64      // bytes of the body that are in the file
	rest    io.Reader  // of the body, once the file takes no more: the first client goes on there
	err     error      // io.EOF when all has come, or what broke it off
	users   int        // the readers and, until it has ended, run
}

// run brings the body into the file: a TeeReader writes there what it reads, and
// the copy goes to Write, which tells the readers. What the file does not take is
// kept for the first client.
func (d *download) run() {
	err := errors.New("a bug ended the download") // unless the copying says what did
	defer func() { d.finish(err) }()
	if renewed, ok := d.body.(fileBody); ok {
		err = d.copyFile(renewed)
		return
	}
	err = copyBody(d, io.TeeReader(d.body, d.file), d.entry.Length)
	if d.file.refused != nil {
		d.rest = io.MultiReader(bytes.NewReader(d.file.refused), d.body)
	}
}

// copyFile copies the body from file to file, which Linux does inside the
// kernel, in steps that can be read meanwhile.
func (d *download) copyFile(old fileBody) (err error) {
	old.file.Seek(old.start, io.SeekStart)
	for err == nil && d.size < d.entry.Length {
		var n int64
		n, err = io.CopyN(d.file.File, old.file, min(copyStep, d.entry.Length-d.size))
		d.announce(n)
	}
	if err != nil {
		old.Seek(d.size, io.SeekStart)
		d.rest = old
	}
	return err
}

// Write lets the readers have what has just been written to the file.
func (d *download) Write(p []byte) (int, error) {
	d.announce(int64(len(p)))
	return len(p), nil
}

// announce lets the readers have n more bytes of the file.
func (d *download) announce(n int64) {
	d.cache.Lock()
	defer d.cache.Unlock()
	d.size += n
	d.grew.Broadcast()
}

// finish ends the download; err tells why the copying stopped early, if it did.
// If the whole body has come, and what is stored has not been invalidated since
// it began, finish puts the file in its place, and otherwise removes it. Then it wakes
// the readers. If the file took no more, the first client goes on with the body
// itself.
func (d *download) finish(err error) {
	if d.rest != nil {
		d.cache.trouble(err)
	}
	d.cache.Lock()
	defer d.cache.Unlock()
	wanted := d.cache.forget(d)
	stored := false
	if err == nil && wanted {
		stored = d.commit()
	}
	if !stored {
		d.file.root.Remove(d.file.name)
	}
	if err == errTooLarge {
		d.cache.note(d.cache.oversized, d.name)
	}
	d.err = cmp.Or(err, io.EOF)
	d.grew.Broadcast()
	if d.rest == nil {
		d.body.Close()
	}
	d.leave()
}

// leave ends the use that a reader, or run, makes of the download. Who is last
// closes what they shared. The caller holds the lock.
func (d *download) leave() {
	d.users--
	if d.users == 0 {
		d.body.Close()
		d.file.Close()
	}
}

// join adds a reader. One that comes when there is no other, as the client that
// caused the download does, is the first: it gets what the file does not take. The
// caller holds the lock.
func (d *download) join() *follower {
	d.users++
	return &follower{download: d, first: d.users == 2}
}

// A follower reads a download, and waits for what has not come yet.
type follower struct {
	*download
	first bool // there was no other reader when it came
	off   int64
	to    flusher // the client, flushed before a wait: it must not wait for what is here
}

func (f *follower) flushBeforeWait(to flusher) { f.to = to }

// Seek lets the next Read begin at off, counted from the start.
func (f *follower) Seek(off int64, _ int) (int64, error) {
	f.off = off
	return off, nil
}

// Read reads from the file what has been written to it. It waits if that is
// nothing yet. The first client goes on with what the file did not take; if it
// has asked for a range that begins there, some of that is skipped.
func (f *follower) Read(p []byte) (int, error) {
	size, err := f.await()
	switch {
	case f.off < size:
		n, err := f.file.ReadAt(p[:min(int64(len(p)), size-f.off)], f.file.start+f.off)
		f.off += int64(n)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF // somebody has cut the file
		}
		return n, err
	case f.first && f.rest != nil:
		io.CopyN(io.Discard, f.rest, f.off-size)
		f.off = size // where rest begins; from now on nothing is skipped
		return f.rest.Read(p)
	}
	return 0, err
}

// await waits until there is more to read, or no more comes. It returns how much
// there is in all, and why that is the end. A body that is whole has to be in
// its place before a client has all of it.
func (f *follower) await() (int64, error) {
	f.cache.Lock()
	defer f.cache.Unlock()
	if f.off >= f.size && f.to != nil {
		f.cache.Unlock()
		f.to.Flush()
		f.cache.Lock()
	}
	for f.err == nil && (f.off >= f.size || f.size == f.entry.Length) {
		f.grew.Wait()
	}
	return f.size, f.err
}

// Close ends the reading of one client. When the last one leaves, the download
// goes on if at most maxUnread bytes are to come, and is dropped otherwise.
func (f *follower) Close() error {
	f.cache.Lock()
	defer f.cache.Unlock()
	left := f.entry.Length - f.size // negative if nobody knows
	if _, renewal := f.body.(fileBody); renewal {
		left = 0 // it costs the origin nothing, and the next one would begin anew
	}
	last := f.users == 2 // with run
	if f.err == nil && last && (left < 0 || left > maxUnread) {
		f.cache.forget(f.download) // nobody is to join it any more, and
		f.body.Close()             // run is to end
	}
	f.leave()
	return nil
}

// Sizes and waits.
const (
	maxInMemory  = 1 << 20          // bytes of a body that memory may answer with
	maxMemory    = 16 << 20         // bytes of all these; slow clients that still read old ones count
	maxUnread    = 1 << 20          // bytes of a download that are fetched though nobody reads it
	maxName      = 160              // bytes of a file's name, but for a variant's hash
	maxNames     = 1 << 16          // URLs that are remembered because they are not stored
	copyStep     = 8 << 20          // bytes that are copied from file to file at a time
	maxSeconds   = 1 << 31          // of an age or a lifetime (RFC 9111 §1.2.2)
	memoryTrust  = time.Second      // for which memory answers without a look at the file
	joinWait     = 5 * time.Second  // for the head of a response that another has asked for
	unsharedWait = 2 * time.Minute  // for which it is remembered what could not be stored
	usesWindow   = 10 * time.Minute // in which the uses of a URL are counted
	strayWait    = time.Hour        // age at which a temporary file must be left over from a crash
)

// An outcome says how a request was answered, in the words of Squid's log.
type outcome string

const (
	fileHit           outcome = "TCP_HIT"
	memoryHit         outcome = "TCP_MEM_HIT"
	notModifiedHit    outcome = "TCP_IMS_HIT" // the client has it already
	miss              outcome = "TCP_MISS"
	clientRefresh     outcome = "TCP_CLIENT_REFRESH_MISS" // the client wanted it from the origin
	refreshModified   outcome = "TCP_REFRESH_MODIFIED"
	refreshUnmodified outcome = "TCP_REFRESH_UNMODIFIED"
	refreshFailed     outcome = "TCP_REFRESH_FAIL_OLD" // the origin failed: stale
)

// isHit reports whether no origin was asked.
func (o outcome) isHit() bool { return o == fileHit || o == memoryHit || o == notModifiedHit }

// A reason says in a word why the origin was asked (RFC 9211 §2.2), or why its
// answer is not stored (§2.8).
type reason string

// A CacheStatus tells a client how its request was answered (RFC 9211), as in
//
//	proxy; hit; ttl=376
//	proxy; fwd=uri-miss; fwd-status=200; stored
//	proxy; fwd=stale; fwd-status=200; detail=no-store
type CacheStatus struct {
	Outcome       outcome
	TTL           time.Duration // of a hit: for how long it is still fresh
	Forward       reason        // why the origin was asked
	ForwardStatus int           // what it answered
	Stored        bool
	Collapsed     bool   // another request had asked for it
	Detail        reason // why it is not stored
}

// String returns the value of the field Cache-Status.
func (s CacheStatus) String() string {
	if s.Outcome.isHit() && !s.Collapsed {
		return "proxy; hit; ttl=" + strconv.FormatInt(int64(s.TTL/time.Second), 10)
	}
	text := "proxy; fwd=" + string(s.Forward)
	if s.ForwardStatus != 0 {
		text += "; fwd-status=" + strconv.Itoa(s.ForwardStatus)
	}
	if s.Stored {
		text += "; stored"
	}
	if s.Collapsed {
		text += "; collapsed"
	}
	if s.Detail != "" {
		text += "; detail=" + string(s.Detail)
	}
	return text
}

// cacheControl returns the directives of Cache-Control as a header, with names
// in lower case and without quotes around arguments (RFC 9111 §5.2). Some
// origins write a semicolon between them.
func cacheControl(h Header) (directives Header) {
	for _, value := range h.Values("Cache-Control") {
		for _, directive := range appendList(nil, value, ';') {
			name, argument, _ := strings.Cut(directive, "=")
			directives = append(directives, Field{strings.ToLower(name), strings.Trim(argument, `"`)})
		}
	}
	return directives
}

// seconds reads a number of seconds, 0 if it is malformed (RFC 9111 §4.2.1).
func seconds(s string) time.Duration {
	n, _ := strconv.ParseUint(s, 10, 63) // too large a number is the largest
	return time.Duration(min(n, maxSeconds)) * time.Second
}

// wantsReload reports whether a request wants nothing that has been stored
// before (RFC 9111 §5.2.1.4, §5.4).
func wantsReload(h Header) bool {
	if h.Has("Cache-Control") {
		return cacheControl(h).Has("no-cache")
	}
	return containsFold(h.Values("Pragma"), "no-cache")
}

// storable reports whether a shared cache may store the response to a request
// (RFC 9111 §3), and whether that is of use, or else why not. It looks at the
// header as it was received: Connection can't hide a field from it.
//
// A response that sets a cookie is never stored, even where that is allowed:
// behind one address nobody can tell two people apart. Where no-cache="..." or
// private="..." names only some fields, it counts for all of them (§5.2.2).
func storable(req *Request, res *Response, config CacheConfig) (bool, reason) {
	h := res.Header
	directives := cacheControl(h)
	has := directives.Has
	understood := isHeuristic(res.Status)
	explicit := has("max-age") || has("s-maxage") || h.Has("Expires")
	shared := has("public") || has("must-revalidate") || has("s-maxage")
	personal := authenticatesConnection(req.Header, "Authorization") ||
		authenticatesConnection(h, "WWW-Authenticate")
	for _, rule := range []struct {
		why     reason
		forbids bool
	}{
		{"method", req.Method != "GET"},
		{"request-no-store", cacheControl(req.Header).Has("no-store")},
		{"no-store", has("no-store") && !(has("must-understand") && understood)},
		{"private", has("private")},
		{"set-cookie", h.Has("Set-Cookie")},
		{"vary", slices.ContainsFunc(h.Values("Vary"), isReserved.MatchString)},
		{"authorization", req.Has("Authorization") && !shared || personal},
		{"inner-address", isInner(res.Origin) && !config.shareInner},
		{"status", slices.Contains([]int{206, 304, 416}, res.Status)},
		{"status", has("must-understand") && !understood},
		{"no-freshness", !explicit && !understood && !has("public")},
		{"too-large", res.Length > config.limit || len(h) > maxFields-8}, // a file has some more
		{"no-freshness", lifetime(res, config.ttl) == 0 && !hasValidator(h)},
	} {
		if rule.forbids {
			return false, rule.why
		}
	}
	return true, ""
}

// What Vary can't select by: anything at all, and what has another meaning in a file.
var isReserved = regexp.MustCompile(`(?i)^(\*|Date|Generation|Inner)$`)

// isHeuristic reports whether responses with a status may be stored that do
// not tell how long they are fresh (RFC 9110 §15.1).
func isHeuristic(status int) bool {
	return slices.Contains([]int{200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501}, status)
}

// isSafe reports whether a method changes nothing on the origin (RFC 9110
// §9.2.1; RFC 4918 and RFC 3253 for those of WebDAV).
func isSafe(method string) bool {
	return slices.Contains([]string{"GET", "HEAD", "OPTIONS", "PROPFIND", "REPORT", "SEARCH"}, method)
}

// lifetime returns for how long a response is fresh (RFC 9111 §4.2.1). If it
// does not tell, that is a tenth of the time since its last change, a week at
// most (§4.2.2), and at least ttl.
func lifetime(res *Response, ttl time.Duration) time.Duration {
	directives := cacheControl(res.Header)
	date := httpDate(res.Get("Date"))
	changed := httpDate(res.Get("Last-Modified"))
	switch {
	case directives.Has("no-cache"):
		return 0
	case directives.Has("s-maxage"):
		return seconds(directives.Get("s-maxage"))
	case directives.Has("max-age"):
		return seconds(directives.Get("max-age"))
	case res.Has("Expires"):
		return max(0, httpDate(res.Get("Expires")).Sub(date))
	case !isHeuristic(res.Status) && !directives.Has("public"):
		return 0
	case changed.IsZero():
		return ttl
	}
	return max(ttl, min(date.Sub(changed)/10, 7*24*time.Hour))
}

// assess sets the fields of the entry that depend on time (RFC 9111 §4.2). It was
// born at its Date, which every response has by now, or Age seconds before it was
// asked for, whichever is earlier. If that lies in the future, the clock has been
// set back: then the age is unknown, and counts as infinite.
func (e *Entry) assess(ttl time.Duration, now time.Time) {
	e.born = httpDate(e.request.Get("Date"))
	if ages := e.Values("Age"); len(ages) > 0 {
		e.born = e.born.Add(-seconds(ages[0]))
	}
	if date := httpDate(e.Get("Date")); date.Before(e.born) {
		e.born = date
	}
	if e.born.After(now) {
		e.born = time.Time{}
	}
	e.lifetime = lifetime(&e.Response, ttl)
	e.mustRevalidate = slices.ContainsFunc(
		[]string{"s-maxage", "must-revalidate", "proxy-revalidate", "no-cache"},
		cacheControl(e.Header).Has)
	e.Header = e.Without("Age", "Content-Length") // which are told anew each time
}

// satisfies reports whether the entry may answer a request as it is, or else
// why not (RFC 9111 §4.2, §5.2.1). Its age is that at the time of the request:
// if it has come since then it is new enough, however long that took.
func (e *Entry) satisfies(h Header, asked time.Time) (bool, reason) {
	directives := cacheControl(h)
	age := asked.Sub(e.born)
	left := e.lifetime - age
	most := directives.Get("max-stale") // empty: however stale
	mayBeStale := directives.Has("max-stale") && !e.mustRevalidate &&
		(most == "" || -left < seconds(most))
	switch {
	case wantsReload(h),
		directives.Has("max-age") && age >= seconds(directives.Get("max-age")),
		directives.Has("min-fresh") && left < seconds(directives.Get("min-fresh")):
		return false, "request"
	case left > 0 || mayBeStale:
		return true, ""
	}
	return false, "stale"
}

// mayStandIn reports whether a stale entry may be used because the origin
// failed. It may if there was no answer at all, unless that is forbidden
// (RFC 9111 §4.2.4). For an error it must be allowed (RFC 5861 §4).
func (e *Entry) mayStandIn(h Header, res *Response, err error, now time.Time) bool {
	own := cacheControl(e.Header)
	allowed := max(seconds(own.Get("stale-if-error")), seconds(cacheControl(h).Get("stale-if-error")))
	briefly := now.Sub(e.born)-e.lifetime < allowed
	switch {
	case e.mustRevalidate, wantsReload(h), isStatusError(err):
		return false
	case err != nil: // there was no answer at all; what it allows is a limit for that, too
		return briefly || !own.Has("stale-if-error")
	}
	return briefly && slices.Contains([]int{500, 502, 503, 504}, res.Status)
}

// selectingFields returns the request fields that Vary names, in one spelling
// for what means the same: lines joined, no space around commas, languages
// and codings in any case and order (RFC 9111 §4.1).
func selectingFields(stored, req Header) (selecting Header) {
	for _, name := range stored.Values("Vary") {
		if selecting.Has(name) || !req.Has(name) {
			continue // a long field that was joined each time that it is named took minutes
		}
		elements := req.Values(name)
		value := strings.Join(elements, ",")
		if equalFold(name, "Accept-Language") || equalFold(name, "Accept-Encoding") {
			elements = strings.Split(strings.ToLower(strings.ReplaceAll(value, " ", "")), ",")
			slices.Sort(elements)
			value = strings.Join(elements, ",")
		}
		selecting = append(selecting, Field{strings.ToLower(name), value})
	}
	return selecting
}

// selectedBy reports whether a request selects this one among the variants of
// its URL.
func (e *Entry) selectedBy(req Header) bool {
	return slices.Equal(selectingFields(e.Header, e.request), selectingFields(e.Header, req))
}

// hasValidator reports whether an origin can be asked if what has such a header
// is still good (RFC 9110 §8.8).
func hasValidator(h Header) bool { return h.Has("ETag") || h.Has("Last-Modified") }

// withValidators returns the header of a request that asks whether what is
// stored is still good, in place of the client's own conditions (RFC 9111
// §4.3.1).
func withValidators(h, stored Header) Header {
	h = h.Without("If-None-Match", "If-Modified-Since")
	for _, f := range stored {
		switch {
		case equalFold(f.Name, "ETag"):
			h = append(h, Field{"If-None-Match", f.Value})
		case equalFold(f.Name, "Last-Modified"):
			h = append(h, Field{"If-Modified-Since", f.Value})
		}
	}
	return h
}

// updated returns the stored header after a 304, whose fields take the place
// of the stored ones, but for those that describe the body as it is stored
// (RFC 9111 §3.2), and cookies.
func updated(stored, validation Header) Header {
	newer := validation.endToEnd("Content-Encoding", "Content-Range", "Set-Cookie")
	kept := slices.DeleteFunc(slices.Clone(stored), func(f Field) bool { return newer.Has(f.Name) })
	return append(kept, newer...)
}

// sameRepresentation reports whether a 304 is about what is stored (RFC 9111
// §4.3.4): by its entity tag, weak or not, or else by its date of change, if it
// has either.
func sameRepresentation(stored, validation Header) bool {
	theirs, ours := validation.Get("ETag"), stored.Get("ETag")
	if theirs != "" && ours != "" {
		return strings.TrimPrefix(theirs, "W/") == strings.TrimPrefix(ours, "W/")
	}
	changed := validation.Get("Last-Modified")
	return changed == "" || changed == stored.Get("Last-Modified")
}

// tailor makes a whole response, whose body can seek, the answer to a request:
// 304 if the client has it already (RFC 9110 §13.2.2), one range of it (§14), or
// all. Who sends that takes no more than Length bytes from the body.
func tailor(res *Response, req *Request) {
	status, off, n := res.Status, int64(0), res.Length
	if res.Status == 200 && notModified(req.Header, res.Header) {
		status, n = 304, 0
	} else if res.Status == 200 && req.Method == "GET" && req.Has("Range") && n >= 0 {
		status, off, n = byteRange(req.Header, res.Header, n)
	}
	switch status {
	case res.Status:
		return
	case 206:
		extent := fmt.Sprintf("bytes %d-%d/%d", off, off+n-1, res.Length)
		res.Header = append(res.Header, Field{"Content-Range", extent})
		res.Body.(io.Seeker).Seek(off, io.SeekStart)
	case 416:
		res.Header = append(res.Header, Field{"Content-Range", fmt.Sprintf("bytes */%d", res.Length)})
	}
	res.Status, res.Reason, res.Length = status, statusText[status], n
	if memory, ok := res.Body.(memoryBody); ok { // which would write itself to its end
		res.Body = io.NopCloser(io.LimitReader(memory, n))
	}
}

// notModified reports whether a condition of the request says that the client
// has the stored response already (RFC 9110 §13.2.2).
func notModified(req, stored Header) bool {
	if tags := req.Values("If-None-Match"); len(tags) > 0 {
		tag := strings.TrimPrefix(stored.Get("ETag"), "W/")
		return slices.ContainsFunc(tags, func(t string) bool {
			return t == "*" || tag != "" && strings.TrimPrefix(t, "W/") == tag
		})
	}
	since := httpDate(req.Get("If-Modified-Since"))
	if since.IsZero() {
		return false
	}
	changed := httpDate(cmp.Or(stored.Get("Last-Modified"), stored.Get("Date")))
	return !changed.IsZero() && !changed.After(since)
}

var rangePattern = regexp.MustCompile(`^bytes=(\d*)-(\d*)$`)

// byteRange returns which n bytes of a body, from off on, a request wants:
// with status 206, or 416 if there are none, or 200 if it wants all of them
// (RFC 9110 §14). What is malformed counts as none, and so does a range of
// another representation: If-Range has to be the strong tag of this one, or
// the very date of its last change (§13.1.5).
func byteRange(req, stored Header, size int64) (status int, off, n int64) {
	wanted := rangePattern.FindStringSubmatch(req.Get("Range"))
	condition := req.Get("If-Range")
	same := condition == "" || condition == stored.Get("Last-Modified") ||
		condition == stored.Get("ETag") && condition[0] == '"'
	if wanted == nil || wanted[1]+wanted[2] == "" || !same {
		return 200, 0, size
	}
	first, _ := strconv.ParseInt(wanted[1], 10, 64) // too large a number is the largest
	last, _ := strconv.ParseInt(wanted[2], 10, 64)
	switch {
	case wanted[1] == "": // the last bytes
		first, last = max(0, size-last), size
	case wanted[2] == "": // all from there on
		last = max(first, size)
	}
	switch {
	case last < first:
		return 200, 0, size
	case first >= size:
		return 416, 0, 0
	}
	return 206, first, min(last, size-1) + 1 - first
}

const dateFormat = "Mon, 02 Jan 2006 15:04:05 GMT"

// httpDate reads a date in one of the three formats (RFC 9110 §5.6.7), strictly
// but for case and the name of the day. What is none is the zero time.
func httpDate(s string) time.Time {
	if s == "" {
		return time.Time{}
	}
	if t, err := time.Parse(dateFormat, s); err == nil && len(s) == len(dateFormat) {
		return t // the usual case, at half the price
	}
	s = strings.ToUpper(s[max(0, strings.IndexAny(s, ", ")):]) // without the name of the day
	for _, layout := range []string{
		dateFormat[3:], ", 02-Jan-06 15:04:05 GMT", " Jan _2 15:04:05 2006"} {
		t, err := time.Parse(layout, s)
		if err == nil && strings.EqualFold(t.Format(layout), s) {
			return t
		}
	}
	return time.Time{}
}

// dateField returns a field that tells a time, such as Date or Last-Modified.
func dateField(name string, t time.Time) Field { return Field{name, t.UTC().Format(dateFormat)} }

// temporary begins the name of a file that is not whole.
const temporary = "+download-"

const hexDigits = "0123456789abcdef"

// fileName returns the name of the file for a URL without its scheme. "/" becomes
// "_", as in the lab; upper case, "_" and most else is escaped. So no two URLs
// share a file on any system, and no name is hidden, ends in a dot, or is that of
// a device on Windows. What is too long is cut, and ends in a hash.
func fileName(url string) string {
	stem, _, _ := strings.Cut(url, ".")
	devices := []string{"con", "prn", "aux", "nul", "com", "lpt"} // and com1 and the like
	device := len(stem) <= 4 && slices.Contains(devices, stem[:min(len(stem), 3)])
	name := make([]byte, 0, 200)
	for i, b := range []byte(url[:min(len(url), maxName+1)]) { // more would be cut anyway
		atEnd := i == 0 || i == len(url)-1
		plain := 'a' <= b && b <= 'z' || '0' <= b && b <= '9' || b == '-' || b == '.' && !atEnd
		switch {
		case b == '/':
			name = append(name, '_')
		case plain && !(device && i == 0):
			name = append(name, b)
		default:
			name = append(name, '%', hexDigits[b>>4], hexDigits[b&15]) // Appendf takes a µs
		}
	}
	if len(name) > maxName {
		hash := sha256.Sum256([]byte(url))
		name = fmt.Appendf(name[:120], "+%x", hash[:16])
	}
	return string(name)
}

// The end of the head of a file, with room for a length that is not known yet.
const (
	lengthFormat = "%20d\r\n\r\n"
	lengthBytes  = 24
)

// A file is a transcript. The length of this one is known: the body is whole.
//
//	GET http://example.com/logo.png HTTP/1.1
//	Date: Sun, 22 Nov 2026 06:00:00 GMT         when we asked
//	accept-encoding: gzip                       what Vary selects by
//	Generation: 4ZGEW2TQ...                     see lookup
//	Inner: 127.0.0.1                            the origin, if its address is an inner one
//
//	HTTP/1.1 200 OK
//	Content-Type: image/png
//	Vary: Accept-Encoding
//	Content-Length:                 4711
//
//	...the body...
//
// transcript returns what stands in front of the body in a file.
func (e *Entry) transcript(url URL) []byte {
	b := []byte("GET " + url.String() + " HTTP/1.1\r\n")
	b = append(e.request.appendTo(b), "\r\nHTTP/1.1 "+strconv.Itoa(e.Status)+" "+e.Reason+"\r\n"...)
	return fmt.Appendf(e.Header.appendTo(b), "Content-Length: "+lengthFormat, e.Length)
}

// Files are opened so that a pipe among them can't hold us up. This also spares
// four system calls for each file that is made: package os does not try to
// register it with the poller.
const openFlags = syscall.O_NONBLOCK

// A cacheFile is a file that is being written. It keeps what it could not
// write, so that nothing is lost.
type cacheFile struct {
	*os.File
	root    *os.Root
	name    string
	start   int64  // where the body begins
	room    int64  // bytes that it may still take
	refused []byte // the piece of the body that it did not take
}

var errTooLarge = errors.New("more than the cache may hold")

// create makes a new file for an entry, and writes all that stands in front of
// the body. If somebody has removed the directory, it makes that anew.
func (c *Cache) create(url URL, e *Entry) (f *cacheFile, err error) {
	head := e.transcript(url)
	f = &cacheFile{name: temporary + rand.Text(), start: int64(len(head))}
	f.room = c.limit - f.start
	for range 2 {
		f.root = c.root.Load()
		f.File, err = f.root.OpenFile(f.name, openFlags|os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if !errors.Is(err, fs.ErrNotExist) || c.openRoot() != nil {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	if _, err = f.File.Write(head); err != nil {
		f.Close()
		f.root.Remove(f.name)
	}
	return f, err
}

// Write writes a piece of the body, as far as there is room.
func (f *cacheFile) Write(p []byte) (n int, err error) {
	err = errTooLarge
	if int64(len(p)) <= f.room {
		n, err = f.File.Write(p)
	}
	f.room -= int64(n)
	if err != nil {
		f.refused = bytes.Clone(p[n:])
	}
	return n, err
}

// readEntry reads a file, but not the body. It returns nil if the file is not
// whole, or none of ours, or that of another URL.
func readEntry(root *os.Root, name string) *Entry {
	file, err := root.OpenFile(name, openFlags|os.O_RDONLY, 0)
	if err != nil {
		return nil
	}
	info, noInfo := file.Stat()
	req, res, start, err := readTranscript(bufio.NewReader(file))
	length, noLength := strconv.ParseInt(res.Get("Content-Length"), 10, 64)
	own, _, _ := strings.Cut(name, "~") // but for the variant
	if cmp.Or(noInfo, err, noLength) != nil || !info.Mode().IsRegular() ||
		start+length != info.Size() || own != fileName(strings.TrimPrefix(req.Target, "http://")) {
		file.Close()
		return nil
	}
	res.Length = length
	res.Body = newFileBody(file, start, length)
	return &Entry{
		Response: *res,
		request:  req.Header,
		weight:   info.Size(),
		used:     info.ModTime(),
		hit:      fileHit,
	}
}

// newCache opens the directory, and makes sure that it can be written to.
func newCache(config CacheConfig) (*Cache, error) {
	c := &Cache{
		CacheConfig: config,
		downloads:   map[string]*download{},
		unshared:    map[string]time.Time{},
		oversized:   map[string]time.Time{},
		misses:      map[string]int{},
	}
	if err := c.openRoot(); err != nil {
		return nil, err
	}
	file, err := c.create(URL{}, &Entry{})
	if errors.Is(err, syscall.ENOSPC) {
		return c, nil // room is made as soon as it is needed
	}
	if err != nil {
		return nil, err
	}
	file.root.Remove(file.name)
	return c, file.Close()
}

// openRoot opens the directory. It stays open, which spares system calls for each
// file. On Windows a file that is opened by its path alone could not be renamed
// before it is closed.
func (c *Cache) openRoot() error {
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return err
	}
	root, err := os.OpenRoot(c.dir)
	if err == nil {
		c.root.Store(root)
		go c.guard(func() { c.trim(false) }) // counts what is there
	}
	return err
}

// reopen opens the directory anew if another one has taken its place.
func (c *Cache) reopen() {
	there, err := os.Stat(c.dir)
	here, gone := c.root.Load().Stat(".")
	if err == nil && (gone != nil || !os.SameFile(here, there)) {
		c.openRoot()
	}
}

// usage returns how many files and bytes the directory holds.
func (c *Cache) usage() (files, bytes int64) { return c.files.Load(), c.size.Load() }

// trim counts the files. If they have more bytes than the limit, it removes those
// that were used least recently; if the disk is full, a quarter of them. It also
// removes what a crash has left unfinished. Files that are not the cache's own
// are neither counted nor removed.
func (c *Cache) trim(full bool) {
	c.trimming.Lock()
	defer c.trimming.Unlock()
	c.files.Store(0) // what is stored meanwhile may count twice, but not be missed
	c.size.Store(0)
	root := c.root.Load()
	entries, _ := fs.ReadDir(root.FS(), ".")
	var files []fs.FileInfo
	size := int64(0)
	for _, entry := range entries {
		name := entry.Name()
		info, err := entry.Info()
		stray := strings.HasPrefix(name, temporary)
		switch {
		case err != nil: // it has just been removed
		case stray && c.now().Sub(info.ModTime()) > strayWait:
			root.Remove(name)
		case !stray && strings.ContainsAny(name[1:], "_+"): // the first slash of a URL, or a cut
			files = append(files, info)
			size += info.Size()
		}
	}
	if full || size > c.limit { // then it is worth opening each to see whose it is
		files = slices.DeleteFunc(files, func(info fs.FileInfo) bool {
			e := readEntry(root, info.Name())
			if e == nil {
				size -= info.Size()
				return true
			}
			e.Body.Close()
			return false
		})
	}
	enough := c.limit
	if full {
		enough = min(size, c.limit) / 4 * 3
	} else if size > c.limit {
		enough -= c.limit / 16 // so that it does not begin again at once
	}
	slices.SortFunc(files, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	for len(files) > 0 && size > enough {
		root.Remove(files[0].Name())
		size -= files[0].Size()
		files = files[1:]
	}
	c.files.Add(int64(len(files)))
	c.size.Add(size)
}
