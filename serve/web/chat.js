// The chat: sends the conversation to /v1/chat/completions and shows the answer token by token.

import { requestJson, streamEvents } from "./api.js";
import { $, h } from "./dom.js";
import { TokenStrip } from "./strip.js";
import { groupTokens } from "./token_groups.js";

const TOP_LOGPROBS = 5;
const WAIT_NOTICE_MS = 2000; // time without a token after which a notice appears

let turns = []; // {role, content}, as in the API
let running = null; // an AbortController during an answer

export function start({ model, report }) {
  const log = $("log");
  const message = $("message");

  function messages() {
    const system = $("system").value.trim();
    return [...(system ? [{ role: "system", content: system }] : []), ...turns];
  }

  function settings() {
    const names = { temperature: "temperature", top_p: "top-p", max_tokens: "max-tokens", seed: "seed" };
    const present = Object.entries(names).filter(([, id]) => $(id).value !== "");
    return Object.fromEntries(present.map(([name, id]) => [name, Number($(id).value)]));
  }

  function turn(role, ...children) {
    const messageText = h("div", { class: "message-text" }, ...children);
    const element = h("div", { class: `turn ${role}` }, messageText);
    $("hello").hidden = true;
    log.append(element);
    return { element, messageText };
  }

  function refresh() {
    const isBusy = running !== null;
    $("send").hidden = isBusy;
    $("stop").hidden = !isBusy;
    for (const id of ["again", "clear", "show-prompt"]) $(id).disabled = isBusy || !turns.length;
  }

  function followEnd() {
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 120;
    return () => isAtEnd && (log.scrollTop = log.scrollHeight);
  }

  async function answer() {
    report(null);
    const { element, messageText } = turn("assistant");
    log.scrollTop = log.scrollHeight;
    element.setAttribute("aria-busy", "true");
    messageText.classList.toggle("coloured", $("colour").checked);
    const strip = new TokenStrip(messageText);
    messageText.setAttribute("aria-label", "Answer, token by token");
    running = new AbortController();
    refresh();
    const notice = h("p", { class: "note", hidden: true });
    notice.textContent = "Waiting for the first token: the model is loading or busy.";
    element.append(notice);
    const noticeTimer = setTimeout(() => (notice.hidden = false), WAIT_NOTICE_MS);
    const startTime = performance.now();
    let firstTime = null;
    let [text, count, reason] = ["", 0, ""];
    const thoughts = h("div");
    const reasoning = h("details", { class: "reasoning" }, h("summary", {}, "Reasoning"), thoughts);
    // Tokens are added to the page once per frame, so that each frame has one layout.
    let pendingNodes = [];
    let frame = 0;
    const flush = () => {
      frame = 0;
      const scrollToEnd = followEnd();
      messageText.append(...pendingNodes);
      pendingNodes = [];
      scrollToEnd();
    };
    try {
      const body = { model: model(), messages: messages(), ...settings() };
      const options = { logprobs: true, top_logprobs: TOP_LOGPROBS };
      const events = streamEvents("/v1/chat/completions", { ...body, ...options }, running.signal);
      for await (const event of events) {
        const choice = event.choices[0];
        if (!choice) continue;
        reason = choice.finish_reason ?? reason;
        const { content, reasoning_content: thought } = choice.delta;
        if (!content && !thought) continue;
        if (firstTime === null) {
          firstTime = performance.now();
          clearTimeout(noticeTimer);
          notice.remove();
        }
        if (thought) {
          const scrollToEnd = followEnd();
          if (!reasoning.isConnected) messageText.before(reasoning);
          thoughts.append(thought);
          scrollToEnd();
          continue;
        }
        text += content;
        for (const group of groupTokens(choice.logprobs.content)) {
          count += group.tokens.length;
          pendingNodes.push(strip.add(group.text, group.tokens));
        }
        frame ||= requestAnimationFrame(flush);
      }
    } catch (error) {
      reason = error.name === "AbortError" ? "stopped" : "failed";
      if (reason === "failed") report(error.message);
    }
    clearTimeout(noticeTimer);
    notice.remove();
    cancelAnimationFrame(frame);
    flush();
    running = null;
    element.removeAttribute("aria-busy");
    const scrollToEnd = followEnd();
    if (text || reasoning.isConnected) {
      turns.push({ role: "assistant", content: text });
      element.append(h("p", { class: "stats" }, stats(startTime, firstTime, count, reason)));
      $("answer-status").textContent = `Answer of ${count} tokens: ${text}`;
    } else {
      element.remove();
      if (reason === "stop") report("The model generated an empty answer. Ask again, or change the question.");
    }
    scrollToEnd();
    refresh();
  }

  function stats(startTime, firstTime, count, reason) {
    const seconds = (performance.now() - firstTime) / 1000;
    const ends = { stop: "", length: "maximum length reached", stopped: "stopped", failed: "incomplete" };
    return [
      `${count} ${count === 1 ? "token" : "tokens"}`,
      `first after ${((firstTime - startTime) / 1000).toFixed(2)} s`,
      count > 1 && seconds > 0 ? `${((count - 1) / seconds).toFixed(0)} tokens/s` : "",
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
    for (const messageText of log.querySelectorAll(".assistant .message-text")) {
      messageText.classList.toggle("coloured", $("colour").checked);
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

  const promptStrip = new TokenStrip($("prompt-strip"), { isList: true });
  $("show-prompt").addEventListener("click", async () => {
    const prompt = turns.at(-1)?.role === "assistant" ? messages().slice(0, -1) : messages();
    try {
      const body = { model: model(), messages: prompt, with_pieces: true };
      const result = await requestJson("/tokenize", body);
      promptStrip.clear();
      for (const { text, tokens } of groupTokens(result.tokens.map(tokenFromPiece))) {
        $("prompt-strip").append(promptStrip.add(text, tokens));
      }
      $("prompt-counts").textContent =
        `${result.count} tokens; the context length is ${result.max_model_len}, including the answer`;
      $("prompt-dialog").showModal();
    } catch (error) {
      report(error.message);
    }
  });
  refresh();
}

/** Show the sampling settings that a model uses where a field is empty. */
export function showDefaults(sampling = {}) {
  $("temperature").placeholder = sampling.temperature ?? "";
  $("top-p").placeholder = sampling.top_p ?? "";
  const all = Object.entries(sampling).map(([name, value]) => `${name} ${value}`);
  $("defaults").textContent = all.length ? `Model defaults: ${all.join(", ")}` : "";
}

/** Convert a token of /tokenize with_pieces to the format of `groupTokens`. */
export function tokenFromPiece({ id, piece, special }) {
  const isText = typeof piece === "string";
  const bytes = isText ? [...new TextEncoder().encode(piece)] : piece;
  return { id, bytes, token: isText ? piece : byteToken(piece), special };
}

/** Name a token that is part of a character, as logprobs do: `bytes:\xc3`. */
function byteToken(bytes) {
  return "bytes:" + bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
}
