// A mask over an image: painted, or from a file. The painted area is generated again: white in the mask, black elsewhere.

import {make} from "./dom.js";

const INK = [255, 45, 149];
const DEFAULT_BRUSH = 12; // percent of the shorter side

function toBlob(canvas) {
  const mask = make("canvas", {width: canvas.width, height: canvas.height});
  const context = mask.getContext("2d");
  context.drawImage(canvas, 0, 0);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, mask.width, mask.height);
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "#000";
  context.fillRect(0, 0, mask.width, mask.height);
  return new Promise((resolve) => mask.toBlob(resolve, "image/png"));
}

/** Take a mask file: its light part is painted. */
async function load(canvas, file) {
  const context = canvas.getContext("2d");
  const bitmap = await createImageBitmap(file);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  const data = pixels.data;
  for (let at = 0; at < data.length; at += 4) {
    const light = 0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2];
    const painted = data[at + 3] >= 128 && light >= 128;
    [data[at], data[at + 1], data[at + 2]] = INK;
    data[at + 3] = painted ? 255 : 0;
  }
  context.putImageData(pixels, 0, 0);
}

/** Paint on a canvas with a mouse, a pen or a finger. */
function paintOn(canvas, brush) {
  const context = canvas.getContext("2d");
  let last = null;
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
  };
  function stroke(event) {
    const next = at(event);
    const width = (brush.value / 100) * Math.min(canvas.width, canvas.height);
    context.fillStyle = context.strokeStyle = `rgb(${INK})`;
    context.lineWidth = width;
    context.beginPath(); // a dot, since a line without length is not drawn
    context.arc(...next, width / 2, 0, 2 * Math.PI);
    context.fill();
    context.beginPath();
    context.moveTo(...(last ?? next));
    context.lineTo(...next);
    context.stroke();
    last = next;
  }
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = null;
    stroke(event);
  });
  canvas.addEventListener("pointermove", (event) => event.buttons & 1 && stroke(event));
}

/**
 * Where a mask is painted on an image.
 * @param {string} url Of the image.
 * @returns {{element: HTMLElement, toBlob: () => Promise<Blob>}}
 */
export function maskPainter(url) {
  const canvas = make("canvas", {class: "mask"});
  const image = make("img", {src: url, alt: "The image to edit"});
  image.addEventListener("load", () => Object.assign(canvas, {width: image.naturalWidth, height: image.naturalHeight}));
  const stage = make("div", {class: "mask-stage"}, image, canvas);
  const brush = make("input", {type: "range", min: 1, max: 50, value: DEFAULT_BRUSH, ariaLabel: "Size of the brush"});
  const clear = make("button", {type: "button"}, "Clear");
  const file = make("input", {type: "file", accept: "image/png,image/jpeg,image/webp", ariaLabel: "Mask file: white areas are generated again"});
  paintOn(canvas, brush);
  clear.addEventListener("click", () => canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height));
  file.addEventListener("change", () => file.files.length && load(canvas, file.files[0]));
  stage.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation(); // a mask, not another image
    if (event.dataTransfer.files.length) load(canvas, event.dataTransfer.files[0]);
  });
  const hint = make("small", {}, "Paint the area to generate again, or choose or drop a mask file (white there, black elsewhere).");
  const element = make("div", {class: "mask-view"}, hint, stage, make("div", {class: "tools"}, brush, clear), file);
  return {element, toBlob: () => toBlob(canvas)};
}
