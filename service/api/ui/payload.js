// A request of the form as the bodies that PUT /jobs takes.

import {$} from "./dom.js";
import {isNumber} from "./form.js";
import {toLoras} from "./loras.js";
import {getFiles, getMask, typeOf} from "./source.js";

const UPLOAD_FIELDS = ["bundle", "method", "scale", "decode", "output_format", "compression", "quality"];
const REFINE_FIELDS = {refine: "refine_strength", refine_steps: "refine_steps", prompt: "prompt", negative_prompt: "negative_prompt", seed: "seed", guidance_scale: "guidance_scale"};

/** A file as a data: URL, which holds it as base64. */
const toText = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.addEventListener("load", () => resolve(reader.result));
  reader.addEventListener("error", () => reject(new Error(`${file.name} cannot be read. Choose it again.`)));
  reader.readAsDataURL(file);
});

function toForm(request) {
  const [file] = getFiles();
  const form = new FormData();
  for (const name of UPLOAD_FIELDS) if (name in request) form.set(name, request[name]);
  if (request.refine) for (const [name, field] of Object.entries(REFINE_FIELDS)) if (name in request) form.set(field, request[name]);
  if ($("scaled").checked && !$("scaled-row").hidden) form.set("scaled", "true");
  form.set("image", new File([file], file.name, {type: typeOf(file)}));
  return form;
}

/** The images of a request by field. */
async function toImages(use) {
  const texts = await Promise.all(getFiles().map(toText));
  if (use === "start") return {init_image: texts[0]};
  if (use === "edit") return {init_image: texts[0], mask: await toText(await getMask())};
  return use === "refer" ? {images: texts} : {};
}

/** @param {import("./form.js").Request} request */
export async function toPayload(request) {
  if (request.use === "enlarge") return {body: toForm(request)};
  const {compare, use, refine, refine_steps: refineSteps, loras, ...fields} = request;
  const body = Object.fromEntries(Object.entries(fields).map(([name, value]) => [name, isNumber(name) ? Number(value) : value]));
  if (refine) body.refine = {strength: Number(refine), ...(refineSteps ? {steps: Number(refineSteps)} : {})};
  if (loras) body.loras = toLoras(loras);
  return {body: JSON.stringify({...body, ...(await toImages(use))}), type: "application/json"};
}
