// LoRAs with weights: a list to choose from, kept in a hidden field as `name:weight,name:weight`, as links have it.

import {$, make} from "./dom.js";

const parse = (text) => text.split(",").filter(Boolean).map((part) => {
  const [name, weight] = part.split(":");
  return {name, weight: Number(weight ?? 1)};
});

/** What a request calls `loras`. */
export const toLoras = parse;

/** Draw the list; one that is not there any more stays in the field, so that its loss can be shown. */
export function drawLoras(loras) {
  const chosen = new Map(parse($("loras").value).map(({name, weight}) => [name, weight]));
  const rows = loras.map(({name, base, rank}) => {
    const box = make("input", {type: "checkbox", checked: chosen.has(name)});
    const weight = make("input", {type: "number", min: -8, max: 8, step: 0.05, value: chosen.get(name) ?? 1, disabled: !chosen.has(name), ariaLabel: `Weight of ${name}`});
    weight.dataset.lora = name;
    box.addEventListener("change", () => {
      weight.disabled = !box.checked;
      store();
    });
    weight.addEventListener("input", store);
    const title = [base, `rank ${rank}`].filter(Boolean).join(", ");
    return make("div", {class: "lora"}, make("label", {class: "check", title}, box, name), weight);
  });
  $("lora-list").replaceChildren(...rows);
}

function store() {
  const chosen = [...$("lora-list").querySelectorAll("[data-lora]:enabled")];
  $("loras").value = chosen.map((each) => `${each.dataset.lora}:${each.value || 1}`).join(",");
}
