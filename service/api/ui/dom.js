// Small tools for the document.

export const $ = (id) => document.getElementById(id);

/** A new element with properties and children; `class` is its class. */
export function make(tag, {class: name, ...properties} = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  if (name) element.className = name;
  element.append(...children);
  return element;
}

/** Fill a select with values; keep the chosen one where it still exists, else choose `preferred`. */
export function fill(select, values, preferred, texts = {}) {
  const chosen = select.value;
  select.replaceChildren(...values.map((value) => make("option", {value: String(value), textContent: texts[value] ?? value})));
  const all = values.map(String);
  select.value = all.includes(chosen) ? chosen : String(preferred ?? values[0]);
}
