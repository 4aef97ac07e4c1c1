// What the colours mean; an entry selects the images that have its colour.

import { make, many, percent } from "./map_elements.js";

/** Fill the element `legend`; view: {images, groups, by}, what is drawn; select: called with numbers of images. */
export function showLegend(legend, { images, groups, by }, select) {
  legend.replaceChildren();
  if (by === "overlap") {
    legend.append(
      make("span", "", "0 %"),
      make("span", "map-ramp"),
      make("span", "", "100 %"),
      make("span", "map-legend-words", `of an image's ${images.k} nearest neighbours are the same for both`),
    );
    return;
  }
  for (const group of by ? groups[by] : []) {
    if (!group.images.length) continue;
    const dot = make("i", "map-dot");
    dot.style.background = `var(${group.variable})`;
    if (group.choices) {
      legend.append(make("label", "map-other", dot, chooser(group, images, select)));
      continue;
    }
    const count = by === "right" ? percent((100 * group.images.length) / images.n) : many(group.images.length);
    const button = make("button", "map-entry", dot, make("span", "", group.name), make("small", "", count));
    button.type = "button";
    button.title = `Select these ${many(group.images.length)} images`;
    button.addEventListener("click", () => select(group.images));
    legend.append(button);
  }
}

/** The classes that share a colour, each to be selected by its name. */
function chooser(group, images, select) {
  const element = make("select", "", make("option", "", group.name));
  element.setAttribute("aria-label", "Select the images of another class");
  for (const [label, name] of group.choices) {
    element.append(Object.assign(make("option", "", name), { value: String(label) }));
  }
  element.addEventListener("change", () => {
    select(group.images.filter((image) => images.labels[image] === Number(element.value)));
    element.selectedIndex = 0;
  });
  return element;
}
