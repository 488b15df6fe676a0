// The chat: what is said goes to /v1/chat/completions, and comes back token by token.

import { call, stream } from "./api.js";
import { $, h } from "./dom.js";
import { pieces } from "./pieces.js";
import { Strip } from "./strip.js";

const ALTERNATIVES = 5;
const PATIENCE = 2000; // milliseconds before a word on why nothing comes

let turns = []; // {role, content} as the API takes them
let running = null; // an AbortController while an answer comes

export function start({ model, report }) {
  const log = $("log");
  const message = $("message");

  function messages() {
    const system = $("system").value.trim();
    return [...(system ? [{ role: "system", content: system }] : []), ...turns];
  }

  function settings() {
    const names = { temperature: "temperature", top_p: "top-p", max_tokens: "max-tokens", seed: "seed" };
    const given = Object.entries(names).filter(([, id]) => $(id).value !== "");
    return Object.fromEntries(given.map(([name, id]) => [name, Number($(id).value)]));
  }

  function turn(role, ...children) {
    const said = h("div", { class: "said" }, ...children);
    const element = h("div", { class: `turn ${role}` }, said);
    $("hello").hidden = true;
    log.append(element);
    return { element, said };
  }

  function refresh() {
    const isBusy = running !== null;
    $("send").hidden = isBusy;
    $("stop").hidden = !isBusy;
    for (const id of ["again", "clear", "show-prompt"]) $(id).disabled = isBusy || !turns.length;
  }

  function follow() {
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 120;
    return () => isAtEnd && (log.scrollTop = log.scrollHeight);
  }

  async function answer() {
    report(null);
    const { element, said } = turn("assistant");
    log.scrollTop = log.scrollHeight;
    element.setAttribute("aria-busy", "true");
    said.classList.toggle("coloured", $("colour").checked);
    const strip = new Strip(said);
    said.setAttribute("aria-label", "Answer, token by token");
    running = new AbortController();
    refresh();
    const patience = h("p", { class: "note", hidden: true });
    patience.textContent = "Waiting for the first token: the model is being loaded, or is busy.";
    element.append(patience);
    const waitingLong = setTimeout(() => (patience.hidden = false), PATIENCE);
    const began = performance.now();
    let first = null;
    let [text, count, reason] = ["", 0, ""];
    // What comes between two frames is put on the page at once: one layout, however fast it comes.
    let waiting = [];
    let frame = 0;
    const draw = () => {
      frame = 0;
      const keepUp = follow();
      said.append(...waiting);
      waiting = [];
      keepUp();
    };
    try {
      const body = { model: model(), messages: messages(), ...settings() };
      const options = { logprobs: true, top_logprobs: ALTERNATIVES };
      const events = stream("/v1/chat/completions", { ...body, ...options }, running.signal);
      for await (const event of events) {
        const choice = event.choices[0];
        if (!choice) continue;
        reason = choice.finish_reason ?? reason;
        if (!choice.delta.content) continue;
        if (first === null) {
          first = performance.now();
          clearTimeout(waitingLong);
          patience.remove();
        }
        text += choice.delta.content;
        for (const piece of pieces(choice.logprobs.content)) {
          count += piece.tokens.length;
          waiting.push(strip.add(piece.text, piece.tokens));
        }
        frame ||= requestAnimationFrame(draw);
      }
    } catch (problem) {
      reason = problem.name === "AbortError" ? "stopped" : "failed";
      if (reason === "failed") report(problem.message);
    }
    clearTimeout(waitingLong);
    patience.remove();
    cancelAnimationFrame(frame);
    draw();
    running = null;
    element.removeAttribute("aria-busy");
    const keepUp = follow();
    if (text) {
      turns.push({ role: "assistant", content: text });
      element.append(h("p", { class: "figures" }, figures(began, first, count, reason)));
      $("said").textContent = `Answer of ${count} tokens: ${text}`;
    } else {
      element.remove();
      if (reason === "stop") report("The model ended its answer before the first word.");
    }
    keepUp();
    refresh();
  }

  function figures(began, first, count, reason) {
    const seconds = (performance.now() - first) / 1000;
    const ends = { stop: "", length: "longest answer reached", stopped: "stopped", failed: "broken off" };
    return [
      `${count} ${count === 1 ? "token" : "tokens"}`,
      `first after ${((first - began) / 1000).toFixed(2)} s`,
      count > 1 && seconds > 0 ? `then ${((count - 1) / seconds).toFixed(0)} a second` : "",
      ends[reason] ?? reason,
    ]
      .filter(Boolean)
      .join(" · ");
  }

  function send(content) {
    if (running || !content.trim()) return;
    turn("user", content);
    turns.push({ role: "user", content });
    message.value = "";
    grow();
    answer();
  }

  function grow() {
    message.style.height = "auto";
    message.style.height = `${message.scrollHeight}px`;
  }

  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(message.value);
  });
  message.addEventListener("input", grow);
  message.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send(message.value);
    }
  });
  for (const idea of document.querySelectorAll(".idea")) {
    idea.addEventListener("click", () => send(idea.textContent));
  }
  $("stop").addEventListener("click", () => {
    running?.abort();
    message.focus();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  $("colour").addEventListener("change", () => {
    for (const said of log.querySelectorAll(".assistant .said")) {
      said.classList.toggle("coloured", $("colour").checked);
    }
  });
  $("again").addEventListener("click", () => {
    if (turns.at(-1)?.role === "assistant") {
      turns.pop();
      log.querySelector(".turn:last-child")?.remove();
    }
    answer();
  });
  $("clear").addEventListener("click", () => {
    turns = [];
    for (const element of log.querySelectorAll(".turn")) element.remove();
    $("hello").hidden = false;
    report(null);
    refresh();
    message.focus();
  });

  const promptStrip = new Strip($("prompt-strip"), { isList: true });
  $("show-prompt").addEventListener("click", async () => {
    const asked = turns.at(-1)?.role === "assistant" ? messages().slice(0, -1) : messages();
    try {
      const body = { model: model(), messages: asked, with_pieces: true };
      const found = await call("/tokenize", body);
      promptStrip.clear();
      for (const { text, tokens } of pieces(found.tokens.map(fromPiece))) {
        $("prompt-strip").append(promptStrip.add(text, tokens));
      }
      $("prompt-counts").textContent =
        `${found.count} of at most ${found.max_model_len} tokens, answer included`;
      $("prompt-dialog").showModal();
    } catch (problem) {
      report(problem.message);
    }
  });
  refresh();
}

/** What a model samples with where a setting is left empty. */
export function showDefaults(sampling = {}) {
  $("temperature").placeholder = sampling.temperature ?? "";
  $("top-p").placeholder = sampling.top_p ?? "";
  const all = Object.entries(sampling).map(([name, value]) => `${name} ${value}`);
  $("defaults").textContent = all.length ? `Left empty, the model's own: ${all.join(", ")}` : "";
}

/** A token of /tokenize with_pieces, as `pieces` takes it. */
export function fromPiece({ id, piece, special }) {
  const isText = typeof piece === "string";
  const bytes = isText ? [...new TextEncoder().encode(piece)] : piece;
  return { id, bytes, token: isText ? piece : spelled(piece), special };
}

/** Part of a character, as logprobs name it: `bytes:\xc3`. */
function spelled(bytes) {
  return "bytes:" + bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
}
