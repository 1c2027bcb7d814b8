// One event in all its fields, and what became of it.

import { ago, ahead, make, plural, show, tell } from "./elements.js";

/** A number as it was written: JavaScript cannot hold all that a 64-bit field can. */
class Exact {
  constructor(text) {
    this.text = text;
  }
}

/** Parse JSON, with numbers as they are written if the browser tells. */
export function parseExactly(text) {
  return JSON.parse(text, (_, value, context) =>
    typeof value === "number" && context?.source ? new Exact(context.source) : value);
}

export function showFound(place, found, command) {
  const several = found.stored.length + found.rejected.length > 1;
  show(
    place,
    several ? make("p", { class: "plain" }, "Several events have this id.") : null,
    ...found.stored.map(describeStored),
    ...found.rejected.map((rejection) => describeRejected(rejection, command)),
  );
}

function describeStored({ event, received_at: arrived, partition, forwarding }) {
  const fates = forwarding.map(describeFate);
  return make(
    "article",
    {},
    make("h3", {}, make("span", { class: "chip good" }, "stored"), " ", event.event_id),
    facts({
      project: event.project_id,
      arrived: make("span", {}, tell(arrived), " (", ago(arrived), ")"),
      "kept in": partition,
      ...Object.fromEntries(fates),
      ...(fates.length ? {} : { forwarded: "no: no provider is enabled" }),
    }),
    make("div", { class: "json" }, copier(event), make("pre", {}, ...spell(event, ""))),
  );
}

function describeRejected(rejection, command) {
  const { id, reason, event } = rejection;
  const number = text(id);
  return make(
    "article",
    {},
    make("h3", {}, make("span", { class: "chip bad" }, "rejected"), ` number ${number}`),
    make("p", { class: "reason" }, reason),
    facts({
      project: rejection.project_id,
      arrived: make("span", {}, tell(rejection.received_at), " (", ago(rejection.received_at), ")"),
      over: `${rejection.protocol}, ${plural(Number(text(rejection.size)), "byte", "bytes")}`,
      "to replay it": make("code", {}, `${command} rejected replay ${number}`),
    }),
    rejection.is_cut ? make("p", { class: "plain" }, "Only its beginning was kept.") : null,
    make("div", { class: "json" }, make("pre", {}, event)),
  );
}

function describeFate(fate) {
  const details = {
    delivered: () => null,
    waiting: () => [
      `${plural(Number(text(fate.tries)), "try", "tries")}, the next `,
      ahead(fate.next_try_at),
      fate.last_error ? `; last error: ${fate.last_error}` : "",
    ],
    dead: () => [`number ${text(fate.id)} in \`forward dead\`: ${fate.reason}`,
      fate.answer ? `; answer: ${fate.answer}` : ""],
    unknown: () => [`delivered, or ${fate.why}`],
  }[fate.state]();
  const kind = { delivered: "good", dead: "bad" }[fate.state] ?? "";
  const chip = make("span", { class: `chip ${kind}` }, fate.state);
  return [fate.provider, make("span", {}, chip, " ", ...(details ?? []))];
}

function facts(named) {
  const rows = Object.entries(named).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  return make("dl", { class: "facts" }, ...rows);
}

function copier(event) {
  if (!navigator.clipboard) return null;
  const button = make("button", { type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(spell(event, "").map((part) => part.textContent ?? part).join(""));
    button.textContent = "Copied";
  });
  return button;
}

const text = (number) => (number instanceof Exact ? number.text : String(number));

/** Return the parts of a value's JSON, on lines of their own if it holds others. */
function spell(value, indent) {
  if (value instanceof Exact || typeof value === "number") return [span("number", text(value))];
  if (typeof value === "string") return [span("string", JSON.stringify(value))];
  if (value === null || typeof value !== "object") return [span("word", String(value))];
  const isList = Array.isArray(value);
  const entries = isList ? value.map((each) => [null, each]) : Object.entries(value);
  const [open, close] = isList ? "[]" : "{}";
  if (!entries.length) return [open + close];
  const inner = `${indent}  `;
  const parts = entries.flatMap(([name, each], index) => [
    index ? `,\n${inner}` : `\n${inner}`,
    ...(name === null ? [] : [span("name", JSON.stringify(name)), ": "]),
    ...spell(each, inner),
  ]);
  return [open, ...parts, `\n${indent}${close}`];
}

function span(kind, content) {
  return make("span", { class: kind }, content);
}
