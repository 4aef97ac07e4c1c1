// Two linked maps of a gallery, the teacher's and the student's: what is selected in one is selected in the other.
// Nothing a visitor selects leaves the browser.

import { showSelection, showTip } from "./map_cards.js";
import { SIDES, make, percent } from "./map_elements.js";
import { buildFrame } from "./map_frame.js";
import { groupByClass, groupByRight } from "./map_groups.js";
import { showLegend } from "./map_legend.js";
import { addStyle, fetchMap, loadPlotly, waitForStyle } from "./map_loading.js";
import { Plots, paint } from "./map_plots.js";

const mounts = new WeakMap();

/**
 * Draw the maps into `element`; an earlier mount there is taken down first.
 *
 * options.data      address of the map's JSON; `method=pca|umap` is added to its query; HTTP 202 means "ask again"
 * options.thumbs    what stands before an image's number in the address of its thumbnail, such as "thumb/"
 * options.names     optional {teacher, student}: what the two are called beside their titles
 * options.onselect  optional, called with the numbers of the selected images, ascending
 * options.start     optional, what state() of an earlier mount returned: the same method, colours and selection again
 *
 * Returns {select(ids), clear(), state(), destroy()}. `element.dataset.ready` is the method that is drawn, and
 * `element.dataset.selected` the selected numbers with commas between them.
 */
export function mount(element, options) {
  mounts.get(element)?.destroy();
  const maps = new LinkedMaps(element, options);
  const handle = {
    select: (ids) => maps.select(ids),
    clear: () => maps.select([]),
    state: () => ({ method: maps.method, by: maps.by, selected: maps.selected }),
    destroy: () => maps.destroy(),
  };
  mounts.set(element, handle);
  maps.start();
  return handle;
}

class LinkedMaps {
  constructor(element, { data, thumbs, names = {}, onselect = null, start = {} }) {
    this.element = element;
    this.address = data;
    this.thumbs = thumbs;
    this.onselect = onselect;
    this.maps = {}; // method -> its JSON
    this.method = null; // the one that is drawn
    this.wanted = start.method ?? "pca";
    this.by = start.by ?? null;
    this.selected = start.selected ?? [];
    this.ended = new AbortController(); // everything that listens or waits ends with it
    this.frame = buildFrame(element, names, {
      choose: (method) => this.draw((this.wanted = method)),
      colour: (by) => this.colour(by),
      clear: () => this.select([]),
    });
    this.plots = new Plots(this.frame);
    addStyle();
  }

  async start() {
    const { signal } = this.ended;
    this.say("Loading the map…");
    try {
      await waitForStyle(this.element, signal); // what nobody looks at is not computed either
      const [map] = await Promise.all([
        fetchMap(this.address, "pca", signal, (message) => this.say(message)),
        loadPlotly(),
      ]);
      if (signal.aborted) return;
      this.maps.pca = map;
      this.frame.methods.pca.input.disabled = false;
      this.prepare(map);
      this.draw("pca");
      this.listen();
    } catch (error) {
      if (!signal.aborted) this.say(`The map can't be shown: ${error.message}`, true);
      return;
    }
    await this.startUmap();
  }

  async startUmap() {
    const { signal } = this.ended;
    const { input, wait } = this.frame.methods.umap;
    const began = Date.now();
    wait.textContent = "being computed";
    try {
      this.maps.umap = await fetchMap(this.address, "umap", signal, (message) => {
        wait.textContent = message || `being computed, ${Math.round((Date.now() - began) / 1000)} s so far`;
      });
      wait.textContent = "";
      input.disabled = false;
      if (this.wanted === "umap") this.draw("umap");
    } catch (error) {
      if (!signal.aborted) wait.textContent = `can't be had: ${error.message}`;
    }
  }

  say(words, wrong = false) {
    const { message } = this.frame;
    message.textContent = words || "Loading the map…";
    message.hidden = false;
    message.classList.toggle("map-wrong", wrong);
  }

  prepare(map) {
    const { chooser, chooserLabel } = this.frame;
    this.images = map;
    const choices = [
      [map.labels, "class", "class"],
      [map.overlap, "overlap", `neighbour overlap@${map.k}`],
      [map.right, "right", "which side is right"],
    ].filter(([values]) => values);
    chooser.replaceChildren(...choices.map(([, value, words]) => Object.assign(make("option", "", words), { value })));
    chooserLabel.hidden = choices.length < 1;
    const kinds = choices.map(([, value]) => value);
    this.by = kinds.includes(this.by) ? this.by : (kinds[0] ?? null);
    if (this.by) chooser.value = this.by;
    this.selected = this.selected.filter((id) => id < map.n);
    this.element.dataset.selected = this.selected.join(",");
    this.groups = { class: groupByClass(map), right: groupByRight(map) };
  }

  draw(method) {
    const { frame } = this;
    const map = this.maps[method];
    this.method = method;
    frame.methods[method].input.checked = true;
    frame.message.hidden = true;
    frame.pair.hidden = false;
    frame.selection.hidden = false;
    this.leave();
    const drawing = this.plots.draw(map, method, paint(this.element, this), this.selected);
    SIDES.forEach((side, i) => {
      const variance = map.variance ? `these two axes: ${percent(map.variance[i])} of its variance` : "";
      frame.variances[side].textContent = variance;
    });
    frame.note.textContent =
      `The student's map is turned, mirrored and brought to the teacher's size to lie over it (Procrustes). ` +
      `Disparity ${map.disparity.toFixed(3)} on a scale from 0, the same shape, to 1, nothing in common.` +
      (method === "umap" ? " UMAP keeps near images near; distances between far groups say little." : "");
    this.show();
    drawing.then(() => {
      if (!this.ended.signal.aborted) this.element.dataset.ready = method;
    });
  }

  colour(by) {
    this.by = by;
    this.plots.colour(paint(this.element, this).colours);
    this.show();
  }

  show() {
    showLegend(this.frame.legend, this, (ids) => this.select(ids));
    this.showSelection();
  }

  showSelection() {
    showSelection(this.frame, this, { point: (id) => this.point(id), leave: () => this.leave() });
  }

  listen() {
    const { signal } = this.ended;
    this.plots.listen(this.frame.pair, signal, {
      select: (ids, options) => this.select(ids, options),
      point: (id, event) => this.point(id, event),
      leave: () => this.leave(),
    });
    document.addEventListener(
      "keydown",
      (event) => {
        if (event.key === "Escape" && this.selected.length && this.element.checkVisibility()) this.select([]);
      },
      { signal },
    );
    const repaint = () => {
      this.plots.repaint(paint(this.element, this).theme);
      if (this.by) this.colour(this.by);
    };
    this.themes = new MutationObserver(repaint);
    for (const root of [document.documentElement, document.body]) {
      this.themes.observe(root, { attributes: true, attributeFilter: ["class"] });
    }
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint, { signal });
    let request = 0;
    this.sizes = new ResizeObserver(() => {
      cancelAnimationFrame(request);
      request = requestAnimationFrame(() => {
        this.leave();
        this.plots.resize();
      });
    });
    this.sizes.observe(this.frame.pair);
  }

  select(ids, { adding = false } = {}) {
    if (!this.method) return; // nothing is drawn yet
    const { n } = this.images;
    const numbers = new Set(adding ? [...this.selected, ...ids] : ids);
    this.selected = [...numbers].filter((id) => Number.isInteger(id) && id >= 0 && id < n).sort((a, b) => a - b);
    this.plots.mark(this.selected);
    this.element.dataset.selected = this.selected.join(",");
    this.showSelection();
    this.onselect?.([...this.selected]);
  }

  /** Ring an image in both maps; beside the pointer, where there is one, say which it is. */
  point(id, event = null) {
    this.plots.ring(id);
    if (event) showTip(this.frame, this, id, event);
  }

  leave() {
    this.frame.tip.hidden = true;
    this.plots.unring();
  }

  destroy() {
    this.ended.abort();
    this.themes?.disconnect();
    this.sizes?.disconnect();
    this.plots.destroy();
    this.element.replaceChildren();
    this.element.classList.remove("mvmr-map");
    delete this.element.dataset.ready;
    delete this.element.dataset.selected;
    mounts.delete(this.element);
  }
}
