// What went wrong, and at which field.

import * as api from "./api.js";
import {$, make} from "./dom.js";

// Fields of the API whose values come from another field of the form.
const PLACES = {init_image: "file", mask: "file", images: "file", body: "file", image: "file", refine_strength: "refine", loras: "lora-list"};

export function showError(error) {
  const errors = error.errors ?? [];
  const list = errors.map(({field, reason}) => make("li", {}, `${field}: ${reason}`));
  $("error").replaceChildren(list.length ? make("ul", {}, ...list) : make("p", {}, error.message));
  for (const {field} of errors) {
    const name = field.split(".")[0];
    const place = $(PLACES[name] ?? name);
    place?.setAttribute("aria-invalid", "true");
    const fold = place?.closest("details");
    if (fold) fold.open = true;
  }
  if (api.isRefused(error)) {
    $("key-row").hidden = false;
    $("key").setAttribute("aria-invalid", "true");
    $("key").focus();
  }
}

export function clearError() {
  $("error").replaceChildren();
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}
