// What the parts of the maps share: the two sides, elements, and numbers in words.

export const SIDES = ["teacher", "student"];

export function make(tag, name = "", ...content) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...content);
  return element;
}

export function many(count) {
  return count.toLocaleString("en");
}

export function percent(value) {
  return `${value.toFixed(1)}\u00a0%`;
}

/** Whether the visitor points with a finger. */
export function coarse() {
  return window.matchMedia("(pointer: coarse)").matches;
}
