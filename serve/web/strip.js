// A row of tokens. Pointing at a token, or moving to it with the arrow keys, shows its probability
// and its alternatives; Enter keeps them open, Escape closes them.

import { $, h, percent, readable, visible } from "./dom.js";

/** Return the CSS class for a probability, from q0 (unlikely) to q4 (almost certain). */
function probabilityClass(logprob) {
  const p = Math.exp(logprob);
  return p < 0.05 ? "q0" : p < 0.2 ? "q1" : p < 0.5 ? "q2" : p < 0.8 ? "q3" : "q4";
}

/**
 * A row of buttons, one for each group of tokens that decodes to whole characters. A token is
 * `{text, bytes, id, logprob, top: [{text, logprob}], special}`; only text is required.
 */
export class TokenStrip {
  constructor(element, { isList = false } = {}) {
    this.element = element;
    this.isList = isList; // separate tokens instead of flowing text
    this.showsIds = false;
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

  /** Add a group of tokens that decode to `text`; usually one token. */
  add(text, tokens) {
    const scored = tokens.filter((token) => token.logprob != null);
    const lowest = Math.min(...scored.map((token) => token.logprob));
    // Not a <button>, which is a box that text does not flow through.
    const button = h(
      "span",
      {
        role: "button",
        class: `token ${scored.length ? probabilityClass(lowest) : ""} ${tokens[0].special ? "special" : ""}`,
        tabindex: this.groups.length ? -1 : 0,
        "data-index": this.groups.length,
        "aria-label": this.#name(text, tokens),
      },
      ...readable(text, this.isList),
      this.showsIds ? h("small", {}, tokens.map((token) => token.id).join(" ")) : null,
    );
    this.groups.push({ text, tokens, button });
    return button;
  }

  #name(text, tokens) {
    let name = `token ${this.groups.length + 1}, ${visible(text)}`;
    if (tokens[0].id != null) name += `, id ${tokens.map((token) => token.id).join(" and ")}`;
    if (tokens[0].logprob != null) name += `, probability ${percent(tokens[0].logprob)}`;
    const alternatives = (tokens[0].top ?? []).filter((top) => top.text !== tokens[0].text);
    if (alternatives.length) {
      const { text: alternative, logprob } = alternatives[0];
      name += `, alternative ${visible(alternative)} ${percent(logprob)}`;
    }
    return name;
  }

  #group(target) {
    const button = target.closest?.(".token");
    return button && this.groups[button.dataset.index];
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
    const index = Number(group.button.dataset.index);
    const last = this.groups.length - 1;
    const next = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: last }[event.key];
    if (next !== undefined) {
      event.preventDefault();
      hide();
      this.#focus(this.groups[Math.max(0, Math.min(last, next))].button);
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
  const box = button.getClientRects()[0] ?? button.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), innerWidth - width - 8);
  const isAbove = box.bottom + height + 12 > innerHeight && box.top > height + 12;
  tip.style.left = `${Math.max(left, 8)}px`;
  tip.style.top = `${isAbove ? box.top - height - 8 : box.bottom + 8}px`;
}

function table(text, token, isPart) {
  const details = [];
  if (isPart) details.push(`part of ${visible(text)}`);
  if (token.id != null) details.push(`id ${token.id}`);
  if (token.bytes) details.push(`${token.bytes.length > 1 ? "bytes" : "byte"} ${hex(token.bytes)}`);
  if (token.logprob == null && token.top) details.push("first token: no prediction");
  const rows = [...(token.top ?? [])].sort((a, b) => b.logprob - a.logprob);
  if (token.logprob != null && !rows.some((row) => row.text === token.text)) rows.push(token);
  return h(
    "table",
    {},
    h("caption", {}, `${visible(token.text)}${details.length ? " · " : ""}${details.join(" · ")}`),
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
