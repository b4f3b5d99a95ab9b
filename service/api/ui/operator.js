// The operator's view: GET /metrics and GET /workers, read every few seconds while the tab is visible.

import * as api from "./api.js";
import {barRow, sparkline} from "./charts.js";
import {$, make} from "./dom.js";
import {bytes, count, percent, seconds} from "./format.js";
import {groups, History, parse, sum} from "./metrics.js";

const EVERY_MS = 3000;
const WINDOW_S = 300;
const STAGES = ["generate", "upscale", "refine", "decode", "encode"];
const JOBS = "giantleap_jobs_total";
const BUSY = "giantleap_device_busy_seconds_total";
const STAGE = "giantleap_stage_duration_seconds";
const REAL = {warmup: "false"};

const list = (rows, empty) => (rows.length ? make("ul", {class: "rows"}, ...rows) : make("p", {class: "quiet"}, empty));
const depth = (metrics) => sum(metrics, "giantleap_queue_depth");

// --- Figures

function tile(name, value, note, values = []) {
  return make("div", {class: "panel tile"}, make("h2", {}, name), make("p", {class: "big"}, value), make("p", {class: "quiet"}, note), sparkline(values));
}

/** A counter as a rate over the window, with its total since the start. */
function rateTile(name, history, metrics, read) {
  const rate = history.perMinute(read);
  const total = read(metrics) ?? 0;
  return tile(name, rate === null ? "–" : count(rate), `${count(total)} since the start`, history.trend(read));
}

function drawTiles(metrics, history, workers) {
  const limit = sum(metrics, "giantleap_queue_limit");
  const oldest = sum(metrics, "giantleap_queue_oldest_age_seconds");
  const reachable = limit !== null;
  const waiting = depth(metrics) ?? 0;
  $("tiles").replaceChildren(
    tile("Waiting", reachable ? count(waiting) : "–", waiting ? `the oldest for ${seconds(oldest)}` : "nothing waits", history.values(depth)),
    tile("Running", reachable ? count(sum(metrics, "giantleap_queue_processing")) : "–", reachable ? `waiting and running: at most ${count(limit)}` : "",
      history.values((each) => sum(each, "giantleap_queue_processing"))),
    tile("Workers", workers ? count(workers.length) : "–", workers ? `bundles in memory: ${new Set(workers.flatMap((each) => each.loaded)).size}` : ""),
    rateTile("Jobs per minute", history, metrics, (each) => sum(each, JOBS)),
    rateTile("Failed per minute", history, metrics, (each) => sum(each, JOBS, {status: "failed"})),
    rateTile("Refused per minute", history, metrics, (each) => sum(each, "giantleap_rejections_total")),
  );
}

function drawQueue(metrics) {
  const lanes = groups(metrics, "giantleap_queue_depth", ["bundle", "priority"]);
  const longest = Math.max(...lanes.map(([, value]) => value), 1);
  const rows = lanes.map(([[bundle, priority], value]) => barRow(`${bundle}, ${priority}`, value / longest, count(value), "queue-stage"));
  const used = sum(metrics, "giantleap_blob_bytes");
  const budget = sum(metrics, "giantleap_blob_budget_bytes");
  if (budget) rows.push(barRow("inputs, results", used / budget, `${bytes(used)} of ${bytes(budget)}`));
  const others = [["wait for another attempt", "giantleap_queue_delayed"], ["failed for good (dead letters)", "giantleap_queue_dead_lettered"]];
  const notes = others.map(([text, name]) => [text, sum(metrics, name)]).filter(([, value]) => value);
  $("queue").replaceChildren(list(rows, "Redis cannot be reached."), ...notes.map(([text, value]) => make("p", {class: "quiet"}, `${count(value)} ${text}`)));
}

function workerItem({device, role, memory_bytes: memory, loaded_bytes: used, bundles, loaded}) {
  const names = bundles.map((name) => make("span", {class: loaded.includes(name) ? "chip loaded" : "chip", title: loaded.includes(name) ? "in memory" : "loaded when a job needs it"}, name));
  const head = make("p", {class: "worker-name"}, make("strong", {}, device), role === "all" ? "all stages" : `${role} only`);
  const memoryRow = make("ul", {class: "rows"}, barRow("memory", used / memory, `${bytes(used)} of ${bytes(memory)}`));
  return make("li", {class: "worker"}, head, memoryRow, make("p", {class: "chips"}, ...names));
}

function drawWorkers(metrics, history, workers) {
  const busy = groups(metrics, BUSY, ["device"]).map(([[device]]) => {
    const increase = history.growth((each) => sum(each, BUSY, {device}));
    const share = increase === null ? 0 : Math.min(increase / history.span, 1); // a long batch is counted at its end
    return barRow(device ? `busy: ${device}` : "busy", share, increase === null ? "–" : percent(share), "generate-stage");
  });
  const empty = make("p", {class: "warning"}, "No worker is ready: jobs wait until one is.");
  const items = workers.length ? make("ul", {class: "workers"}, ...workers.map(workerItem)) : empty;
  $("workers").replaceChildren(items, ...(busy.length ? [list(busy)] : []));
}

function drawStages(metrics, history) {
  const read = (suffix, stage) => (each) => sum(each, `${STAGE}_${suffix}`, {...REAL, stage}) ?? 0;
  const names = groups(metrics, `${STAGE}_count`, ["stage"], REAL).map(([[stage]]) => stage);
  const recent = names.some((stage) => history.growth(read("count", stage)));
  const means = names.map((stage) => {
    const [total, batches] = ["sum", "count"].map((suffix) => (recent ? history.growth(read(suffix, stage)) : read(suffix, stage)(metrics)));
    return {stage, batches, mean: batches ? total / batches : 0};
  }).filter(({batches}) => batches);
  means.sort((left, right) => STAGES.indexOf(left.stage) - STAGES.indexOf(right.stage));
  const longest = Math.max(...means.map(({mean}) => mean));
  const rows = means.map(({stage, mean, batches}) => barRow(stage, mean / longest, `${seconds(mean)} x ${count(batches)}`, `${stage}-stage`));
  const note = make("p", {class: "quiet"}, `Mean of a batch x batches, ${recent ? "of the last minutes" : "since the start"}, on the API's host.`);
  $("stages").replaceChildren(list(rows, "No batch has run on this host yet."), ...(rows.length ? [note] : []));
}

function drawFaults(metrics) {
  const failed = groups(metrics, "giantleap_job_failures_total", ["code"]).map(([[code], value]) => ["failed", code, value]);
  const refused = groups(metrics, "giantleap_rejections_total", ["reason"]).map(([[reason], value]) => ["refused", reason, value]);
  const all = [...failed, ...refused].filter(([, , value]) => value).sort((left, right) => right[2] - left[2]);
  const most = all[0]?.[2];
  const rows = all.map(([what, code, value]) => barRow(`${what}: ${code}`, value / most, count(value), what));
  $("faults").replaceChildren(list(rows, "None since the start."));
}

// --- Reading

function showError(error) {
  $("error").replaceChildren(make("p", {}, error.message));
  if (!api.isRefused(error)) return;
  $("cards").hidden = true;
  $("tiles").replaceChildren();
  $("key-row").hidden = false;
  $("key").setAttribute("aria-invalid", "true");
}

async function refresh(history) {
  try {
    const metrics = parse(await api.getMetrics());
    history.add(performance.now() / 1000, metrics);
    // Without Redis the metrics of this host are there, the workers are not.
    const workers = await api.getWorkers().catch((error) => {
      if (error.status !== 503) throw error;
      return null;
    });
    $("error").replaceChildren(...(workers ? [] : [make("p", {}, "Redis cannot be reached: queue and workers are unknown.")]));
    $("key").removeAttribute("aria-invalid");
    $("cards").hidden = false;
    drawTiles(metrics, history, workers);
    drawQueue(metrics);
    drawWorkers(metrics, history, workers ?? []);
    drawStages(metrics, history);
    drawFaults(metrics);
    $("service").textContent = workers?.length ? "Ready" : "Not ready";
    $("service").className = workers?.length ? "ready" : "unready";
    $("updated").textContent = `Updated at ${new Date().toLocaleTimeString()}, every ${EVERY_MS / 1000} s while this tab is visible.`;
  } catch (error) {
    $("service").textContent = "Not updated";
    $("service").className = "unready";
    showError(error);
  }
}

/** Resolves after a while in which the tab was visible, or once it is visible again. */
async function pause() {
  await api.wait(EVERY_MS);
  while (document.hidden) await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, {once: true}));
}

const history = new History(WINDOW_S);
$("key").value = api.key.get();
$("key-row").hidden = !api.key.get();
$("key").addEventListener("change", () => {
  api.key.set($("key").value.trim());
  refresh(history);
});
$("key-row").addEventListener("submit", (event) => event.preventDefault()); // by Enter, after the change
for (;;) {
  await refresh(history);
  await pause();
}
