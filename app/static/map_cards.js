// The images themselves: those that are selected, and the one under the pointer.
// `view` is what is drawn: {images, groups, by, thumbs, selected}.

import { coarse, make, many, percent } from "./map_elements.js";
import { RIGHT } from "./map_groups.js";

const MOST_THUMBS = 60;

/** Fill the frame's part below the plots; point: called with the image under the pointer, leave: when there is none. */
export function showSelection(frame, view, { point, leave }) {
  const { selected } = view;
  const { overlap } = view.images;
  frame.clearButton.hidden = !selected.length;
  frame.list.replaceChildren();
  frame.more.textContent = "";
  if (!selected.length) {
    const how = coarse() ? "Tap a point, or take the lasso of a map and" : "Click a point, or";
    frame.count.textContent = `${how} draw round several: the same images are marked in the other map and shown here.`;
    return;
  }
  frame.count.textContent = summarise(view);
  const order = overlap ? [...selected].sort((a, b) => overlap[a] - overlap[b] || a - b) : selected;
  for (const id of order.slice(0, MOST_THUMBS)) {
    const card = make("li", "map-card", thumbnail(view, id), make("span", "map-key", tail(view.images.keys[id])));
    card.title = view.images.keys[id];
    card.dataset.image = id;
    card.append(...facts(view, id));
    card.addEventListener("pointerenter", () => point(id));
    card.addEventListener("pointerleave", leave);
    frame.list.append(card);
  }
  const hidden = selected.length - MOST_THUMBS;
  if (hidden > 0) {
    frame.more.textContent = `and ${many(hidden)} more${overlap ? ", whose neighbours overlap as much or more" : ""}`;
  }
}

/** Say beside the pointer which image it points at. */
export function showTip(frame, view, id, event) {
  const { pair, tip } = frame;
  const words = make("div", "", make("span", "map-key", tail(view.images.keys[id])), ...facts(view, id));
  tip.replaceChildren(thumbnail(view, id), words);
  tip.hidden = false;
  const box = pair.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const { offsetWidth: width, offsetHeight: height } = tip;
  const left = x + 18 + width > box.width ? Math.max(0, x - 18 - width) : x + 18;
  tip.style.transform = `translate(${left}px, ${Math.max(0, Math.min(y - height / 2, box.height - height))}px)`;
}

function summarise({ images: { overlap, n, k, right }, selected }) {
  const words = [`${many(selected.length)} of ${many(n)} images`];
  if (overlap) {
    const mean = (ids) => ids.reduce((sum, id) => sum + overlap[id], 0) / ids.length;
    words.push(`overlap@${k} ${percent(mean(selected))} (all images: ${percent(mean([...overlap.keys()]))})`);
  }
  if (right) {
    const share = (code) => selected.filter((id) => right[id] === code || right[id] === 3).length / selected.length;
    words.push(`teacher right on ${percent(100 * share(1))}, student on ${percent(100 * share(2))}`);
  }
  return words.join(" · ");
}

function facts({ images: { labels, classes, overlap, right }, groups, by }, id) {
  const spans = [];
  if (labels) {
    const dot = make("i", "map-dot");
    const group = groups.class.find((candidate) => candidate.labels.has(labels[id]));
    dot.style.background = `var(${group.variable})`;
    spans.push(make("span", "map-fact", ...(by === "class" ? [dot] : []), classes[labels[id]] ?? ""));
  }
  if (overlap) spans.push(make("span", "map-fact", `overlap ${percent(overlap[id])}`));
  if (right) spans.push(make("span", "map-fact", RIGHT[right[id]]));
  return spans;
}

function thumbnail({ thumbs }, id) {
  const image = make("img");
  image.loading = "lazy";
  image.alt = "";
  image.addEventListener("load", () => {
    image.classList.toggle("map-tiny", image.naturalWidth * 2 <= image.clientWidth);
  });
  image.src = `${thumbs}${id}`;
  return image;
}

/** The last part of an image's name, which is the part that differs; the style sheet cuts what is too long. */
function tail(name) {
  return name.slice(name.lastIndexOf("/") + 1) || name;
}
