// A job's image with what made it: seed, size, method, and its time by stage.

import {make} from "./dom.js";

const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);

/** The stages as a bar whose parts are as long as they took, with a legend. */
function stageBar(stages) {
  const entries = Object.entries(stages).filter(([, value]) => value > 0);
  const total = entries.reduce((sum, [, value]) => sum + value, 0);
  const bar = make("div", {class: "bar", ariaHidden: "true"});
  const legend = make("ul", {class: "key"});
  for (const [name, value] of entries) {
    const part = make("span", {class: `${name}-stage`, title: `${name} ${seconds(value)}`});
    part.style.flexGrow = value / total;
    bar.append(part);
    legend.append(make("li", {}, make("i", {class: `${name}-stage`}), `${name} ${seconds(value)}`));
  }
  legend.append(make("li", {}, `total ${seconds(total)}`));
  return [bar, legend];
}

export function caption(job, url, link) {
  const [file] = job.results;
  const facts = [job.method, `x${job.scale}`, `${file.width} x ${file.height} px`, job.seed === null ? "" : `seed ${job.seed}`];
  const name = `${job.method}_x${job.scale}_${job.seed ?? job.id.slice(0, 8)}.${file.content_type.split("/")[1]}`;
  const line = make("div", {class: "tools"}, make("span", {class: "facts"}, facts.filter(Boolean).join(" · ")));
  line.append(make("a", {href: url, download: name}, "Download"));
  if (link) line.append(make("a", {href: link, class: "link"}, "Link to this request"));
  const warnings = job.warnings.map((text) => make("div", {class: "warning"}, text));
  return make("figcaption", {}, line, ...stageBar(job.stages), ...warnings);
}

export function figure(job, url, alt, link) {
  return make("figure", {}, make("img", {class: "picture", src: url, alt}), caption(job, url, link));
}
