// Bars and lines made of elements and inline SVG.

import {make} from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";

/** A row: a name, a bar whose length is a share of the whole, and the figure in words. */
export function barRow(name, share, text, kind = "") {
  const bar = make("span", {class: `fill ${kind}`});
  bar.style.width = `${100 * Math.min(Math.max(share, 0), 1)}%`;
  const track = make("span", {class: "track", ariaHidden: "true"}, bar);
  return make("li", {class: "row"}, make("span", {class: "name", title: name}, name), track, make("span", {class: "figure"}, text));
}

/** A line through values, the latest at the right; decoration, since the figure stands beside it. */
export function sparkline(values) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [name, value] of Object.entries({viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true", class: "spark"})) {
    svg.setAttribute(name, value);
  }
  const top = Math.max(...values, 0);
  if (values.length < 2 || top === 0) return svg;
  const points = values.map((value, index) => `${(100 * index) / (values.length - 1)},${23 - (22 * value) / top}`).join(" ");
  const area = document.createElementNS(SVG, "polygon");
  area.setAttribute("points", `0,24 ${points} 100,24`);
  const line = document.createElementNS(SVG, "polyline");
  line.setAttribute("points", points);
  svg.append(area, line);
  return svg;
}
