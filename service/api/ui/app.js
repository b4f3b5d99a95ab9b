// The page: a form made of what GET /models allows, jobs that it starts and follows, and their images.

import * as api from "./api.js";
import {compareView} from "./compare.js";
import {$, fill, make} from "./dom.js";
import * as history from "./history.js";
import {caption, figure} from "./result.js";

const NUMBERS = ["scale", "width", "height", "steps", "seed", "guidance_scale", "refine"];
const FIELDS = ["bundle", "prompt", "negative_prompt", "method", "compare", "decode", ...NUMBERS];
const UPLOAD_METHODS = ["lua", "bicubic", "swinir"];
const UPLOAD_FIELDS = ["bundle", "method", "scale", "decode"];
const NPY = "application/x-npy";
const SAFETENSORS = "application/x-safetensors";
const TYPES = {npy: NPY, safetensors: SAFETENSORS, latent: SAFETENSORS};
const READY_MS = 15000;
const POSITION_MS = 2000;

let models = [];
let file = null;
let run = null; // the jobs in progress: {ids, canceled}
let urls = []; // of the images shown

const model = () => models.find((each) => each.name === $("bundle").value) ?? models[0];

// --- The form

function drawForm(wanted = {}) {
  const titles = Object.fromEntries(models.map(({name, title}) => [name, `${name}: ${title}`]));
  fill($("bundle"), Object.keys(titles), wanted.bundle, "", titles);
  const {methods, ...current} = model();
  const names = Object.keys(methods).filter((name) => !file || UPLOAD_METHODS.includes(name));
  fill($("method"), names, wanted.method, current.method);
  fill($("compare"), ["", ...names.filter((name) => name !== $("method").value)], wanted.compare, "", {"": "nothing"});
  const scales = [$("method").value, $("compare").value].filter(Boolean).map((name) => methods[name]);
  fill($("scale"), scales[0].filter((scale) => scales.every((each) => each.includes(scale))), wanted.scale, current.scale);
  fill($("decode"), current.decodes, wanted.decode, "exact");
  $("prompt").maxLength = current.max_prompt_chars;
  $("steps").max = current.max_steps;
  for (const name of ["steps", "guidance_scale"]) $(name).placeholder = current[name];
  drawUpload();
  $("bundle-row").hidden = models.length < 2;
  $("negative_prompt-row").hidden = Boolean(file) || !current.negative_prompt;
  $("refine-row").hidden = Boolean(file) || !current.refine;
  drawSize();
}

function drawUpload() {
  for (const field of document.querySelectorAll(".generate")) field.hidden = Boolean(file);
  $("prompt").required = !file;
  $("submit").textContent = file ? "Upscale" : "Generate";
  $("drop-hint").textContent = file ? `${file.name}, ${Math.ceil(file.size / 1024)} KiB` : "Or drop a file here. Without one, the prompt is drawn.";
  $("drop-clear").hidden = !file;
  $("scaled-row").hidden = !file || !typeOf(file).startsWith("application/");
}

function drawSize() {
  for (const [name, base] of [["width", "base_width"], ["height", "base_height"]]) {
    $(name).placeholder = model()[base] * ($("scale").value || 1);
  }
}

function setFile(chosen) {
  file = chosen;
  if (!file) $("file").value = "";
  drawForm();
}

const typeOf = (chosen) => TYPES[chosen.name.split(".").pop().toLowerCase()] ?? (chosen.type || "application/octet-stream");

function readForm() {
  const visible = (name) => $(name).closest("[hidden]") === null || name === "bundle";
  return Object.fromEntries(FIELDS.filter(visible).map((name) => [name, $(name).value.trim()]).filter(([, value]) => value !== ""));
}

/** Show a request in the form, and what of it this service does not have. */
function writeForm(request) {
  for (const name of FIELDS) $(name).value = request[name] ?? "";
  drawForm(request);
  const lost = Object.keys(request).filter((name) => !FIELDS.includes(name) || $(name).value !== request[name]);
  const errors = lost.map((field) => ({field, reason: `${request[field]} does not exist here; choose another value`}));
  if (errors.length) showError({errors});
}

function readLink() {
  const request = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  clearError();
  if (Object.keys(request).length) {
    setFile(null);
    writeForm(request);
  }
}

// --- Errors

function showError(error) {
  const list = (error.errors ?? []).map(({field, reason}) => make("li", {}, `${field}: ${reason}`));
  $("error").replaceChildren(list.length ? make("ul", {}, ...list) : make("p", {}, error.message));
  for (const {field} of error.errors ?? []) $(field.split(".")[0])?.setAttribute("aria-invalid", "true");
  if (error.status === 401 || error.status === 403) {
    $("key-row").hidden = false;
    $("key").setAttribute("aria-invalid", "true");
    $("key").focus();
  }
}

function clearError() {
  $("error").replaceChildren();
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

// --- Jobs

/** What PUT /jobs takes for a request. */
function toPayload(request) {
  if (file) {
    const query = new URLSearchParams(UPLOAD_FIELDS.filter((name) => name in request).map((name) => [name, request[name]]));
    if ($("scaled").checked && !$("scaled-row").hidden) query.set("scaled", "true");
    return {query: query.toString(), body: file, type: typeOf(file)};
  }
  const {compare, refine, ...body} = request;
  for (const name of NUMBERS) if (name in body) body[name] = Number(body[name]);
  if (refine) body.refine = {strength: Number(refine)};
  return {body: JSON.stringify(body), type: "application/json"};
}

function progressRow(label) {
  const text = make("p", {});
  const bar = make("progress", {max: 1});
  bar.setAttribute("aria-label", `Progress of ${label}`);
  const element = make("div", {}, text, bar);
  const show = (state, value) => {
    text.textContent = `${label}: ${state}`;
    if (value === undefined) bar.removeAttribute("value");
    else bar.value = value;
  };
  return {element, show};
}

function showEvent(row, name, data) {
  if (name === "started") row.show("started");
  if (name === "loading") row.show("loading the model");
  if (name === "step") row.show(`step ${data.step} of ${data.steps}`, data.step / data.steps);
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

async function runJob(id, payload, row, jobs) {
  row.show("sending");
  const accepted = await api.putJob(id, payload);
  if (jobs.canceled) await api.cancelJob(id).catch(() => null);
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

async function start(request) {
  const methods = [request.method, request.compare].filter(Boolean);
  const rows = methods.map(progressRow);
  run = {ids: methods.map(api.newId), canceled: false};
  $("progress").replaceChildren(...rows.map((row) => row.element));
  const payloads = methods.map((method) => toPayload({...request, method}));
  const jobs = await Promise.all(run.ids.map((id, index) => runJob(id, payloads[index], rows[index], run)));
  const failed = jobs.find((job) => job.status === "failed");
  if (failed) throw new api.Problem(failed.error.status, failed.error);
  if (jobs.some((job) => job.status === "canceled")) return null;
  return jobs;
}

async function show(jobs, request, isUpload) {
  const blobs = await Promise.all(jobs.map((job) => api.getImage(job.id)));
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = blobs.map((blob) => URL.createObjectURL(blob));
  const alt = isUpload ? `Upscaled by ${jobs[0].method}` : request.prompt;
  const link = isUpload ? "" : `#${new URLSearchParams(request)}`;
  if (jobs.length === 1) {
    $("result").replaceChildren(figure(jobs[0], urls[0], alt, link));
  } else {
    const [left, right] = jobs.map((job, index) => ({url: urls[index], name: job.method}));
    const captions = jobs.map((job, index) => make("figure", {}, caption(job, urls[index], index ? "" : link)));
    $("result").replaceChildren(compareView(left, right), ...captions);
  }
  return blobs[0];
}

function setBusy(busy) {
  $("submit").disabled = busy;
  $("cancel").hidden = !busy;
  $("cancel").disabled = false;
  $("output").setAttribute("aria-busy", String(busy));
}

async function submit(event) {
  event.preventDefault();
  if (run) return;
  clearError();
  const isUpload = Boolean(file);
  const request = readForm();
  // Both images of a comparison need one seed, and a link needs it too.
  if (!isUpload) request.seed ??= String(crypto.getRandomValues(new Uint32Array(1))[0]);
  setBusy(true);
  announce("Sent");
  $("output").scrollIntoView({block: "nearest"}); // on a phone it is below the form
  try {
    const text = isUpload ? file.name : request.prompt;
    const jobs = await start(request);
    $("progress").replaceChildren();
    announce(jobs ? "The image is ready" : "Canceled");
    if (jobs) {
      const blob = await show(jobs, request, isUpload);
      const how = `${jobs.map((job) => job.method).join(" | ")} x${jobs[0].scale}`;
      await history.remember({ids: jobs.map((job) => job.id), request, isUpload, text, how}, blob);
      history.drawStrip(openEntry);
    }
  } catch (error) {
    $("progress").replaceChildren();
    announce("");
    showError(error);
    if (run?.ids.length > 1) await cancelAll();
  } finally {
    run = null;
    setBusy(false);
  }
}

async function cancelAll() {
  $("cancel").disabled = true;
  if (!run) return;
  run.canceled = true;
  await Promise.all(run.ids.map((id) => api.cancelJob(id).catch(() => null))); // one that has ended stays as it is
}

async function openEntry({ids, request, isUpload}) {
  if (run) return;
  clearError();
  if (!isUpload) {
    setFile(null);
    writeForm(request);
  }
  try {
    await show(await Promise.all(ids.map(api.getJob)), request, isUpload);
    announce("The image is shown");
  } catch (error) {
    if (error.status === 404) error.message = "The service no longer has this job. Its request is in the form.";
    showError(error);
  }
}

const announce = (text) => { $("announce").textContent = text; };

// --- Start

async function loadModels() {
  clearError();
  try {
    models = await api.getModels();
    drawForm();
    readLink();
    $("submit").disabled = false;
  } catch (error) {
    $("submit").disabled = true;
    showError(error);
  }
}

async function watchService() {
  for (;;) {
    if (!document.hidden) {
      const {ready, reasons} = await api.getReady().catch(() => ({ready: false, reasons: ["the service does not respond"]}));
      $("service").textContent = ready ? "Ready" : `Not ready: ${reasons.join("; ")}`;
    }
    await api.wait(READY_MS);
  }
}

function listen() {
  $("form").addEventListener("submit", submit);
  $("cancel").addEventListener("click", cancelAll);
  for (const name of ["bundle", "method", "compare"]) $(name).addEventListener("change", () => drawForm());
  $("scale").addEventListener("change", drawSize);
  $("key").addEventListener("change", () => {
    api.key.set($("key").value.trim());
    loadModels();
  });
  $("file").addEventListener("change", () => setFile($("file").files[0] ?? null));
  $("drop-clear").addEventListener("click", () => setFile(null));
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", name === "dragover");
      if (name === "drop" && event.dataTransfer.files.length && models.length) setFile(event.dataTransfer.files[0]);
    });
  }
  $("forget").addEventListener("click", () => {
    history.forget();
    history.drawStrip(openEntry);
  });
  addEventListener("hashchange", () => models.length && readLink());
}

$("key").value = api.key.get();
$("key-row").hidden = !api.key.get();
listen();
history.drawStrip(openEntry);
watchService();
await loadModels();
