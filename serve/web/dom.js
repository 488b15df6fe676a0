// Making elements, and showing text that may hold anything.

/** An element: `h("button", {class: "primary", onclick: f}, "Send")`. Children are never parsed. */
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

// Control characters, zero-width ones, and those that turn the direction of writing.
const UNSEEN = /[\u0000-\u0009\u000b-\u001f\u007f-\u00a0\u00ad\u061c\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff\ufff9-\ufffb]/gu;
const UNSEEN_OR_LINE_END = new RegExp(`${UNSEEN.source}|\\n`, "gu");

function escaped(character) {
  if (character === "\t") return "\\t";
  if (character === "\r") return "\\r";
  return "\\u" + character.codePointAt(0).toString(16).padStart(4, "0");
}

/** Text in which nothing is unseen: for one line, spaces and line ends too. */
export function visible(text) {
  return text.replace(UNSEEN, escaped).replaceAll("\n", "\\n").replaceAll(" ", "␣");
}

/** Text as it reads, with what cannot be seen as escapes: a list of nodes. */
export function readable(text, showsLineEnds = false) {
  const nodes = [];
  let last = 0;
  for (const match of text.matchAll(showsLineEnds ? UNSEEN_OR_LINE_END : UNSEEN)) {
    const shown = match[0] === "\n" ? "↵" : escaped(match[0]);
    nodes.push(text.slice(last, match.index), h("span", { class: "escape" }, shown));
    if (match[0] === "\n") nodes.push("\n");
    last = match.index + match[0].length;
  }
  return [...nodes, text.slice(last)];
}

/** A probability as people say it: 42 %, 0.3 %, <0.1 %. */
export function percent(logprob) {
  const p = Math.exp(logprob) * 100;
  if (p >= 9.95) return `${Math.min(p, 100).toFixed(0)} %`;
  return p >= 0.1 ? `${p.toFixed(1)} %` : "<0.1 %";
}

/** Calls a function once nothing has called this for a while. */
export function later(milliseconds, f) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(f, milliseconds);
  };
}
