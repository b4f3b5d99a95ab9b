// The service as the pages use it.

// Beside the folder of this file, so that URLs lead below the path of a proxy and work from every page.
const ROOT = new URL("..", import.meta.url);
const RETRY_MS = 1500;
const FINAL = ["succeeded", "failed", "canceled"];

export const key = {
  get: () => sessionStorage.getItem("giantleap-key") ?? "",
  set: (value) => sessionStorage.setItem("giantleap-key", value),
};

/** Whether another key may help. */
export const isRefused = (error) => error.status === 401 || error.status === 403;

/** An error of the service: its problem document. */
export class Problem extends Error {
  constructor(status, body) {
    super(body.detail ?? `The service responded with status ${status}.`);
    this.status = status;
    this.errors = body.errors ?? [];
  }
}

export const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// crypto.randomUUID exists on https and localhost only.
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

async function call(path, options = {}) {
  const headers = {...options.headers, ...(key.get() ? {"X-API-Key": key.get()} : {})};
  const response = await fetch(new URL(path, ROOT), {...options, headers}).catch(() => {
    throw new Error("The service does not respond. Try again later.");
  });
  if (response.ok) return response;
  throw new Problem(response.status, await response.json().catch(() => ({})));
}

const json = async (path, options) => (await call(path, options)).json();

export const getModels = () => json("models");
export const getWorkers = () => json("workers");
export const getMetrics = async () => (await call("metrics")).text();
export const getJob = (id) => json(`jobs/${id}`);
export const cancelJob = (id) => call(`jobs/${id}/cancel`, {method: "POST"});
// The policy of this page allows no request to a bucket.
const BYTES = {headers: {Prefer: "return=representation"}};
export const getImage = async (id, index) => (await call(`jobs/${id}/result?index=${index}`, BYTES)).blob();

export async function getReady() {
  const response = await fetch(new URL("readyz", ROOT));
  const body = await response.json();
  return {ready: response.ok, reasons: body.reasons ?? []};
}

/** Create the job `id`. A request without a response is repeated: the id makes that safe. */
export async function putJob(id, {body, type}) {
  const path = `jobs/${id}`;
  const headers = {Accept: "application/json", Prefer: "respond-async", ...(type ? {"Content-Type": type} : {})};
  const options = {method: "PUT", body, headers};
  for (let tries = 0; ; tries += 1) {
    try {
      return await json(path, options);
    } catch (error) {
      if (error instanceof Problem || tries === 3) throw error;
      await wait(RETRY_MS);
    }
  }
}

/** Call `onEvent(name, data)` for each event of a job until it has ended; return the job. */
export async function follow(id, onEvent) {
  let last = "";
  for (let failures = 0; ; ) {
    try {
      const response = await call(`jobs/${id}/events`, {headers: last ? {"Last-Event-ID": last} : {}});
      for await (const event of response.status === 204 ? [] : readEvents(response.body)) {
        if (event.id) last = event.id;
        failures = 0;
        onEvent(event.name, event.data);
      }
      const job = await getJob(id);
      if (FINAL.includes(job.status)) return job;
    } catch (error) {
      const passing = !(error instanceof Problem) || error.status >= 500 || error.status === 429;
      if (!passing || ++failures > 20) throw error;
    }
    await wait(RETRY_MS);
  }
}

/** The events of a text/event-stream; EventSource cannot be used, as it sends no API key. */
async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      if (fields.event) yield {id: fields.id, name: fields.event, data: JSON.parse(fields.data)};
    }
  }
}
