// The page around the plots: controls above, plots in a pair, the selected images below.

import { SIDES, make } from "./map_elements.js";

let frames = 0;

/**
 * Put the elements of the maps into `element`, and return those that change.
 *
 * names     {teacher, student}: what the two are called beside their titles
 * choose    called with the kind of map that a visitor chooses
 * colour    called with what a visitor wants the points coloured by
 * clear     called when a visitor wants nothing selected any more
 */
export function buildFrame(element, names, { choose, colour, clear }) {
  element.replaceChildren();
  element.classList.add("mvmr-map");
  element.removeAttribute("data-ready");
  element.dataset.selected = "";
  const methods = buildMethods(choose);
  const chooser = make("select");
  chooser.addEventListener("change", () => colour(chooser.value));
  const frame = {
    methods: methods.inputs,
    chooser,
    chooserLabel: make("label", "map-by", "Colour by ", chooser),
    legend: make("div", "map-legend"),
    message: make("p", "map-message"),
    note: make("p", "map-note"),
    ...buildPair(names),
    ...buildSelection(clear),
  };
  frame.chooserLabel.hidden = true;
  frame.message.setAttribute("role", "status");
  element.append(
    make("div", "map-bar", methods.fieldset, frame.chooserLabel),
    frame.legend,
    frame.message,
    frame.pair,
    frame.note,
    frame.selection,
  );
  return frame;
}

function buildMethods(choose) {
  const name = `map-method-${(frames += 1)}`;
  const fieldset = make("fieldset", "map-method", make("legend", "map-unseen", "Kind of map"));
  const inputs = {};
  for (const method of ["pca", "umap"]) {
    const input = make("input");
    Object.assign(input, { type: "radio", name, value: method, disabled: true });
    input.addEventListener("change", () => choose(method));
    const wait = make("span", "map-wait");
    fieldset.append(make("label", "", input, make("span", "", method.toUpperCase()), wait));
    inputs[method] = { input, wait };
  }
  return { fieldset, inputs };
}

function buildPair(names) {
  const pair = make("div", "map-pair");
  pair.hidden = true;
  const [plots, rings, variances] = [{}, {}, {}];
  for (const side of SIDES) {
    variances[side] = make("span", "map-variance");
    plots[side] = make("div", "map-plot");
    rings[side] = make("div", "map-ring");
    const title = make("span", "", make("b", `map-${side}`, side === "teacher" ? "Teacher" : "Student"));
    if (names[side]) title.append(make("span", "map-name", names[side]));
    const caption = make("figcaption", "", title, variances[side]);
    pair.append(make("figure", "map-side", caption, make("div", "map-box", plots[side], rings[side])));
  }
  const tip = make("div", "map-tip");
  tip.hidden = true;
  pair.append(tip);
  return { pair, plots, rings, variances, tip };
}

function buildSelection(clear) {
  const count = make("p", "map-count");
  count.setAttribute("role", "status");
  const clearButton = make("button", "map-clear", "Clear", make("kbd", "", "Esc"));
  clearButton.type = "button";
  clearButton.addEventListener("click", clear);
  const list = make("ul", "map-thumbs");
  const more = make("p", "map-more");
  const selection = make("section", "map-selection", make("div", "map-head", count, clearButton), list, more);
  selection.setAttribute("aria-label", "Selected images");
  selection.hidden = true;
  return { count, clearButton, list, more, selection };
}
