// Two linked maps of a gallery, the teacher's and the student's: what is selected in one is selected in the other.
// Nothing a visitor selects leaves the browser.

const MOST_THUMBS = 60;
const MOST_COLOURS = 20; // of classes; the rest share one grey
const SIDES = ["teacher", "student"];
const RIGHT = ["neither right", "teacher only", "student only", "both right"];
const mounted = new WeakMap();
let plotly = null; // a promise of it
let webgl = null; // whether the browser has it
let mounts = 0;

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
  mounted.get(element)?.destroy();
  const made = new LinkedMaps(element, options);
  const handle = {
    select: (ids) => made.select(ids),
    clear: () => made.select([]),
    state: () => ({ method: made.method, by: made.by, selected: made.selected }),
    destroy: () => made.destroy(),
  };
  mounted.set(element, handle);
  made.start();
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
    this.marking = 0; // selections that are being drawn
    this.plots = {}; // side -> the element Plotly draws in
    this.ended = new AbortController(); // everything that listens or waits ends with it
    this.build(names);
  }

  // ---- the page around the plots

  build(names) {
    const { element } = this;
    element.replaceChildren();
    element.classList.add("mvmr-map");
    element.removeAttribute("data-ready");
    element.dataset.selected = "";
    addStyle();
    const group = `map-method-${(mounts += 1)}`;
    this.methods = {};
    const methods = make("fieldset", "map-method", make("legend", "map-unseen", "Kind of map"));
    for (const method of ["pca", "umap"]) {
      const input = make("input");
      Object.assign(input, { type: "radio", name: group, value: method, disabled: true });
      input.addEventListener("change", () => this.draw((this.wanted = method)));
      const wait = make("span", "map-wait");
      methods.append(make("label", "", input, make("span", "", method.toUpperCase()), wait));
      this.methods[method] = { input, wait };
    }
    this.chooser = make("select");
    this.chooser.addEventListener("change", () => this.colour(this.chooser.value));
    this.chooserLabel = make("label", "map-by", "Colour by ", this.chooser);
    this.chooserLabel.hidden = true;
    this.legend = make("div", "map-legend");
    this.message = make("p", "map-message");
    this.message.setAttribute("role", "status");
    this.pair = make("div", "map-pair");
    this.pair.hidden = true;
    this.shown = {};
    this.rings = {};
    for (const side of SIDES) {
      this.shown[side] = make("span", "map-variance");
      this.plots[side] = make("div", "map-plot");
      this.rings[side] = make("div", "map-ring");
      const title = make("span", "", make("b", `map-${side}`, side === "teacher" ? "Teacher" : "Student"));
      if (names[side]) title.append(make("span", "map-name", names[side]));
      const caption = make("figcaption", "", title, this.shown[side]);
      this.pair.append(make("figure", "map-side", caption, make("div", "map-box", this.plots[side], this.rings[side])));
    }
    this.tip = make("div", "map-tip");
    this.tip.hidden = true;
    this.pair.append(this.tip);
    this.note = make("p", "map-note");
    this.count = make("p", "map-count");
    this.count.setAttribute("role", "status");
    const clear = make("button", "map-clear", "Clear", make("kbd", "", "Esc"));
    clear.type = "button";
    clear.addEventListener("click", () => this.select([]));
    this.clearButton = clear;
    this.list = make("ul", "map-thumbs");
    this.more = make("p", "map-more");
    this.selection = make("section", "map-selection", make("div", "map-head", this.count, clear), this.list, this.more);
    this.selection.setAttribute("aria-label", "Selected images");
    this.selection.hidden = true;
    element.append(
      make("div", "map-bar", methods, this.chooserLabel),
      this.legend,
      this.message,
      this.pair,
      this.note,
      this.selection,
    );
  }

  async start() {
    this.say("Loading the map…");
    try {
      await styled(this.element, this.ended.signal); // what nobody looks at is not computed either
      const [map] = await Promise.all([this.fetched("pca", (words) => this.say(words)), loadPlotly()]);
      if (this.ended.signal.aborted) return;
      this.maps.pca = map;
      this.methods.pca.input.disabled = false;
      this.prepare(map);
      this.draw("pca");
      this.listen();
    } catch (error) {
      if (!this.ended.signal.aborted) this.say(`The map can't be shown: ${error.message}`, true);
      return;
    }
    const { input, wait } = this.methods.umap;
    const began = Date.now();
    wait.textContent = "being computed";
    try {
      this.maps.umap = await this.fetched("umap", (words) => {
        wait.textContent = words || `being computed, ${Math.round((Date.now() - began) / 1000)} s so far`;
      });
      wait.textContent = "";
      input.disabled = false;
      if (this.wanted === "umap") this.draw("umap");
    } catch (error) {
      if (!this.ended.signal.aborted) wait.textContent = `can't be had: ${error.message}`;
    }
  }

  /** The JSON of a map; asks again while the server answers 202, and passes on what it says meanwhile. */
  async fetched(method, waiting) {
    const address = new URL(this.address, document.baseURI);
    address.searchParams.set("method", method);
    const { signal } = this.ended;
    for (let pause = 500; ; pause = Math.min(pause * 1.5, 5000)) {
      let answer;
      try {
        answer = await fetch(address, { signal });
      } catch (error) {
        if (signal.aborted) throw error;
        throw new Error("the app does not answer. Check that it is running, then reload the page.");
      }
      if (answer.status === 200) return answer.json();
      const said = await saidIn(answer);
      if (answer.status !== 202) throw new Error(said || `the app answered HTTP ${answer.status}.`);
      waiting(said);
      await pausing(pause, signal);
    }
  }

  say(words, wrong = false) {
    this.message.textContent = words || "Loading the map…";
    this.message.hidden = false;
    this.message.classList.toggle("map-wrong", wrong);
  }

  prepare(map) {
    this.images = map;
    const choices = [
      [map.labels, "class", "class"],
      [map.overlap, "overlap", `neighbour overlap@${map.k}`],
      [map.right, "right", "which side is right"],
    ].filter(([there]) => there);
    this.chooser.replaceChildren(
      ...choices.map(([, value, words]) => Object.assign(make("option", "", words), { value })),
    );
    this.chooserLabel.hidden = choices.length < 1;
    const values = choices.map(([, value]) => value);
    this.by = values.includes(this.by) ? this.by : (values[0] ?? null);
    if (this.by) this.chooser.value = this.by;
    this.selected = this.selected.filter((id) => id < map.n);
    this.element.dataset.selected = this.selected.join(",");
    this.groups = { class: classGroups(map), right: rightGroups(map) };
  }

  // ---- the plots

  draw(method) {
    const map = this.maps[method];
    const Plotly = window.Plotly;
    this.method = method;
    this.methods[method].input.checked = true;
    this.message.hidden = true;
    this.pair.hidden = false;
    this.selection.hidden = false;
    this.leave();
    this.home = ranges(map);
    const { colours, theme } = this.painted();
    const type = hasWebGL() ? "scattergl" : "scatter";
    const drawn = SIDES.map((side) => {
      const plot = this.plots[side];
      const trace = {
        type,
        mode: "markers",
        x: map[side][0],
        y: map[side][1],
        hoverinfo: "none",
        selectedpoints: this.selected.length ? this.selected : null,
        marker: { ...colours, size: dotSize(map.n), opacity: 0.9 },
        ...this.emphasis(),
      };
      return Plotly.react(plot, [trace], this.layout(theme), {
        displaylogo: false,
        displayModeBar: true,
        modeBarButtons: [["lasso2d", "select2d", "pan2d", "zoom2d", "resetScale2d"]],
        doubleClick: "reset",
        showTips: false,
      });
    });
    SIDES.forEach((side, i) => {
      this.shown[side].textContent = map.variance ? `these two axes: ${percent(map.variance[i])} of its variance` : "";
      this.plots[side].setAttribute("role", "img");
      this.plots[side].setAttribute("aria-label", `Map of ${many(map.n)} images as the ${side} sees them`);
    });
    this.note.textContent =
      `The student's map is turned, mirrored and brought to the teacher's size to lie over it (Procrustes). ` +
      `Disparity ${map.disparity.toFixed(3)} on a scale from 0, the same shape, to 1, nothing in common.` +
      (method === "umap" ? " UMAP keeps near images near; distances between far groups say little." : "");
    this.showLegend();
    this.showSelection();
    Promise.all(drawn).then(() => {
      if (!this.ended.signal.aborted) this.element.dataset.ready = method;
    });
  }

  layout(theme) {
    const axis = {
      showticklabels: false,
      ticks: "",
      zeroline: false,
      nticks: 7,
      gridcolor: theme.grid,
      gridwidth: 1,
    };
    return {
      margin: { l: 0, r: 0, t: 28, b: 0 }, // its buttons would lie on points
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      xaxis: { ...axis, range: [...this.home.x] },
      yaxis: { ...axis, range: [...this.home.y], scaleanchor: "x" },
      showlegend: false,
      dragmode: this.dragmode(),
      hovermode: "closest",
      hoverdistance: 12,
      clickmode: "event",
      selections: [],
      newselection: { line: { color: theme.ink, width: 1.2, dash: "solid" } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: theme.muted, activecolor: theme.ink, orientation: "h" },
      uirevision: this.method,
    };
  }

  /** A finger that would scroll the page must not draw on the map, unless the visitor has asked for that. */
  dragmode() {
    return coarse() ? false : "lasso";
  }

  /** Few selected points are drawn larger; of many images, those not selected are drawn paler. */
  emphasis() {
    const { n } = this.images;
    const size = dotSize(n);
    const count = this.selected.length;
    const larger = count > 2000 ? size : count > 200 ? Math.max(size + 1.5, 5.5) : Math.max(size + 3, 8);
    const pale = Math.min(0.12, Math.max(0.04, 5 / Math.sqrt(n)));
    return { selected: { marker: { opacity: 1, size: larger } }, unselected: { marker: { opacity: pale } } };
  }

  painted() {
    const style = getComputedStyle(this.element);
    const read = (name) => style.getPropertyValue(name).trim();
    const theme = { ink: read("--ink"), muted: read("--muted"), grid: read("--grid") };
    const map = this.images;
    if (this.by === "overlap") {
      const stops = [0, 1, 2, 3, 4].map((i) => [i / 4, read(`--map-scale-${i}`)]);
      return { theme, colours: { color: map.overlap, cmin: 0, cmax: 100, colorscale: stops } };
    }
    if (this.by === null) return { theme, colours: { color: read("--shared") } };
    const groups = this.groups[this.by];
    const paints = groups.map((group) => read(group.variable));
    const colour = new Array(map.n);
    groups.forEach((group, i) => group.images.forEach((image) => (colour[image] = paints[i])));
    return { theme, colours: { color: colour } };
  }

  colour(by) {
    this.by = by;
    const { colours } = this.painted();
    const change = { "marker.color": [colours.color], "marker.colorscale": [colours.colorscale ?? null] };
    if (colours.colorscale) Object.assign(change, { "marker.cmin": 0, "marker.cmax": 100 });
    for (const side of SIDES) window.Plotly.restyle(this.plots[side], change);
    this.showLegend();
    this.showSelection();
  }

  listen() {
    const { signal } = this.ended;
    let adding = false;
    this.pair.addEventListener("pointerdown", (event) => (adding = event.shiftKey), { signal, capture: true });
    for (const side of SIDES) {
      const plot = this.plots[side];
      plot.on("plotly_click", (event) => this.select([event.points[0].pointNumber], { adding }));
      plot.on("plotly_selected", (event) => {
        if (!this.marking && event) this.later(event.points.map((point) => point.pointNumber), adding);
      });
      plot.on("plotly_deselect", () => {
        if (!this.marking) this.later([], false);
      });
      plot.on("plotly_hover", (event) => this.point(event.points[0].pointNumber, event.event));
      plot.on("plotly_unhover", () => this.leave());
      plot.on("plotly_relayout", (change) => this.follow(side, change));
    }
    document.addEventListener(
      "keydown",
      (event) => {
        if (event.key === "Escape" && this.selected.length && this.element.checkVisibility()) this.select([]);
      },
      { signal },
    );
    const repaint = () => {
      const { theme } = this.painted();
      for (const side of SIDES) {
        window.Plotly.relayout(this.plots[side], {
          "xaxis.gridcolor": theme.grid,
          "yaxis.gridcolor": theme.grid,
          "newselection.line.color": theme.ink,
          "modebar.color": theme.muted,
          "modebar.activecolor": theme.ink,
        });
      }
      if (this.by) this.colour(this.by);
    };
    this.themes = new MutationObserver(repaint);
    for (const root of [document.documentElement, document.body]) {
      this.themes.observe(root, { attributes: true, attributeFilter: ["class"] });
    }
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint, { signal });
    let asked = 0;
    this.sizes = new ResizeObserver(() => {
      cancelAnimationFrame(asked);
      asked = requestAnimationFrame(() => {
        this.leave();
        for (const side of SIDES) {
          if (this.plots[side].clientWidth) window.Plotly.Plots.resize(this.plots[side]);
        }
      });
    });
    this.sizes.observe(this.pair);
  }

  /** Zoom and pan the other map to where this one has gone, and take the same tool there. */
  follow(side, change) {
    const other = this.plots[side === "teacher" ? "student" : "teacher"];
    if ("dragmode" in change && other.layout.dragmode !== change.dragmode) {
      window.Plotly.relayout(other, { dragmode: change.dragmode });
    }
    if (!Object.keys(change).some((key) => /^[xy]axis\.(range|autorange)/.test(key))) return;
    this.leave();
    const [from, to] = [this.plots[side].layout, other.layout];
    const same = ["xaxis", "yaxis"].every((axis) =>
      [0, 1].every((end) => Math.abs(from[axis].range[end] - to[axis].range[end]) < 1e-9),
    );
    if (same) return;
    window.Plotly.relayout(other, { "xaxis.range": [...from.xaxis.range], "yaxis.range": [...from.yaxis.range] });
  }

  // ---- what is selected

  /** Select once Plotly is done with the gesture: it keeps the line that was drawn after it has told of it. */
  later(ids, adding) {
    clearTimeout(this.waiting);
    this.waiting = setTimeout(() => this.select(ids, { adding }), 0);
  }

  select(ids, { adding = false } = {}) {
    if (!this.method) return; // nothing is drawn yet
    const { n } = this.images;
    const chosen = new Set(adding ? [...this.selected, ...ids] : ids);
    this.selected = [...chosen].filter((id) => Number.isInteger(id) && id >= 0 && id < n).sort((a, b) => a - b);
    const { selected, unselected } = this.emphasis();
    const change = {
      selectedpoints: [this.selected.length ? this.selected : null],
      selected: [selected],
      unselected: [unselected],
    };
    this.marking += 1; // Plotly tells of these changes as if the visitor had made them
    const marked = SIDES.map((side) => window.Plotly.update(this.plots[side], change, { selections: [] }));
    Promise.all(marked).finally(() => (this.marking -= 1));
    this.element.dataset.selected = this.selected.join(",");
    this.showSelection();
    this.onselect?.([...this.selected]);
  }

  showSelection() {
    const { selected, images } = this;
    const { overlap, n, k, right } = images;
    this.clearButton.hidden = !selected.length;
    this.list.replaceChildren();
    this.more.textContent = "";
    if (!selected.length) {
      const how = coarse() ? "Tap a point, or take the lasso of a map and" : "Click a point, or";
      this.count.textContent = `${how} draw round several: the same images are marked in the other map and shown here.`;
      return;
    }
    const words = [`${many(selected.length)} of ${many(n)} images`];
    if (overlap) {
      const mean = (ids) => ids.reduce((sum, id) => sum + overlap[id], 0) / ids.length;
      words.push(`overlap@${k} ${percent(mean(selected))} (all images: ${percent(mean([...overlap.keys()]))})`);
    }
    if (right) {
      const share = (code) => selected.filter((id) => right[id] === code || right[id] === 3).length / selected.length;
      words.push(`teacher right on ${percent(100 * share(1))}, student on ${percent(100 * share(2))}`);
    }
    this.count.textContent = words.join(" · ");
    const order = overlap ? [...selected].sort((a, b) => overlap[a] - overlap[b] || a - b) : selected;
    this.list.append(...order.slice(0, MOST_THUMBS).map((id) => this.card(id)));
    const rest = selected.length - MOST_THUMBS;
    if (rest > 0) {
      this.more.textContent = `and ${many(rest)} more${overlap ? ", whose neighbours overlap as much or more" : ""}`;
    }
  }

  card(id) {
    const card = make("li", "map-card", this.thumbnail(id), make("span", "map-key", tail(this.images.keys[id])));
    card.title = this.images.keys[id];
    card.dataset.image = id;
    card.append(...this.facts(id));
    card.addEventListener("pointerenter", () => this.point(id));
    card.addEventListener("pointerleave", () => this.leave());
    return card;
  }

  facts(id) {
    const { labels, classes, overlap, right } = this.images;
    const facts = [];
    if (labels) {
      const dot = make("i", "map-dot");
      const group = this.groups.class.find((each) => each.labels.has(labels[id]));
      dot.style.background = `var(${group.variable})`;
      facts.push(make("span", "map-fact", ...(this.by === "class" ? [dot] : []), classes[labels[id]] ?? ""));
    }
    if (overlap) facts.push(make("span", "map-fact", `overlap ${percent(overlap[id])}`));
    if (right) facts.push(make("span", "map-fact", RIGHT[right[id]]));
    return facts;
  }

  thumbnail(id) {
    const image = make("img");
    image.loading = "lazy";
    image.alt = "";
    image.addEventListener("load", () => {
      image.classList.toggle("map-tiny", image.naturalWidth * 2 <= image.clientWidth);
    });
    image.src = `${this.thumbs}${id}`;
    return image;
  }

  /** Ring an image in both maps; beside the pointer, where there is one, say which it is. */
  point(id, event = null) {
    const map = this.maps[this.method];
    for (const side of SIDES) {
      const { xaxis, yaxis } = this.plots[side]._fullLayout;
      const [x, y] = [xaxis.l2p(map[side][0][id]), yaxis.l2p(map[side][1][id])];
      const inside = x >= 0 && y >= 0 && x <= xaxis._length && y <= yaxis._length;
      const ring = this.rings[side];
      ring.style.transform = `translate(${x + xaxis._offset}px, ${y + yaxis._offset}px)`;
      ring.classList.toggle("map-on", inside);
    }
    if (!event) return;
    const words = make("div", "", make("span", "map-key", tail(this.images.keys[id])), ...this.facts(id));
    this.tip.replaceChildren(this.thumbnail(id), words);
    this.tip.hidden = false;
    const box = this.pair.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const { offsetWidth: width, offsetHeight: height } = this.tip;
    const left = x + 18 + width > box.width ? Math.max(0, x - 18 - width) : x + 18;
    this.tip.style.transform = `translate(${left}px, ${Math.max(0, Math.min(y - height / 2, box.height - height))}px)`;
  }

  leave() {
    this.tip.hidden = true;
    for (const side of SIDES) this.rings[side].classList.remove("map-on");
  }

  // ---- the legend

  showLegend() {
    const { by, images } = this;
    this.legend.replaceChildren();
    if (by === "overlap") {
      this.legend.append(
        make("span", "", "0 %"),
        make("span", "map-ramp"),
        make("span", "", "100 %"),
        make("span", "map-legend-words", `of an image's ${images.k} nearest neighbours are the same for both`),
      );
      return;
    }
    for (const group of by ? this.groups[by] : []) {
      if (!group.images.length) continue;
      const dot = make("i", "map-dot");
      dot.style.background = `var(${group.variable})`;
      if (group.choices) {
        const select = make("select", "", make("option", "", group.name));
        select.setAttribute("aria-label", "Select the images of another class");
        for (const [label, name] of group.choices) {
          select.append(Object.assign(make("option", "", name), { value: String(label) }));
        }
        select.addEventListener("change", () => {
          this.select(group.images.filter((image) => images.labels[image] === Number(select.value)));
          select.selectedIndex = 0;
        });
        this.legend.append(make("label", "map-other", dot, select));
        continue;
      }
      const count = by === "right" ? percent((100 * group.images.length) / images.n) : many(group.images.length);
      const button = make("button", "map-entry", dot, make("span", "", group.name), make("small", "", count));
      button.type = "button";
      button.title = `Select these ${many(group.images.length)} images`;
      button.addEventListener("click", () => this.select(group.images));
      this.legend.append(button);
    }
  }

  destroy() {
    this.ended.abort();
    clearTimeout(this.waiting);
    this.themes?.disconnect();
    this.sizes?.disconnect();
    for (const side of SIDES) window.Plotly?.purge(this.plots[side]);
    this.element.replaceChildren();
    this.element.classList.remove("mvmr-map");
    delete this.element.dataset.ready;
    delete this.element.dataset.selected;
    mounted.delete(this.element);
  }
}

// ---- groups of images that share a colour: {name, variable, images, labels, choices?}

function classGroups({ labels, classes }) {
  if (!labels) return [];
  const images = new Map();
  labels.forEach((label, image) => {
    if (!images.has(label)) images.set(label, []);
    images.get(label).push(image);
  });
  const found = [...images.keys()].sort((a, b) => a - b);
  // The most frequent ones have a colour of their own; in the legend they stand in the classes' own order.
  const frequent = [...found].sort((a, b) => images.get(b).length - images.get(a).length || a - b);
  const own = new Set(found.length > MOST_COLOURS ? frequent.slice(0, MOST_COLOURS) : found);
  const groups = found
    .filter((label) => own.has(label))
    .map((label, i) => ({
      name: classes[label],
      variable: `--map-class-${i}`,
      images: images.get(label),
      labels: new Set([label]),
    }));
  const others = found.filter((label) => !own.has(label));
  if (others.length) {
    groups.push({
      name: `${others.length} other ${others.length === 1 ? "class" : "classes"}…`,
      variable: "--map-other",
      images: others.flatMap((label) => images.get(label)),
      labels: new Set(others),
      choices: others.map((label) => [label, `${classes[label]} (${many(images.get(label).length)})`]),
    });
  }
  return groups;
}

function rightGroups({ right }) {
  if (!right) return [];
  const images = RIGHT.map(() => []);
  right.forEach((code, image) => images[code].push(image));
  const variables = ["--map-other", "--teacher", "--student", "--shared"];
  return [3, 1, 2, 0].map((code) => ({ name: RIGHT[code], variable: variables[code], images: images[code] }));
}

// ---- small things

/** The same square for both maps, with a margin, so that a place is the same place in both. */
function ranges(map) {
  const ends = [0, 1].map((axis) => {
    const values = SIDES.flatMap((side) => map[side][axis]);
    return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  });
  const half = (Math.max(...ends.map(([low, high]) => high - low)) / 2 || 1) * 1.06;
  const [x, y] = ends.map(([low, high]) => [(low + high) / 2 - half, (low + high) / 2 + half]);
  return { x, y };
}

function dotSize(n) {
  return Math.min(9, Math.max(3, 13.4 - 2.27 * Math.log10(n)));
}

function many(count) {
  return count.toLocaleString("en");
}

function percent(value) {
  return `${value.toFixed(1)}\u00a0%`;
}

/** The last part of an image's name, which is the part that differs; the style sheet cuts what is too long. */
function tail(name) {
  return name.slice(name.lastIndexOf("/") + 1) || name;
}

function make(tag, name = "", ...content) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...content);
  return element;
}

function pausing(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}

/** Whether the visitor points with a finger. */
function coarse() {
  return window.matchMedia("(pointer: coarse)").matches;
}

/** What an answer says to people: plain text, or the message of its JSON. */
async function saidIn(answer) {
  const text = await answer.text();
  if (answer.headers.get("content-type")?.startsWith("text/plain")) return text;
  try {
    return JSON.parse(text).message ?? "";
  } catch {
    return "";
  }
}

function hasWebGL() {
  if (webgl === null) {
    const context = document.createElement("canvas").getContext("webgl");
    webgl = context !== null;
    context?.getExtension("WEBGL_lose_context")?.loseContext(); // a page has few of them
  }
  return webgl;
}

function loadPlotly() {
  plotly ??= window.Plotly
    ? Promise.resolve()
    : new Promise((resolve, reject) => {
        const script = make("script");
        script.src = new URL("plotly.min.js", import.meta.url);
        script.onload = resolve;
        script.onerror = () => {
          plotly = null;
          reject(new Error("plotly.min.js could not be loaded. Reload the page."));
        };
        document.head.append(script);
      });
  return plotly;
}

function addStyle() {
  const address = new URL("map.css", import.meta.url).href;
  if ([...document.styleSheets].some((sheet) => sheet.href === address)) return;
  if ([...document.querySelectorAll("link[rel=stylesheet]")].some((link) => link.href === address)) return;
  document.head.append(Object.assign(make("link"), { rel: "stylesheet", href: address }));
}

/** Resolves once the element has its style and is on the screen: a plot is drawn in the size it finds. */
function styled(element, signal) {
  return new Promise((resolve, reject) => {
    const look = () => {
      if (signal.aborted) reject(signal.reason);
      else if (element.clientWidth && getComputedStyle(element).containerType === "inline-size") resolve();
      else setTimeout(look, 100);
    };
    look();
  });
}
