// The page: asks for its data once a second while it is seen, and shows what has changed.

import { ago, ahead, count, make, plural, show, tell, tick } from "./elements.js";
import { Plot } from "./plot.js";
import { parseExactly, showFound } from "./sheet.js";
import { Tail } from "./tail.js";

const SECOND = 1000;
const ANSWER_SECONDS = 8;
const LOST_FORWARDER_SECONDS = 60;

const find = (id) => document.getElementById(id);
const state = { command: "productgraph", failures: new Map(), shown: new Map() };

// Asking

async function ask(path, signal) {
  const timeout = AbortSignal.timeout(ANSWER_SECONDS * SECOND);
  const signals = signal ? AbortSignal.any([timeout, signal]) : timeout;
  const answer = await fetch(path, { headers: { Accept: "application/json" }, signal: signals });
  const body = await answer.text();
  if (!answer.ok) throw new Failure(answer.status, body);
  return body;
}

class Failure extends Error {
  constructor(status, body) {
    let text = body;
    try {
      text = JSON.parse(body).error;
    } catch {
      // the text is all there is
    }
    super(text);
    this.status = status;
  }
}

/** Wait for some seconds, or until a signal ends the wait. */
function sleep(seconds, signal) {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(end, seconds * SECOND);
    signal?.addEventListener("abort", end);
  });
}

function untilSeen() {
  if (!document.hidden) return null;
  return new Promise((resolve) =>
    document.addEventListener("visibilitychange", resolve, { once: true }));
}

/** Ask again and again, and hand on each answer that differs from the one before. */
async function poll(path, seconds, render) {
  for (;;) {
    await untilSeen();
    try {
      const body = await ask(path);
      if (state.shown.get(path) !== body) render(JSON.parse(body));
      state.shown.set(path, body);
      recover(path);
    } catch (error) {
      fail(path, error);
    }
    await sleep(seconds);
  }
}

// Failing

function fail(path, error) {
  const begun = state.failures.get(path)?.begun ?? new Date();
  const text = error instanceof Failure ? error.message : "the service does not answer";
  state.failures.set(path, { begun, text });
  notify();
}

function recover(path) {
  if (state.failures.delete(path)) notify();
}

function notify() {
  const [first] = [...state.failures.values()].sort((one, other) => one.begun - other.begun);
  const notice = find("notice");
  notice.hidden = !first;
  document.body.classList.toggle("stale", Boolean(first));
  const text = first ? `What is shown is from ${tell(first.begun)}: ${first.text}.` : "";
  if (notice.textContent !== text) notice.textContent = text;
}

// The service

const plot = new Plot(find("plot"), find("legend"));

function showOverview({ service, throughput, providers }) {
  state.command = service.command;
  plot.update(throughput);
  const { workers, is_database_up: isUp } = service;
  show(
    find("state"),
    make("li", { class: isUp ? "good" : "bad" }, isUp ? "database answers" : "database is down"),
    make("li", { class: workers ? "good" : "bad" }, plural(workers, "worker", "workers")),
    make("li", {}, `version ${service.version}`),
    make("li", {}, "started ", ago(service.started_at)),
  );
  state.keepsRejected = service.keeps_rejected;
  showIfChanged("lanes", providers, () => showProviders(providers));
}

function showIfChanged(name, value, render) {
  const text = JSON.stringify(value);
  if (state.shown.get(name) === text) return;
  state.shown.set(name, text);
  render();
}

function showProviders(lanes) {
  const rows = lanes?.map(describeLane) ?? [];
  const known = lanes ? "No provider is enabled." : "Not known: the database does not answer.";
  show(find("lanes"), ...(rows.length ? rows : [make("li", { class: "plain" }, known)]));
}

function describeLane(lane) {
  const [kind, word] = judge(lane);
  const trouble = lane.stopped_reason ?? lane.last_error;
  return make(
    "li",
    {},
    make("div", { class: "row" }, make("b", {}, lane.provider),
      make("span", { class: `chip ${kind}` }, word)),
    make("p", { class: "facts-line" },
      make("span", {}, make("b", {}, count(lane.pending)), " waiting"),
      lane.oldest_at ? make("span", {}, "oldest ", ago(lane.oldest_at)) : null,
      make("span", {}, `${count(lane.delivered)} delivered`),
      make("span", { class: lane.dead ? "bad" : null }, `${count(lane.dead)} dead`)),
    kind === "good" || !trouble ? null : make("p", { class: "reason" }, trouble),
    kind === "good" || !lane.next_try_at ? null
      : make("p", { class: "facts-line" }, make("span", {}, "next try ", ahead(lane.next_try_at))),
  );
}

function judge(lane) {
  if (lane.stopped_reason) return ["bad", "stopped"];
  const silence = (Date.now() - new Date(lane.seen_at ?? 0)) / SECOND;
  if (lane.pending && silence > LOST_FORWARDER_SECONDS) return ["bad", "no forwarder"];
  if (lane.failing_since) return ["bad", "failing"];
  return lane.enabled ? ["good", "forwarding"] : ["", "not enabled here"];
}

// Rejected events

function showRejected({ groups, of_newest: newest }) {
  const sum = groups.reduce((total, group) => total + group.count, 0);
  const some = sum >= newest ? `the newest ${count(newest)}` : count(sum);
  find("rejected-note").textContent = sum ? `${some} kept, by reason` : "";
  const none = state.keepsRejected === false
    ? "Rejected events are not kept: REJECTED_KEEP is off." : "None: every event was accepted.";
  show(find("reasons"), ...(groups.length ? groups.map(describeGroup)
    : [make("li", { class: "plain" }, none)]));
  const [first] = groups;
  show(find("replay"), first ? make("details", {},
    make("summary", { id: "how" }, "How to replay them"),
    make("p", {}, "Once the cause is mended, in the service or in the key's project:"),
    ...[`replay ${first.newest_ids[0]}`, `replay --project ${quote(first.projects[0])} --all`,
      "list"].map((rest) => make("code", {}, `${state.command} rejected ${rest}`))) : null);
}

const quote = (name) => (/^[\w.-]+$/.test(name) ? name : `'${name.replaceAll("'", "'\\''")}'`);

function describeGroup(group) {
  const examples = group.newest_ids.flatMap((id) => [
    " ", make("a", { href: `/rejected/${id}` }, `#${id}`)]);
  const projects = group.projects.length < 5 ? group.projects.join(", ") : "5 projects or more";
  return make(
    "li",
    {},
    make("div", { class: "row" }, make("b", { class: "bad" }, count(group.count)),
      make("p", { class: "reason" }, group.reason)),
    make("p", { class: "facts-line" }, make("span", {}, projects),
      make("span", {}, "last ", ago(group.last_at)), make("span", {}, "see", ...examples)),
  );
}

// Usage

function showUsage({ days, events, count: all, projects }) {
  const period = days === 1 ? "today" : `the last ${days} days`;
  const some = all > projects.length ? `, ${count(projects.length)} of ${count(all)} projects` : "";
  find("usage-note").textContent = days ? `${count(events)} events of ${period}${some}` : "";
  const rows = projects.map((each) => make(
    "li",
    {},
    make("div", { class: "row" }, make("b", {}, each.project),
      make("span", {}, count(each.events))),
    days > 1 ? make("p", { class: "facts-line" },
      make("span", {}, `${count(each.today)} today, by their own time in UTC`)) : null,
  ));
  const none = days ? "No event." : "Not known: there are too many events to count in time.";
  show(find("usage-list"), ...(rows.length ? rows : [make("li", { class: "plain" }, none)]));
}

// Keys

function showKeys({ keys, count: all, ending }) {
  const notes = [all > keys.length ? `${count(keys.length)} of ${count(all)}` : null,
    ending ? `${count(ending)} about to expire` : null];
  find("keys-note").textContent = notes.filter(Boolean).join(", ");
  const rows = keys.map((key) => make(
    "li",
    {},
    make("div", { class: "row" }, make("b", {}, key.project_id),
      make("span", { class: "muted" }, `${key.name ? `${key.name}, ` : ""}number ${key.id}`)),
    make("p", { class: "facts-line" },
      key.last_used_at ? make("span", {}, "used ", ago(key.last_used_at))
        : make("span", {}, "never used"),
      key.ends_at ? make("span", { class: key.is_ending ? "bad" : null },
        key.retires_at ? "replaced, ends " : "expires ", ahead(key.ends_at)) : null,
      make("span", {}, tellLimits(key)),
      key.origins ? make("span", {}, `only from ${key.origins.join(", ")}`) : null),
  ));
  show(find("key-list"), ...(rows.length ? rows
    : [make("li", { class: "plain" }, "No key. Make one: ",
      make("code", {}, `${state.command} keys create --project NAME`))]));
}

function tellLimits({ event_rate: events, byte_rate: bytes }) {
  const tellRate = (rate, unit) =>
    rate == null ? null : rate === 0 ? `any ${unit} a second` : `${count(rate)} ${unit} a second`;
  const limits = [tellRate(events, "events"), tellRate(bytes, "bytes")].filter(Boolean);
  return limits.length ? limits.join(", ") : "usual limits";
}

// Events

const tail = new Tail(find("tail"));
const filters = find("filters");
let restart = new AbortController();

function readFilters() {
  const named = [...new FormData(filters)].map(([name, text]) => [name, text.trim()]);
  return new URLSearchParams(named.filter(([, text]) => text));
}

async function follow() {
  for (;;) {
    const { signal } = (restart = new AbortController());
    tail.clear();
    find("events-note").textContent = "";
    await followUntil(signal);
  }
}

async function followUntil(signal) {
  let since = null;
  while (!signal.aborted) {
    await untilSeen();
    if (find("pause").ariaPressed !== "true") since = await askForEvents(since, signal);
    await sleep(1, signal);
  }
}

async function askForEvents(since, signal) {
  const wanted = readFilters();
  if (since) wanted.set("since", since);
  try {
    const found = JSON.parse(await ask(`/events?${wanted}`, signal));
    if (signal.aborted) return since;
    tail.add(found.events);
    suggestTypes(found.events);
    describeTail(found, since);
    recover("/events");
    return found.follow;
  } catch (error) {
    if (!signal.aborted) fail("/events", error);
    return since;
  }
}

function describeTail(found, since) {
  const isEmpty = !find("tail").childElementCount;
  if (since && !isEmpty) find("events-note").textContent = "";
  if (!since && isEmpty) {
    find("events-note").textContent = `None since ${tell(found.seen_since)}.`;
  }
}

function suggestTypes(events) {
  const list = find("types");
  const known = new Set([...list.options].map((option) => option.value));
  for (const type of new Set(events.map((event) => event["event.type"]))) {
    if (!known.has(type)) list.append(make("option", { value: type }));
  }
}

function changeFilters() {
  const query = String(readFilters());
  filters.querySelector("button").hidden = !query;
  history.replaceState(history.state, "", query ? `/?${query}` : "/");
  restart.abort();
}

function pause() {
  const button = find("pause");
  const isPaused = button.ariaPressed !== "true";
  button.ariaPressed = String(isPaused);
  button.textContent = isPaused ? "Resume" : "Pause";
}

// One event

const sheet = find("sheet");

async function open(path) {
  const place = find("found");
  show(place, make("p", { class: "plain" }, "Looking …"));
  if (!sheet.open) sheet.showModal();
  try {
    const body = await ask(path);
    if (isShown(path)) showFound(place, parseExactly(body), state.command);
  } catch (error) {
    if (isShown(path)) showAbsence(path, error);
  }
}

const isShown = (path) => sheet.open && location.pathname + location.search === path;

function showAbsence(path, error) {
  const [place, query] = path.split("?");
  const wanted = new URLSearchParams(query);
  const days = Number(wanted.get("days") ?? 7);
  wanted.set("days", String(days < 90 ? 90 : 36500));
  const canGoOn = error instanceof Failure && place === "/event" && days < 36500;
  const text = error instanceof Failure ? error.message : "The service does not answer";
  show(find("found"),
    make("p", { class: "plain" }, `${text}.`),
    canGoOn ? make("p", {}, make("a", { href: `${place}?${wanted}` },
      days < 90 ? "Look through the last 90 days" : "Look through all")) : null);
}

function go(path) {
  history.pushState({ isOurs: true }, "", path);
  open(path);
}

function close() {
  if (history.state?.isOurs) history.back();
  else {
    history.pushState(null, "", "/");
    route();
  }
}

/** Show what the address says. */
function route() {
  const path = location.pathname + location.search;
  if (location.pathname === "/event" || /^\/rejected\/\d+$/.test(location.pathname)) open(path);
  else if (sheet.open) sheet.close();
}

function followLink(event) {
  const link = event.target.closest("a[href]");
  const isPlain = event.button === 0 && !(event.ctrlKey || event.metaKey || event.shiftKey);
  if (!link || !isPlain || !/^\/(event\?|rejected\/)/.test(link.getAttribute("href"))) return;
  event.preventDefault();
  go(link.getAttribute("href"));
}

function searchFor(event) {
  event.preventDefault();
  const id = new FormData(event.target).get("id").trim();
  if (id) go(`/event?${new URLSearchParams({ id })}`);
}

function pressKey(event) {
  const isTyping = /^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName);
  if (isTyping || sheet.open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") {
    event.preventDefault();
    find("search").elements.id.focus();
  }
  if (event.key === "p") pause();
}

function start() {
  for (const [name, text] of new URLSearchParams(location.search)) {
    if (location.pathname === "/" && filters.elements[name]) filters.elements[name].value = text;
  }
  filters.querySelector("button").hidden = !String(readFilters());
  let typing;
  filters.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(changeFilters, 300);
  });
  filters.addEventListener("reset", () => setTimeout(changeFilters));
  filters.addEventListener("submit", (event) => event.preventDefault());
  find("search").addEventListener("submit", searchFor);
  find("pause").addEventListener("click", pause);
  find("close").addEventListener("click", close);
  sheet.addEventListener("cancel", (event) => {
    event.preventDefault();
    close();
  });
  sheet.addEventListener("click", (event) => event.target === sheet && close());
  document.addEventListener("click", followLink);
  document.addEventListener("keydown", pressKey);
  window.addEventListener("popstate", route);
  setInterval(tick, SECOND);
  poll("/", 1, showOverview);
  poll("/rejected", 1, showRejected);
  poll("/usage", 30, showUsage);
  poll("/keys", 5, showKeys);
  follow();
  route();
}

start();
