// Two images in one place, parted by a line that a range input, a pointer or the arrow keys move; zoom to 1:1.

import {make} from "./dom.js";

export function compareView(left, right) {
  const [first, second] = [left, right].map(({url, name}) => make("img", {src: url, alt: `By ${name}`, draggable: false}));
  const line = make("div", {class: "compare-line"});
  const stage = make("div", {class: "compare-stage"}, first, second, line);
  const view = make("div", {class: "compare-view", tabIndex: -1}, stage);
  const range = make("input", {type: "range", min: 0, max: 100, step: 0.5, value: 50});
  range.setAttribute("aria-label", `Where ${left.name} ends and ${right.name} begins`);
  const zoom = make("button", {type: "button", class: "zoom", textContent: "1:1"});
  zoom.setAttribute("aria-pressed", "false");

  // The line keeps its place in what is visible, so that it is never scrolled away.
  function place() {
    const inView = view.getBoundingClientRect().left + (range.value / 100) * view.clientWidth;
    const x = inView - stage.getBoundingClientRect().left;
    stage.style.setProperty("--cut", `${Math.min(Math.max(x, 0), stage.clientWidth)}px`);
  }

  function toggleZoom() {
    const zoomed = view.classList.toggle("zoomed");
    zoom.setAttribute("aria-pressed", String(zoomed));
    stage.classList.toggle("pixels", zoomed);
    stage.style.width = zoomed ? `${first.naturalWidth / devicePixelRatio}px` : "";
    view.tabIndex = zoomed ? 0 : -1; // scrolls by keys
    if (zoomed) view.scrollTo((view.scrollWidth - view.clientWidth) / 2, (view.scrollHeight - view.clientHeight) / 2);
    place();
  }

  function drag(event) {
    if (!(event.buttons & 1) || (event.pointerType !== "mouse" && view.classList.contains("zoomed"))) return;
    const box = view.getBoundingClientRect();
    range.value = (100 * (event.clientX - box.left)) / view.clientWidth;
    place();
  }

  range.addEventListener("input", place);
  zoom.addEventListener("click", toggleZoom);
  view.addEventListener("scroll", place);
  for (const name of ["pointerdown", "pointermove"]) view.addEventListener(name, drag);
  new ResizeObserver(place).observe(stage);
  const names = make("div", {class: "compare-names"}, make("span", {}, left.name), zoom, make("span", {}, right.name));
  const whole = make("div", {class: "compare"}, view, range, names);
  first.addEventListener("load", () => { whole.style.maxWidth = `max(20rem, ${first.naturalWidth}px)`; });
  return whole;
}
