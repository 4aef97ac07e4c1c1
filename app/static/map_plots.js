// The two plots: drawn by Plotly, zoomed and panned together, with a ring round the image that is pointed at.

import { SIDES, coarse, many } from "./map_elements.js";
import { hasWebGL } from "./map_loading.js";

export class Plots {
  /** Take the elements that Plotly draws in and the rings that lie over them, both by side. */
  constructor({ plots, rings }) {
    this.plots = plots;
    this.rings = rings;
    this.map = null; // the JSON of the one that is drawn
    this.marking = 0; // selections that are being drawn
  }

  /** Draw a map; the promise is kept when both sides are on the screen. */
  draw(map, method, { colours, theme }, selected) {
    this.map = map;
    const type = hasWebGL() ? "scattergl" : "scatter";
    const layout = layoutOf(map, method, theme);
    const drawings = SIDES.map((side) => {
      const trace = {
        type,
        mode: "markers",
        x: map[side][0],
        y: map[side][1],
        hoverinfo: "none",
        selectedpoints: selected.length ? selected : null,
        marker: { ...colours, size: dotSize(map.n), opacity: 0.9 },
        ...emphasis(map.n, selected.length),
      };
      return window.Plotly.react(this.plots[side], [trace], structuredClone(layout), {
        displaylogo: false,
        displayModeBar: true,
        modeBarButtons: [["lasso2d", "select2d", "pan2d", "zoom2d", "resetScale2d"]],
        doubleClick: "reset",
        showTips: false,
      });
    });
    for (const side of SIDES) {
      this.plots[side].setAttribute("role", "img");
      this.plots[side].setAttribute("aria-label", `Map of ${many(map.n)} images as the ${side} sees them`);
    }
    return Promise.all(drawings);
  }

  colour(colours) {
    const change = { "marker.color": [colours.color], "marker.colorscale": [colours.colorscale ?? null] };
    if (colours.colorscale) Object.assign(change, { "marker.cmin": 0, "marker.cmax": 100 });
    for (const side of SIDES) window.Plotly.restyle(this.plots[side], change);
  }

  /** Draw what belongs to the page's light or dark theme anew. */
  repaint(theme) {
    for (const side of SIDES) {
      window.Plotly.relayout(this.plots[side], {
        "xaxis.gridcolor": theme.grid,
        "yaxis.gridcolor": theme.grid,
        "newselection.line.color": theme.ink,
        "modebar.color": theme.muted,
        "modebar.activecolor": theme.ink,
      });
    }
  }

  resize() {
    for (const side of SIDES) {
      if (this.plots[side].clientWidth) window.Plotly.Plots.resize(this.plots[side]);
    }
  }

  mark(selected) {
    const styles = emphasis(this.map.n, selected.length);
    const change = {
      selectedpoints: [selected.length ? selected : null],
      selected: [styles.selected],
      unselected: [styles.unselected],
    };
    this.marking += 1; // Plotly tells of these changes as if the visitor had made them
    const marks = SIDES.map((side) => window.Plotly.update(this.plots[side], change, { selections: [] }));
    Promise.all(marks).finally(() => (this.marking -= 1));
  }

  /** Hear of a visitor who selects images, `select(ids, {adding})`, points at one, `point(id, event)`, or at none. */
  listen(pair, signal, { select, point, leave }) {
    let adding = false;
    pair.addEventListener("pointerdown", (event) => (adding = event.shiftKey), { signal, capture: true });
    // Plotly keeps the line that was drawn after it has told of it: select once it is done with the gesture.
    const selectLater = (points, more) => {
      clearTimeout(this.waiting);
      this.waiting = setTimeout(() => select(points.map((entry) => entry.pointNumber), more), 0);
    };
    for (const side of SIDES) {
      const plot = this.plots[side];
      plot.on("plotly_click", (event) => select([event.points[0].pointNumber], { adding }));
      plot.on("plotly_selected", (event) => {
        if (!this.marking && event) selectLater(event.points, { adding });
      });
      plot.on("plotly_deselect", () => {
        if (!this.marking) selectLater([], { adding: false });
      });
      plot.on("plotly_hover", (event) => point(event.points[0].pointNumber, event.event));
      plot.on("plotly_unhover", leave);
      plot.on("plotly_relayout", (change) => this.follow(side, change, leave));
    }
  }

  /** Zoom and pan the other map to where this one has gone, and take the same tool there. */
  follow(side, change, leave) {
    const twin = this.plots[side === "teacher" ? "student" : "teacher"];
    if ("dragmode" in change && twin.layout.dragmode !== change.dragmode) {
      window.Plotly.relayout(twin, { dragmode: change.dragmode });
    }
    if (!Object.keys(change).some((key) => /^[xy]axis\.(range|autorange)/.test(key))) return;
    leave();
    const [from, to] = [this.plots[side].layout, twin.layout];
    const same = ["xaxis", "yaxis"].every((axis) =>
      [0, 1].every((end) => Math.abs(from[axis].range[end] - to[axis].range[end]) < 1e-9),
    );
    if (same) return;
    window.Plotly.relayout(twin, { "xaxis.range": [...from.xaxis.range], "yaxis.range": [...from.yaxis.range] });
  }

  ring(id) {
    for (const side of SIDES) {
      const { xaxis, yaxis } = this.plots[side]._fullLayout;
      const [x, y] = [xaxis.l2p(this.map[side][0][id]), yaxis.l2p(this.map[side][1][id])];
      const inside = x >= 0 && y >= 0 && x <= xaxis._length && y <= yaxis._length;
      const ring = this.rings[side];
      ring.style.transform = `translate(${x + xaxis._offset}px, ${y + yaxis._offset}px)`;
      ring.classList.toggle("map-on", inside);
    }
  }

  unring() {
    for (const side of SIDES) this.rings[side].classList.remove("map-on");
  }

  destroy() {
    clearTimeout(this.waiting);
    for (const side of SIDES) window.Plotly?.purge(this.plots[side]);
  }
}

/** The colours of the points and of the theme, as the style of `element` has them; view: {images, groups, by}. */
export function paint(element, { images, groups, by }) {
  const style = getComputedStyle(element);
  const read = (name) => style.getPropertyValue(name).trim();
  const theme = { ink: read("--ink"), muted: read("--muted"), grid: read("--grid") };
  if (by === "overlap") {
    const stops = [0, 1, 2, 3, 4].map((i) => [i / 4, read(`--map-scale-${i}`)]);
    return { theme, colours: { color: images.overlap, cmin: 0, cmax: 100, colorscale: stops } };
  }
  if (by === null) return { theme, colours: { color: read("--shared") } };
  const paints = groups[by].map((group) => read(group.variable));
  const colour = new Array(images.n);
  groups[by].forEach((group, i) => group.images.forEach((image) => (colour[image] = paints[i])));
  return { theme, colours: { color: colour } };
}

function layoutOf(map, method, theme) {
  const axis = { showticklabels: false, ticks: "", zeroline: false, nticks: 7, gridcolor: theme.grid, gridwidth: 1 };
  const home = ranges(map);
  return {
    margin: { l: 0, r: 0, t: 28, b: 0 }, // its buttons would lie on points
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    xaxis: { ...axis, range: home.x },
    yaxis: { ...axis, range: home.y, scaleanchor: "x" },
    showlegend: false,
    // A finger that would scroll the page must not draw on the map, unless the visitor has asked for that.
    dragmode: coarse() ? false : "lasso",
    hovermode: "closest",
    hoverdistance: 12,
    clickmode: "event",
    selections: [],
    newselection: { line: { color: theme.ink, width: 1.2, dash: "solid" } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: theme.muted, activecolor: theme.ink, orientation: "h" },
    uirevision: method,
  };
}

/** Few selected points are drawn larger; of many images, those not selected are drawn paler. */
function emphasis(n, count) {
  const size = dotSize(n);
  const larger = count > 2000 ? size : count > 200 ? Math.max(size + 1.5, 5.5) : Math.max(size + 3, 8);
  const pale = Math.min(0.12, Math.max(0.04, 5 / Math.sqrt(n)));
  return { selected: { marker: { opacity: 1, size: larger } }, unselected: { marker: { opacity: pale } } };
}

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
