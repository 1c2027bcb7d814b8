// The list of events as they arrive, the newest first.

import { make } from "./elements.js";

const MAX_ROWS = 200;
// What an event is about, in one line: the first of these that it has.
const SUBJECTS = [
  (e) => e["error.type"] && `${e["error.type"]}: ${e["error.message"] ?? ""}`,
  (e) => e["api.path"] && [e["api.method"], e["api.path"], e["api.status_code"]].join(" "),
  (e) => e["gen_ai.journey.step.name"],
  (e) => e["ui.component.name"] && [e["ui.component.name"], e["ui.element.text"]].join("  "),
  (e) => e["ui.element"],
  (e) => e["ui.state.key"] && `${e["ui.state.key"]} → ${e["ui.state.after"] ?? ""}`,
  (e) => e["event.name"],
  (e) => e["page.path"] ?? e["page.url"],
];

export class Tail {
  constructor(list) {
    this.list = list;
    this.rows = new Map();
    list.addEventListener("keydown", (event) => this.move(event));
  }

  clear() {
    this.rows.clear();
    this.list.replaceChildren();
    this.isFirst = true;
  }

  /** Add those events that are not there yet, each in its place. */
  add(events) {
    for (const event of [...events].reverse()) {
      const key = JSON.stringify([event.project_id, event["event.timestamp"], event.event_id]);
      if (!this.rows.has(key)) this.insert(key, event);
    }
    this.isFirst = false;
    while (this.list.childElementCount > MAX_ROWS) {
      this.rows.delete(this.list.lastElementChild.dataset.key);
      this.list.lastElementChild.remove();
    }
  }

  insert(key, event) {
    const arrived = Date.parse(event.received_at);
    const row = make("li", { "data-key": key, class: this.isFirst ? null : "new" }, link(event));
    this.rows.set(key, arrived);
    let next = this.list.firstElementChild;
    while (next && this.rows.get(next.dataset.key) > arrived) next = next.nextElementSibling;
    this.list.insertBefore(row, next);
  }

  move(event) {
    const move = { ArrowDown: "next", j: "next", ArrowUp: "previous", k: "previous" }[event.key];
    const row = document.activeElement.closest?.("#tail li");
    if (!move || !row) return;
    const other = row[`${move}ElementSibling`];
    if (!other) return;
    event.preventDefault();
    other.firstElementChild.focus();
  }
}

function link(event) {
  const names = { id: event.event_id, project: event.project_id, at: event["event.timestamp"] };
  const subject = SUBJECTS.map((tell) => tell(event)).find(Boolean) ?? event.event_id;
  const type = event["event.type"];
  return make(
    "a",
    { href: `/event?${new URLSearchParams(names)}`, "data-kind": type.split(".")[0] },
    make("time", { datetime: event.received_at }, tellTime(event.received_at)),
    make("b", {}, type),
    make("span", { class: "subject" }, subject),
    make("span", { class: "who" }, event["user.id"] ?? event["session.id"]),
    make("span", { class: "project" }, event.project_id),
  );
}

function tellTime(moment) {
  const time = new Date(moment);
  const milliseconds = String(time.getMilliseconds()).padStart(3, "0");
  return `${time.toTimeString().slice(0, 8)}.${milliseconds}`;
}
