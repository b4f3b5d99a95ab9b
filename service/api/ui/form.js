// The form: what GET /models allows of the chosen model, read and written as a flat request, which a link can hold.

import {$, fill} from "./dom.js";
import {drawLoras} from "./loras.js";
import {drawSource, getWantedUse, usesFor} from "./source.js";

const NUMBERS = ["scale", "width", "height", "steps", "seed", "guidance_scale", "strength", "num_images", "quality", "refine", "refine_steps", "previews"];
const TEXTS = ["bundle", "prompt", "negative_prompt", "use", "method", "compare", "decode", "output_format", "compression", "loras"];
const FIELDS = [...TEXTS, ...NUMBERS];
const UPLOAD_METHODS = ["lua", "bicubic", "swinir"];
const FORMATS = ["png", "jpeg", "webp"];
const COMPRESSIONS = ["fast", "small"];
const STRENGTHS = {start: 0.6, edit: 1};

/** @typedef {Object<string, string>} Request The fields that are set, by name. */

export const isNumber = (name) => NUMBERS.includes(name);

const get = (name) => ($(name).type === "checkbox" ? ($(name).checked ? $(name).value : "") : $(name).value.trim());

function set(name, value) {
  if ($(name).type === "checkbox") $(name).checked = value !== "";
  else $(name).value = value;
}

const getUse = () => $("use").value || getWantedUse();

export const modelOf = (models) => models.find((each) => each.name === $("bundle").value) ?? models[0];

/** Which fields have an effect. */
function effective(model, use) {
  const draws = use !== "enlarge";
  const refines = model.refine && use !== "edit" && use !== "refer";
  const prompted = draws || (refines && $("refine").value !== "");
  return {
    prompt: prompted,
    negative_prompt: prompted && model.negative_prompt,
    seed: prompted,
    strength: use === "start" || use === "edit",
    width: draws,
    height: draws,
    steps: draws,
    guidance_scale: prompted,
    quality: $("output_format").value !== "png",
    num_images: draws && model.max_images > 1 && !$("compare").value,
    refine: refines,
    refine_steps: refines,
    loras: draws && model.loras.length > 0,
    previews: draws && model.previews,
  };
}

/** Draw the form; `wanted` are the values to choose, where they exist. */
export function drawForm(models, wanted = {}) {
  const titles = Object.fromEntries(models.map(({name, title}) => [name, title]));
  fill($("bundle"), Object.keys(titles), wanted.bundle, "");
  const model = modelOf(models);
  $("bundle-row").hidden = models.length < 2;
  $("bundle-hint").textContent = `${model.title}. License: ${model.license}.`;
  const uses = usesFor(model);
  fill($("use"), Object.keys(uses), wanted.use, "", uses);
  const use = getUse();
  const names = Object.keys(model.methods).filter((name) => use !== "enlarge" || UPLOAD_METHODS.includes(name));
  fill($("method"), names, wanted.method, model.method);
  fill($("compare"), ["", ...names.filter((name) => name !== $("method").value)], wanted.compare, "", {"": "nothing"});
  const scales = [$("method").value, $("compare").value].filter(Boolean).map((name) => model.methods[name]);
  fill($("scale"), scales[0].filter((scale) => scales.every((each) => each.includes(scale))), wanted.scale, model.scale);
  fill($("decode"), model.decodes, wanted.decode, "exact");
  fill($("output_format"), FORMATS, wanted.output_format, "png");
  fill($("compression"), COMPRESSIONS, wanted.compression, "fast");
  drawLoras(model.loras);
  drawSource(model, use);
  drawLimits(model, use);
}

/** The model's own values where none is given, and what has an effect; after each change of a field. */
export function drawLimits(model, use = getUse()) {
  $("prompt").maxLength = model.max_prompt_chars;
  $("steps").max = model.max_steps;
  $("num_images").max = model.max_images;
  for (const name of ["steps", "guidance_scale"]) $(name).placeholder = model[name];
  $("strength").placeholder = STRENGTHS[use] ?? "";
  for (const [name, base] of [["width", "base_width"], ["height", "base_height"]]) $(name).placeholder = model[base] * ($("scale").value || 1);
  for (const [name, has] of Object.entries(effective(model, use))) $(`${name}-row`).hidden = !has;
  $("submit").textContent = use === "enlarge" ? "Upscale" : use === "edit" ? "Edit" : "Generate";
}

/** @returns {Request} */
export function readForm(model) {
  const has = effective(model, getUse());
  return Object.fromEntries(FIELDS.filter((name) => has[name] ?? true).map((name) => [name, get(name)]).filter(([, value]) => value !== ""));
}

/** Show a request; returns the names of what this service does not have. */
export function writeForm(models, request) {
  for (const name of FIELDS) set(name, request[name] ?? "");
  drawForm(models, request);
  const has = effective(modelOf(models), getUse());
  const shown = readForm(modelOf(models));
  const known = (name) => name === "use" || (name === "loras" ? lorasExist(models, request) : shown[name] === request[name]);
  if (has.loras) $("more").open ||= "loras" in request;
  return Object.keys(request).filter((name) => !FIELDS.includes(name) || !known(name));
}

function lorasExist(models, request) {
  const names = modelOf(models).loras.map(({name}) => name);
  return request.loras.split(",").every((part) => names.includes(part.split(":")[0]));
}
