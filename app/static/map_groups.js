// Groups of images that share a colour: {name, variable, images, labels, choices?}; `variable` is one of map.css.

import { many } from "./map_elements.js";

const MOST_COLOURS = 20; // of classes; the rest share one grey

// Which side's classifier is right on an image, by the number that stands in the map's JSON.
export const RIGHT = ["neither right", "teacher only", "student only", "both right"];

export function groupByClass({ labels, classes }) {
  if (!labels) return [];
  const images = new Map();
  labels.forEach((label, image) => {
    if (!images.has(label)) images.set(label, []);
    images.get(label).push(image);
  });
  const present = [...images.keys()].sort((a, b) => a - b);
  // The most frequent ones have a colour of their own; in the legend they stand in the classes' own order.
  const frequent = [...present].sort((a, b) => images.get(b).length - images.get(a).length || a - b);
  const coloured = new Set(present.length > MOST_COLOURS ? frequent.slice(0, MOST_COLOURS) : present);
  const groups = present
    .filter((label) => coloured.has(label))
    .map((label, i) => ({
      name: classes[label],
      variable: `--map-class-${i}`,
      images: images.get(label),
      labels: new Set([label]),
    }));
  const grey = present.filter((label) => !coloured.has(label));
  if (grey.length) {
    groups.push({
      name: `${grey.length} other ${grey.length === 1 ? "class" : "classes"}…`,
      variable: "--map-other",
      images: grey.flatMap((label) => images.get(label)),
      labels: new Set(grey),
      choices: grey.map((label) => [label, `${classes[label]} (${many(images.get(label).length)})`]),
    });
  }
  return groups;
}

export function groupByRight({ right }) {
  if (!right) return [];
  const images = RIGHT.map(() => []);
  right.forEach((code, image) => images[code].push(image));
  const variables = ["--map-other", "--teacher", "--student", "--shared"];
  return [3, 1, 2, 0].map((code) => ({ name: RIGHT[code], variable: variables[code], images: images[code] }));
}
