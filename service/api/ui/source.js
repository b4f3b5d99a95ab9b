// The files that a request starts from, and what they may be used for.

import {$, make} from "./dom.js";
import {bytes} from "./format.js";
import {maskPainter} from "./mask.js";

const NPY = "application/x-npy";
const SAFETENSORS = "application/x-safetensors";
const TYPES = {npy: NPY, safetensors: SAFETENSORS, latent: SAFETENSORS};
const USES = {enlarge: "upscale it", start: "start from it", edit: "edit a part of it", refer: "refer to it"};

export const MISSING = "This request starts from a file, which a link does not hold: choose it or drop it here.";

let files = [];
let painter = null;
let urls = [];
let wanted = ""; // what a link or an old job does with a file that is not here

export const getFiles = () => files;
export const getWantedUse = () => (files.length ? "" : wanted);
export const typeOf = (file) => TYPES[file.name.split(".").pop().toLowerCase()] ?? (file.type || "application/octet-stream");
const isLatent = (file) => typeOf(file).startsWith("application/");

/** The uses of the files that a bundle has, by name with their text; none without a file. */
export function usesFor(model) {
  const images = files.length > 0 && !files.some(isLatent);
  const can = {
    enlarge: files.length === 1,
    start: files.length === 1 && images && model.from_image,
    edit: files.length === 1 && images && model.mask,
    refer: images && files.length <= model.max_images_in,
  };
  return Object.fromEntries(Object.entries(USES).filter(([name]) => can[name]));
}

/** Take files in place of those that are there; without any, `use` is what the request needs one for. */
export function setFiles(chosen, use = "") {
  files = [...chosen];
  wanted = use;
  if (!files.length) $("file").value = "";
  painter = null;
  urls.forEach((url) => URL.revokeObjectURL(url));
  const images = files.filter((file) => !isLatent(file));
  urls = images.map((file) => URL.createObjectURL(file));
  $("pictures").replaceChildren(...urls.map((url, index) => make("img", {src: url, alt: images[index].name})));
}

/** Show the files and, to edit one, where to paint. */
export function drawSource(model, use) {
  const size = bytes(files.reduce((total, file) => total + file.size, 0));
  const hint = wanted ? MISSING : "Or drop one here, to upscale it or to start from it.";
  $("drop-hint").textContent = files.length ? size : hint;
  $("drop").classList.toggle("wanted", Boolean(wanted) && !files.length);
  $("drop-clear").hidden = !files.length && !wanted;
  $("use-row").hidden = Object.keys(usesFor(model)).length < 2;
  $("pictures").hidden = use === "edit" || !urls.length;
  $("scaled-row").hidden = use !== "enlarge" || !files.some(isLatent);
  $("mask-row").hidden = use !== "edit" || !files.length;
  if (!$("mask-row").hidden && !painter) {
    painter = maskPainter(urls[0]);
    $("mask-row").replaceChildren(painter.element);
  }
}

/** The painted mask, a PNG. */
export const getMask = () => painter.toBlob();
