// Elements are made of texts, never of markup: whatever an event holds stays a text.

/** Make an element with these attributes and children; a child may be a text. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** Show other children in an element; what has the focus keeps it. */
export function show(element, ...children) {
  const focused = element.contains(document.activeElement) && document.activeElement;
  const name = focused && (focused.id || focused.getAttribute("href"));
  element.replaceChildren(...children.filter((child) => child != null));
  if (!name) return;
  const same = [...element.querySelectorAll("a, button, summary")].find(
    (each) => (each.id || each.getAttribute("href")) === name,
  );
  same?.focus({ preventScroll: true });
}

const numbers = new Intl.NumberFormat("en");
const clock = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const day = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

export const count = (number) => numbers.format(number);
export const plural = (number, one, many) => `${count(number)} ${number === 1 ? one : many}`;

/** Return a time of today as hours, any other with its day. */
export function tell(moment) {
  const time = new Date(moment);
  return (time.toDateString() === new Date().toDateString() ? clock : day).format(time);
}

const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];

/** Return how long it is in one unit. */
export function duration(seconds) {
  const [size, name] = UNITS.find(([each]) => seconds >= each) ?? UNITS[3];
  return `${Math.max(0, Math.floor(seconds / size))} ${name}`;
}

/** Make a time that is told from now, and kept true by `tick`. */
export function ago(moment) {
  return makeTime(moment, "past");
}

/** Make the time of something that is to come: once it is due, it is so now. */
export function ahead(moment) {
  return makeTime(moment, "due");
}

function makeTime(moment, kind) {
  const title = day.format(new Date(moment));
  const element = make("time", { datetime: moment, title, "data-kind": kind });
  element.textContent = fromNow(element);
  return element;
}

function fromNow({ dateTime, dataset }) {
  const seconds = (Date.now() - new Date(dateTime)) / 1000;
  if (seconds < -1) return `in ${duration(-seconds)}`;
  return seconds < 1 || dataset.kind === "due" ? "now" : `${duration(seconds)} ago`;
}

/** Tell all times that are told from now anew. */
export function tick() {
  for (const element of document.querySelectorAll("time[data-kind]")) {
    const text = fromNow(element);
    if (element.textContent !== text) element.textContent = text;
  }
}
