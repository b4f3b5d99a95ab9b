// The page: wires the form, the files, the jobs and their images.

import * as api from "./api.js";
import {$} from "./dom.js";
import {clearError, showError} from "./errors.js";
import {drawForm, drawLimits, modelOf, readForm, writeForm} from "./form.js";
import * as history from "./history.js";
import {Run} from "./jobs.js";
import {toPayload} from "./payload.js";
import {showJobs} from "./result.js";
import {getFiles, getWantedUse, MISSING, setFiles} from "./source.js";

const READY_MS = 15000;
const EXAMPLE = "a large red sphere on a green floor under a blue sky, on the left";

let models = [];
let run = null; // the jobs in progress

const announce = (text) => { $("announce").textContent = text; };

function takeFiles(files) {
  const use = getWantedUse();
  setFiles(files);
  drawForm(models, use ? {use} : {});
}

// --- Requests

/** Show a request in the form, and what of it this service does not have. */
function writeRequest(request) {
  setFiles([], request.use);
  const lost = writeForm(models, request);
  const errors = lost.map((field) => ({field, reason: `${request[field]} does not exist here; choose another value`}));
  if (errors.length) showError({errors});
}

function readLink() {
  const request = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  clearError();
  if (Object.keys(request).length) writeRequest(request);
}

function setBusy(busy) {
  $("submit").disabled = busy;
  $("cancel").hidden = !busy;
  $("cancel").disabled = false;
  $("output").setAttribute("aria-busy", String(busy));
}

async function show(jobs, request) {
  const isUpload = request.use === "enlarge";
  const alt = isUpload ? `Upscaled by ${jobs[0].method}` : request.prompt;
  return showJobs(jobs, alt, isUpload ? "" : `#${new URLSearchParams(request)}`);
}

async function remember(jobs, request, blob) {
  const text = request.prompt ?? getFiles()[0]?.name;
  const how = `${jobs.map((job) => job.method).join(" | ")} x${jobs[0].scale}`;
  await history.remember({ids: jobs.map((job) => job.id), request, text, how}, blob);
  history.drawStrip(openEntry);
}

async function perform(request) {
  const methods = [request.method, request.compare].filter(Boolean);
  run = new Run(methods);
  const payloads = await Promise.all(methods.map((method) => toPayload({...request, method})));
  const jobs = await run.finish(payloads);
  $("progress").replaceChildren();
  announce(jobs ? "The image is ready" : "Canceled");
  if (jobs) await remember(jobs, request, await show(jobs, request));
}

async function submit(event) {
  event.preventDefault();
  if (run) return;
  clearError();
  if (getWantedUse()) {
    showError({errors: [{field: "file", reason: MISSING}]});
    return;
  }
  const request = readForm(modelOf(models));
  // Both images of a comparison need one seed, and a link needs it too.
  if (!$("seed-row").hidden) request.seed ??= String(crypto.getRandomValues(new Uint32Array(1))[0]);
  setBusy(true);
  announce("Sent");
  $("output").scrollIntoView({block: "nearest"}); // on a phone it is below the form
  try {
    await perform(request);
  } catch (error) {
    $("progress").replaceChildren();
    announce("");
    showError(error);
    if (run.ids.length > 1) await run.cancel();
  } finally {
    run = null;
    setBusy(false);
  }
}

async function openEntry({ids, request}) {
  if (run) return;
  clearError();
  writeRequest(request);
  try {
    await show(await Promise.all(ids.map(api.getJob)), request);
    announce("The image is shown");
  } catch (error) {
    if (error.status === 404) error.message = "The service no longer has this job. Its request is in the form.";
    showError(error);
  }
}

// --- Start

async function loadModels() {
  clearError();
  try {
    models = await api.getModels();
    drawForm(models);
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
      $("service").className = ready ? "ready" : "unready";
    }
    await api.wait(READY_MS);
  }
}

function listenToFiles() {
  $("file").addEventListener("change", () => takeFiles($("file").files));
  $("drop-clear").addEventListener("click", () => takeFiles([]));
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", name === "dragover");
      if (name !== "drop" || !event.dataTransfer.files.length || !models.length) return;
      $("file").files = event.dataTransfer.files; // shows their names
      takeFiles($("file").files);
    });
  }
}

function listen() {
  $("form").addEventListener("submit", submit);
  $("prompt").addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && $("form").requestSubmit());
  $("cancel").addEventListener("click", () => {
    $("cancel").disabled = true;
    run?.cancel();
  });
  for (const name of ["bundle", "method", "compare", "use"]) $(name).addEventListener("change", () => drawForm(models));
  for (const name of ["scale", "refine", "output_format"]) $(name).addEventListener("change", () => drawLimits(modelOf(models)));
  $("key").addEventListener("change", () => {
    api.key.set($("key").value.trim());
    loadModels();
  });
  $("example").addEventListener("click", () => {
    $("prompt").value = EXAMPLE;
    $("form").requestSubmit();
  });
  $("forget").addEventListener("click", () => {
    history.forget();
    history.drawStrip(openEntry);
  });
  addEventListener("hashchange", () => models.length && readLink());
}

$("submit").disabled = true; // until the models are there
$("key").value = api.key.get();
$("key-row").hidden = !api.key.get();
listen();
listenToFiles();
history.drawStrip(openEntry);
watchService();
await loadModels();
