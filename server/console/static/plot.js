// The plot of events a second: stacked steps, the oldest at the left.

import { count, make } from "./elements.js";

const SERIES = [
  ["stored", "stored"],
  ["duplicate", "duplicate"],
  ["rejected", "rejected"],
];
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 100;

export class Plot {
  constructor(figure, legend) {
    this.figure = figure;
    this.legend = legend;
    this.chosen = null;
    this.build();
    figure.addEventListener("pointermove", (event) => this.point(event));
    figure.addEventListener("pointerleave", () => this.choose(null));
    figure.addEventListener("blur", () => this.choose(null));
    figure.addEventListener("keydown", (event) => this.step(event));
  }

  build() {
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.paths = SERIES.map(([name]) => {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", name);
      return path;
    });
    this.svg.append(...this.paths);
    this.cursor = make("div", { class: "cursor", hidden: true });
    this.scale = ["top", "half"].map((name) => make("span", { class: `scale ${name}` }));
    this.times = make("div", { class: "times" });
    const area = make("div", { class: "area" }, this.svg, this.cursor, ...this.scale);
    this.area = area;
    this.figure.append(area, this.times);
    this.figures = SERIES.map(([name, label]) => {
      const rate = make("b");
      const total = make("small");
      this.legend.append(
        make("div", { class: name }, make("dt", {}, label), make("dd", {}, rate, total)),
      );
      return { rate, total };
    });
  }

  update(throughput) {
    const steps = throughput.period_seconds / throughput.step_seconds;
    this.throughput = throughput;
    this.steps = steps;
    this.rates = SERIES.map(([name]) => this.toRates(throughput[name]));
    this.draw();
    this.describe();
  }

  /** Return the rate in each step of the period; before the service was started it is 0. */
  toRates(numbers) {
    const { step_seconds: seconds, now, last_step_at: begun } = this.throughput;
    const rates = numbers.map((number) => number / seconds);
    rates[rates.length - 1] = numbers.at(-1) / Math.min(seconds, Math.max(1, now - begun));
    return [...new Array(Math.max(0, this.steps - rates.length)).fill(0), ...rates];
  }

  draw() {
    const sums = this.rates[0].map((_, index) => this.rates.map((rates) => rates[index]));
    const top = round(Math.max(1, ...sums.map((each) => each[0] + each[1] + each[2])));
    this.svg.setAttribute("viewBox", `0 0 ${this.steps} ${HEIGHT}`);
    let base = new Array(this.steps).fill(0);
    this.paths.forEach((path, series) => {
      const upper = base.map((below, index) => below + this.rates[series][index]);
      path.setAttribute("d", outline(base, upper, top));
      base = upper;
    });
    [top, top / 2].forEach((value, index) => (this.scale[index].textContent = count(value)));
    this.label();
  }

  label() {
    const { now, period_seconds: period } = this.throughput;
    if (this.times.childElementCount === 0) {
      this.times.append(...[0, 1, 2, 3].map(() => make("span")));
    }
    [...this.times.children].forEach((span, index) => {
      const moment = new Date((now - period * (1 - index / 3)) * 1000);
      const text = index === 3 ? "now" : moment.toTimeString().slice(0, 5);
      if (span.textContent !== text) span.textContent = text;
    });
  }

  describe() {
    const at = this.chosen;
    SERIES.forEach(([name, label], series) => {
      const { rate, total } = this.figures[series];
      const rates = this.rates[series];
      const recent = (rates.at(-1) + rates.at(-2)) / 2;
      rate.textContent = spell(at === null ? recent : rates[at]);
      const sum = this.throughput[name].reduce((one, other) => one + other, 0);
      total.textContent = at === null ? `${count(sum)} in 15 min` : this.tellStep(at);
    });
    const sums = SERIES.map(([name, label], series) =>
      `${count(this.throughput[name].reduce((one, other) => one + other, 0))} ${label}`);
    this.figure.setAttribute(
      "aria-label", `Events a second in the last 15 minutes: ${sums.join(", ")}`);
  }

  tellStep(index) {
    const { last_step_at: last, step_seconds: seconds } = this.throughput;
    const moment = new Date((last - (this.steps - 1 - index) * seconds) * 1000);
    return `at ${moment.toTimeString().slice(0, 8)}`;
  }

  point(event) {
    const { left, width } = this.area.getBoundingClientRect();
    this.choose(Math.floor(((event.clientX - left) / width) * this.steps));
  }

  step(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    this.choose((this.chosen ?? this.steps - 1) + move);
  }

  choose(index) {
    if (!this.throughput) return;
    this.chosen = index === null ? null : Math.min(this.steps - 1, Math.max(0, index));
    this.cursor.hidden = this.chosen === null;
    if (this.chosen !== null) {
      this.cursor.style.left = `${((this.chosen + 0.5) / this.steps) * 100}%`;
    }
    this.describe();
  }
}

/** Return the next number that is 1, 2 or 5 times a power of ten. */
function round(number) {
  const power = 10 ** Math.floor(Math.log10(number));
  return [1, 2, 5, 10].find((factor) => factor * power >= number) * power;
}

function outline(lower, upper, top) {
  const height = (value) => (HEIGHT * (1 - value / top)).toFixed(2);
  const above = upper.map((value) => `V${height(value)}h1`).join("");
  const below = lower.map((value) => `V${height(value)}h-1`).reverse().join("");
  return `M0 ${height(upper[0])}${above}${below}Z`;
}

function spell(rate) {
  return rate >= 10 || rate === 0 ? count(Math.round(rate)) : rate.toFixed(1);
}
