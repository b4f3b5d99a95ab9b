// What this browser has requested, newest first: ids, the request and a small picture, in localStorage.

import {$, make} from "./dom.js";

const NAME = "giantleap-jobs";
const MOST = 24;
const THUMB_PX = 128;

function read() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? [];
  } catch {
    return [];
  }
}

async function thumbnail(blob) {
  const bitmap = await createImageBitmap(blob);
  const factor = THUMB_PX / Math.min(bitmap.width, bitmap.height);
  const canvas = make("canvas", {width: bitmap.width * factor, height: bitmap.height * factor});
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.7);
}

export async function remember(entry, blob) {
  const entries = [{...entry, picture: blob ? await thumbnail(blob) : null}, ...read()];
  localStorage.setItem(NAME, JSON.stringify(entries.slice(0, MOST)));
}

/** Draw the strip; `onOpen(entry)` is called for the entry that the user chooses. */
export function drawStrip(onOpen) {
  const entries = read();
  $("strip").hidden = entries.length === 0;
  $("jobs").replaceChildren(...entries.map((entry) => {
    const picture = entry.picture ? make("img", {src: entry.picture, alt: ""}) : make("div", {class: "none"});
    const button = make("button", {type: "button", title: entry.text}, picture, make("span", {}, entry.text), make("span", {}, entry.how));
    button.addEventListener("click", () => onOpen(entry));
    return make("li", {}, button);
  }));
}

export function forget() {
  localStorage.removeItem(NAME);
}
