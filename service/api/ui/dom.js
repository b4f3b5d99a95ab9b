// Small tools for the document.

export const $ = (id) => document.getElementById(id);

/** A new element with properties and children; `class` is its class. */
export function make(tag, {class: name, ...properties} = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  if (name) element.className = name;
  element.append(...children);
  return element;
}

/** Fill a select with values; choose `wanted`, else what was chosen, else `preset`: the first that is there. */
export function fill(select, values, wanted, preset, texts = {}) {
  const all = values.map(String);
  const current = select.value;
  select.replaceChildren(...all.map((value) => make("option", {value, textContent: texts[value] ?? value})));
  select.value = [wanted, current, String(preset), ...all].find((value) => all.includes(value)) ?? "";
}
