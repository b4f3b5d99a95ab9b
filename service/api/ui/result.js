// A job's images with what made them: seed, size, method, and their time by stage.

import * as api from "./api.js";
import {compareView} from "./compare.js";
import {$, make} from "./dom.js";
import {seconds} from "./format.js";

let urls = []; // of the images shown

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

const nameOf = (job, file) => `${job.method}_x${job.scale}_${file.seed ?? job.id.slice(0, 8)}.${file.content_type.split("/")[1]}`;

function caption(job, images, link) {
  const [file] = job.results;
  const facts = [job.method, `x${job.scale}`, `${file.width} x ${file.height} px`, job.seed === null ? "" : `seed ${job.seed}`];
  const line = make("div", {class: "tools"}, make("span", {class: "facts"}, facts.filter(Boolean).join(" · ")));
  images.forEach((url, index) => {
    const text = images.length > 1 ? `Download ${index + 1}` : "Download";
    line.append(make("a", {href: url, download: nameOf(job, job.results[index])}, text));
  });
  if (link) line.append(make("a", {href: link, class: "link"}, "Link to this request"));
  const warnings = job.warnings.map((text) => make("div", {class: "warning"}, text));
  return make("figcaption", {}, line, ...stageBar(job.stages), ...warnings);
}

function figure(job, images, alt, link) {
  const pictures = images.map((url) => make("a", {href: url, target: "_blank", title: "Open in a new tab"}, make("img", {class: "picture", src: url, alt})));
  return make("figure", {}, make("div", {class: images.length > 1 ? "gallery" : ""}, ...pictures), caption(job, images, link));
}

/**
 * Show the images of a job, or one of each of two jobs under a slider.
 * @param {string} alt What they show.
 * @param {string} link To their request, or empty.
 * @returns {Promise<Blob>} The first image.
 */
export async function showJobs(jobs, alt, link) {
  const files = jobs.flatMap((job) => (jobs.length > 1 ? job.results.slice(0, 1) : job.results).map((_, index) => [job.id, index]));
  const blobs = await Promise.all(files.map(([id, index]) => api.getImage(id, index)));
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = blobs.map((blob) => URL.createObjectURL(blob));
  if (jobs.length === 1) {
    $("result").replaceChildren(figure(jobs[0], urls, alt, link));
  } else {
    const [left, right] = jobs.map((job, index) => ({url: urls[index], name: job.method}));
    const captions = jobs.map((job, index) => make("figure", {}, caption(job, [urls[index]], index ? "" : link)));
    $("result").replaceChildren(compareView(left, right), ...captions);
  }
  return blobs[0];
}
