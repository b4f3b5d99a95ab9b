// Jobs that run: their progress, their place in the queue, previews and their end.

import * as api from "./api.js";
import {$, make} from "./dom.js";

const POSITION_MS = 2000;

function progressRow(label) {
  const text = make("p", {});
  const bar = make("progress", {max: 1, ariaLabel: `Progress of ${label}`});
  const previews = make("div", {class: "previews"});
  const element = make("div", {class: "job"}, text, bar, previews);
  const show = (state, value) => {
    text.textContent = `${label}: ${state}`;
    if (value === undefined) bar.removeAttribute("value");
    else bar.value = value;
  };
  const preview = (index, image) => {
    while (previews.children.length <= index) previews.append(make("img", {alt: `Preview ${previews.children.length + 1}`}));
    previews.children[index].src = `data:image/jpeg;base64,${image}`;
  };
  return {element, show, preview};
}

function showEvent(row, name, data) {
  if (name === "started") row.show("started");
  if (name === "loading") row.show("loading the model");
  if (name === "step") row.show(`step ${data.step} of ${data.steps}`, data.step / data.steps);
  if (name === "preview") row.preview(data.index, data.image);
  if (name === "progress") row.show(`${data.stage}, ${Math.round(data.seconds)} s`, data.fraction ?? undefined);
  if (name === "stage") row.show(`${data.stage} done`);
  if (name === "retrying") row.show("a worker failed; it will be tried again");
}

/** Show the place in the queue until the job has started; events tell it only once. */
async function watchQueue(job, row, isWaiting) {
  while (isWaiting()) {
    if (job.status === "queued") {
      const start = job.estimated_start_s === null ? "" : `, starts in about ${Math.ceil(job.estimated_start_s)} s`;
      row.show(`queued, ${job.queue_position ? `${job.queue_position} before it` : "next in line"}${start}`);
    }
    await api.wait(POSITION_MS);
    if (isWaiting()) job = await api.getJob(job.id).catch(() => job);
  }
}

/** The jobs of a request, one for each method. */
export class Run {
  #canceled = false;

  constructor(methods) {
    this.ids = methods.map(api.newId);
    this.rows = methods.map(progressRow);
    $("progress").replaceChildren(...this.rows.map((row) => row.element));
  }

  /** Run a payload for each method; returns the jobs, or null if one was canceled. */
  async finish(payloads) {
    const jobs = await Promise.all(payloads.map((payload, index) => this.#follow(this.ids[index], payload, this.rows[index])));
    const failed = jobs.find((job) => job.status === "failed");
    if (failed) throw new api.Problem(failed.error.status, failed.error);
    return jobs.some((job) => job.status === "canceled") ? null : jobs;
  }

  async cancel() {
    this.#canceled = true;
    await Promise.all(this.ids.map((id) => api.cancelJob(id).catch(() => null))); // one that has ended stays as it is
  }

  async #follow(id, payload, row) {
    row.show("sending");
    const accepted = await api.putJob(id, payload);
    if (this.#canceled) await api.cancelJob(id).catch(() => null);
    let waiting = true;
    watchQueue(accepted, row, () => waiting);
    try {
      return await api.follow(id, (name, data) => {
        waiting = name === "queued" || name === "retrying";
        showEvent(row, name, data);
      });
    } finally {
      waiting = false;
    }
  }
}
