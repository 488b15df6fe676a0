// Create elements, and display text that may contain any character.

/** Create an element: `h("button", {class: "primary", onclick: f}, "Send")`. Text is not parsed as HTML. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

export const $ = (id) => document.getElementById(id);

// Control characters, zero-width characters, and those that change the direction of writing.
const INVISIBLE = /[\u0000-\u0009\u000b-\u001f\u007f-\u00a0\u00ad\u061c\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff\ufff9-\ufffb]/gu;
const INVISIBLE_OR_LINE_END = new RegExp(`${INVISIBLE.source}|\\n`, "gu");

function escaped(character) {
  if (character === "\t") return "\\t";
  if (character === "\r") return "\\r";
  return "\\u" + character.codePointAt(0).toString(16).padStart(4, "0");
}

/** Return text on one line, with invisible characters, spaces and line ends as symbols. */
export function visible(text) {
  return text.replace(INVISIBLE, escaped).replaceAll("\n", "\\n").replaceAll(" ", "␣");
}

/** Return text as a list of nodes, with invisible characters as escapes. */
export function readable(text, showsLineEnds = false) {
  const nodes = [];
  let last = 0;
  for (const match of text.matchAll(showsLineEnds ? INVISIBLE_OR_LINE_END : INVISIBLE)) {
    const symbol = match[0] === "\n" ? "↵" : escaped(match[0]);
    nodes.push(text.slice(last, match.index), h("span", { class: "escape" }, symbol));
    if (match[0] === "\n") nodes.push("\n");
    last = match.index + match[0].length;
  }
  return [...nodes, text.slice(last)];
}

/** Format the probability of a logprob: 42 %, 0.3 %, <0.1 %. */
export function percent(logprob) {
  const p = Math.exp(logprob) * 100;
  if (p >= 9.95) return `${Math.min(p, 100).toFixed(0)} %`;
  return p >= 0.1 ? `${p.toFixed(1)} %` : "<0.1 %";
}

/** Return a function that calls `f` when it has not been called for some milliseconds. */
export function debounce(milliseconds, f) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(f, milliseconds);
  };
}
