// Sends a page's events to ProductGraph. Each is kept in localStorage until it is answered, so that
// the next visit sends what this one could not. Sending one twice is harmless: its id stays.
const CHUNK_BYTES = 60_000; // browsers let 64 KiB be on the way when a page is left
const CHUNK_EVENTS = 1_000; // the service's limit
const KEPT_EVENTS = 5_000; // localStorage holds about 5 MB
const PATIENCE_MS = 2_000; // how long an event waits for others
const LONGEST_WAIT_MS = 60_000;

class EventSender {
  #url; #headers; #project; #prefix; #report; #timer;
  #session = makeId("sess");
  #queue = new Map(); // the JSON of unanswered events by their ids
  #failures = 0; // since the last answer
  #sending = false;
  #stopped = false;

  // `report` is called with a text and an event that is lost, or with a text alone.
  constructor({ url, key, project, report = console.warn }) {
    this.#url = url;
    this.#headers = { "Content-Type": "application/json", "X-PG-API-Key": key };
    this.#project = project;
    this.#prefix = `productgraph:${project}:`;
    this.#report = report;
    addEventListener("online", () => this.#schedule(0));
    document.addEventListener("visibilitychange", () => {
      if (document.visibilityState === "hidden") this.#leave();
    });
    this.#adopt();
  }

  // Queue an event, such as send("page.view", { "page.path": "/products" }).
  send(type, fields = {}) {
    const id = makeId("evt");
    const event = {
      event_id: id,
      project_id: this.#project,
      "session.id": this.#session,
      "event.type": type,
      "event.timestamp": new Date().toISOString(),
      ...fields,
    };
    if (this.#queue.size >= KEPT_EVENTS) return this.#report("too many events wait", event);
    const json = JSON.stringify(event);
    this.#queue.set(id, { json, bytes: new Blob([json]).size + 1, kept: this.#keep(id, json) });
    if (this.#queue.size >= CHUNK_EVENTS && !this.#failures) this.#schedule(0);
    else this.#timer ??= setTimeout(() => this.#flush(), PATIENCE_MS);
  }

  #keep(id, json) {
    try {
      localStorage.setItem(this.#prefix + id, json);
      return true;
    } catch {
      return false; // full or forbidden: it is kept as long as the page is there
    }
  }

  // Take over what earlier visits have left, and what other tabs are about to send.
  #adopt() {
    try {
      for (const name of Object.keys(localStorage)) {
        if (!name.startsWith(this.#prefix)) continue;
        const json = localStorage.getItem(name);
        const entry = { json, bytes: new Blob([json]).size + 1, kept: true };
        if (json) this.#queue.set(name.slice(this.#prefix.length), entry);
      }
    } catch {
      return; // forbidden
    }
    if (this.#queue.size) this.#schedule(0);
  }

  #schedule(milliseconds) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#flush(), milliseconds);
  }

  async #flush() {
    this.#timer = undefined;
    if (this.#sending || this.#stopped) return;
    this.#sending = true;
    try {
      for (let chunk; (chunk = this.#take()).length; ) if (!(await this.#post(chunk))) break;
    } finally {
      this.#sending = false;
    }
  }

  // The page may be gone in a moment: only a request with `keepalive` outlives it.
  #leave() {
    const chunk = this.#stopped || this.#failures ? [] : this.#take();
    if (chunk.length) this.#post(chunk, true);
  }

  #take() {
    const chunk = [];
    let bytes = 0;
    for (const [id, entry] of this.#queue) {
      if (entry.kept && !localStorage.getItem(this.#prefix + id)) {
        this.#queue.delete(id); // another tab has sent it
        continue;
      }
      bytes += entry.bytes;
      if (chunk.length && (bytes > CHUNK_BYTES - 20 || chunk.length === CHUNK_EVENTS)) break;
      chunk.push({ id, ...entry });
    }
    return chunk;
  }

  // Send a chunk; return whether the next may follow at once.
  async #post(chunk, keepalive = false) {
    let answer, outcome;
    try {
      answer = await fetch(this.#url, {
        method: "POST",
        headers: this.#headers,
        body: `{"events":[${chunk.map((entry) => entry.json).join()}]}`,
        keepalive,
        signal: AbortSignal.timeout(30_000),
      });
      outcome = await answer.json();
    } catch {
      return this.#retry(0); // offline, or cut off
    }
    if (answer.status === 202) {
      for (const { index, error } of outcome.errors) this.#lose(error, chunk[index]);
      return this.#finish(chunk);
    }
    if (answer.status === 429 || answer.status >= 500)
      return this.#retry(1_000 * answer.headers.get("Retry-After") || 0);
    if (answer.status === 400) {
      if (chunk.length === 1) {
        this.#lose(outcome.error, chunk[0]);
        return this.#finish(chunk);
      }
      const half = chunk.length >> 1; // what spoils the request is in one of them
      return (
        (await this.#post(chunk.slice(0, half), keepalive)) &&
        (await this.#post(chunk.slice(half), keepalive))
      );
    }
    this.#stopped = true; // 401, 403 …: only a page with another key can send what is kept
    this.#report(`${answer.status}: ${outcome.error}`);
    return false;
  }

  #lose(text, { id, json, kept }) {
    const isOurs = !kept || localStorage.getItem(this.#prefix + id); // else it has been reported
    if (isOurs && this.#queue.has(id)) this.#report(text, JSON.parse(json));
  }

  #finish(chunk) {
    for (const { id, kept } of chunk) {
      this.#queue.delete(id);
      if (kept) localStorage.removeItem(this.#prefix + id);
    }
    this.#failures = 0;
    return true;
  }

  #retry(milliseconds) {
    const backoff = Math.min(1_000 * 2 ** this.#failures++, LONGEST_WAIT_MS);
    this.#schedule(Math.max(milliseconds, backoff) * (1 + Math.random() / 2));
    return false;
  }
}

function makeId(prefix) {
  const words = crypto.getRandomValues(new Uint32Array(4));
  return `${prefix}-${Array.from(words, (word) => word.toString(36)).join("")}`;
}
