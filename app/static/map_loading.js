// What has to be there before a map can be drawn: its JSON, Plotly, its style sheet, and a place on the screen.

import { make } from "./map_elements.js";

let plotly = null; // a promise of it
let webgl = null; // whether the browser has it

/** The JSON of a map; asks again while the server answers 202, and passes on what it says meanwhile. */
export async function fetchMap(path, method, signal, waiting) {
  const address = new URL(path, document.baseURI);
  address.searchParams.set("method", method);
  for (let pause = 500; ; pause = Math.min(pause * 1.5, 5000)) {
    let answer;
    try {
      answer = await fetch(address, { signal });
    } catch (error) {
      if (signal.aborted) throw error;
      throw new Error("the app does not answer. Check that it is running, then reload the page.");
    }
    if (answer.status === 200) return answer.json();
    const message = await readMessage(answer);
    if (answer.status !== 202) throw new Error(message || `the app answered HTTP ${answer.status}.`);
    waiting(message);
    await sleep(pause, signal);
  }
}

/** What an answer says to people: plain text, or the message of its JSON. */
async function readMessage(answer) {
  const text = await answer.text();
  if (answer.headers.get("content-type")?.startsWith("text/plain")) return text;
  try {
    return JSON.parse(text).message ?? "";
  } catch {
    return "";
  }
}

function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}

export function loadPlotly() {
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

export function hasWebGL() {
  if (webgl === null) {
    const context = document.createElement("canvas").getContext("webgl");
    webgl = context !== null;
    context?.getExtension("WEBGL_lose_context")?.loseContext(); // a page has few of them
  }
  return webgl;
}

export function addStyle() {
  const address = new URL("map.css", import.meta.url).href;
  if ([...document.styleSheets].some((sheet) => sheet.href === address)) return;
  if ([...document.querySelectorAll("link[rel=stylesheet]")].some((link) => link.href === address)) return;
  document.head.append(Object.assign(make("link"), { rel: "stylesheet", href: address }));
}

/** Resolves once the element has its style and is on the screen: a plot is drawn in the size it finds. */
export function waitForStyle(element, signal) {
  return new Promise((resolve, reject) => {
    const look = () => {
      if (signal.aborted) reject(signal.reason);
      else if (element.clientWidth && getComputedStyle(element).containerType === "inline-size") resolve();
      else setTimeout(look, 100);
    };
    look();
  });
}
