// Tokens in a row. Each can be pointed at, or reached with the arrow keys, and then says how likely
// it was and what else might have stood there; Enter keeps that open, Escape closes it.

import { $, h, percent, readable, visible } from "./dom.js";

/** How likely, in five steps: the classes q0 (hardly) to q4 (almost surely). */
function step(logprob) {
  const p = Math.exp(logprob);
  return p < 0.05 ? "q0" : p < 0.2 ? "q1" : p < 0.5 ? "q2" : p < 0.8 ? "q3" : "q4";
}

/**
 * One token: `{text, bytes, id, logprob, top: [{text, logprob}], special}`; all but text may be
 * missing. Several tokens that spell one character share a button: none of them is text alone.
 */
export class Strip {
  constructor(element, { isList = false } = {}) {
    this.element = element;
    this.isList = isList; // tokens side by side, rather than a text to read
    this.ids = false;
    this.groups = [];
    element.setAttribute("role", element.getAttribute("role") ?? "group");
    element.addEventListener("keydown", (event) => this.#key(event));
    element.addEventListener("mouseover", (event) => this.#point(event.target));
    element.addEventListener("focusin", (event) => this.#point(event.target));
    element.addEventListener("mouseout", () => pinned ?? hide());
    element.addEventListener("focusout", () => hide());
    element.addEventListener("click", (event) => this.#pin(event.target));
  }

  clear() {
    this.groups = [];
    this.element.replaceChildren();
    hide();
  }

  /** Adds tokens that spell a text together; usually one. */
  add(text, tokens) {
    const likely = tokens.filter((token) => token.logprob != null);
    const least = Math.min(...likely.map((token) => token.logprob));
    // Not a <button>: that is a box, and text would not flow through it.
    const button = h(
      "span",
      {
        role: "button",
        class: `token ${likely.length ? step(least) : ""} ${tokens[0].special ? "special" : ""}`,
        tabindex: this.groups.length ? -1 : 0,
        "data-at": this.groups.length,
        "aria-label": this.#name(text, tokens),
      },
      ...readable(text, this.isList),
      this.ids ? h("small", {}, tokens.map((token) => token.id).join(" ")) : null,
    );
    this.groups.push({ text, tokens, button });
    return button;
  }

  #name(text, tokens) {
    let name = `token ${this.groups.length + 1}, ${visible(text)}`;
    if (tokens[0].id != null) name += `, id ${tokens.map((token) => token.id).join(" and ")}`;
    if (tokens[0].logprob != null) name += `, probability ${percent(tokens[0].logprob)}`;
    const others = (tokens[0].top ?? []).filter((other) => other.text !== tokens[0].text);
    if (others.length) name += `, else ${visible(others[0].text)} ${percent(others[0].logprob)}`;
    return name;
  }

  #group(target) {
    const button = target.closest?.(".token");
    return button && this.groups[button.dataset.at];
  }

  #point(target) {
    const group = this.#group(target);
    if (group && !pinned) show(group);
  }

  #pin(target) {
    const group = this.#group(target);
    if (!group) return;
    const isSame = pinned === group.button;
    hide();
    if (!isSame) {
      show(group);
      pinned = group.button;
      pinned.classList.add("pinned");
      $("tip").classList.add("pinned");
    }
    this.#focus(group.button);
  }

  #focus(button) {
    this.element.querySelector('[tabindex="0"]')?.setAttribute("tabindex", -1);
    button.setAttribute("tabindex", 0);
    button.focus({ preventScroll: false });
  }

  #key(event) {
    const group = this.#group(event.target);
    if (!group || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = Number(group.button.dataset.at);
    const last = this.groups.length - 1;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      hide();
      this.#focus(this.groups[Math.max(0, Math.min(last, to))].button);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.#pin(event.target);
    } else if (event.key === "Escape") {
      hide();
    }
  }
}

let pinned = null;

function hide() {
  pinned?.classList.remove("pinned");
  pinned = null;
  $("tip").hidden = true;
  $("tip").classList.remove("pinned");
}

function show({ text, tokens, button }) {
  const tip = $("tip");
  tip.replaceChildren(...tokens.map((token) => table(text, token, tokens.length > 1)));
  tip.hidden = false;
  const place = button.getClientRects()[0] ?? button.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, place.left), innerWidth - width - 8);
  const isAbove = place.bottom + height + 12 > innerHeight && place.top > height + 12;
  tip.style.left = `${Math.max(left, 8)}px`;
  tip.style.top = `${isAbove ? place.top - height - 8 : place.bottom + 8}px`;
}

function table(text, token, isPart) {
  const about = [];
  if (isPart) about.push(`part of ${visible(text)}`);
  if (token.id != null) about.push(`id ${token.id}`);
  if (token.bytes) about.push(`${token.bytes.length > 1 ? "bytes" : "byte"} ${hex(token.bytes)}`);
  if (token.logprob == null && token.top) about.push("the first: nothing foretold it");
  const rows = [...(token.top ?? [])].sort((a, b) => b.logprob - a.logprob);
  if (token.logprob != null && !rows.some((row) => row.text === token.text)) rows.push(token);
  return h(
    "table",
    {},
    h("caption", {}, `${visible(token.text)}${about.length ? " · " : ""}${about.join(" · ")}`),
    ...rows.map((row) => {
      const bar = h("div");
      bar.style.width = `${Math.exp(row.logprob) * 100}%`;
      return h(
        "tr",
        { class: row.text === token.text ? "chosen" : null },
        h("th", { scope: "row" }, visible(row.text)),
        h("td", { class: "track" }, bar),
        h("td", { class: "chance" }, percent(row.logprob)),
      );
    }),
  );
}

function hex(bytes) {
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
}
