// Prometheus' text format, and what counters did over a while.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const SMOOTH = 10;
const ESCAPES = {n: "\n", '"': '"', "\\": "\\"};

/** @typedef {{labels: Object<string, string>, value: number}} Series */

/**
 * The series of a scrape by metric.
 * @param {string} text
 * @returns {Map<string, Series[]>}
 */
export function parse(text) {
  const metrics = new Map();
  for (const line of text.split("\n")) {
    const match = LINE.exec(line);
    if (!match) continue;
    const [, name, list = "", value] = match;
    const labels = {};
    for (const [, label, raw] of list.matchAll(LABEL)) labels[label] = raw.replace(/\\(.)/g, (_, char) => ESCAPES[char] ?? char);
    if (!metrics.has(name)) metrics.set(name, []);
    metrics.get(name).push({labels, value: Number(value)});
  }
  return metrics;
}

const matches = (labels, wanted) => Object.entries(wanted).every(([name, value]) => (labels[name] ?? "") === value);

/** The sum of a metric's series that have these labels; null where there is none. */
export function sum(metrics, name, wanted = {}) {
  const found = (metrics.get(name) ?? []).filter(({labels}) => matches(labels, wanted));
  return found.length ? found.reduce((total, {value}) => total + value, 0) : null;
}

/** The sums of a metric's series by the values of some labels, as `[values, sum]`. */
export function groups(metrics, name, labels, wanted = {}) {
  const sums = new Map();
  for (const series of (metrics.get(name) ?? []).filter((each) => matches(each.labels, wanted))) {
    const values = labels.map((label) => series.labels[label] ?? "");
    const id = JSON.stringify(values);
    sums.set(id, (sums.get(id) ?? 0) + series.value);
  }
  return [...sums].map(([id, value]) => [JSON.parse(id), value]);
}

/** The latest scrapes with their times. */
export class History {
  #samples = [];

  constructor(seconds) {
    this.seconds = seconds;
  }

  /** @param {number} time In seconds. */
  add(time, metrics) {
    this.#samples.push({time, metrics});
    this.#samples = this.#samples.filter((each) => each.time >= time - this.seconds);
  }

  /** How long the scrapes reach back. */
  get span() {
    return this.#samples.length < 2 ? 0 : this.#samples.at(-1).time - this.#samples[0].time;
  }

  /** A value of each scrape, the oldest first. */
  values(read) {
    return this.#samples.map(({metrics}) => read(metrics) ?? 0);
  }

  /** How much a counter grew over the scrapes; null before the second. A restart begins at zero again. */
  growth(read) {
    if (this.#samples.length < 2) return null;
    const values = this.values(read);
    return values.slice(1).reduce((total, value, index) => total + (value < values[index] ? value : value - values[index]), 0);
  }

  /** How much a counter grew before each scrape, over a few of them. */
  trend(read) {
    const values = this.values(read);
    return values.map((value, index) => Math.max(0, value - values[Math.max(0, index - SMOOTH)]));
  }

  /** The growth for each minute. */
  perMinute(read) {
    const increase = this.growth(read);
    return increase === null ? null : (60 * increase) / this.span;
  }
}
