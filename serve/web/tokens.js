// The tokenizer: text as the model sees it, how likely it finds each token, and what might follow.

import { call } from "./api.js";
import { $, h, later, percent, visible } from "./dom.js";
import { fromPiece } from "./chat.js";
import { pieces } from "./pieces.js";
import { Strip } from "./strip.js";

const MOST = 1500; // tokens that are shown
const FOLLOWING = 10;

export function start({ model, report }) {
  const strip = new Strip($("strip"), { isList: true });
  let scored = null; // the text whose probabilities are on show
  let asking = null; // an AbortController while something is asked

  async function refresh() {
    const text = $("text").value;
    asking?.abort();
    asking = new AbortController();
    try {
      const body = { model: model(), text, with_pieces: true };
      const found = await call("/tokenize", body, asking.signal);
      const tokens = found.tokens.map(fromPiece);
      show(tokens);
      const bytes = new TextEncoder().encode(text).length;
      $("counts").textContent =
        `${found.count} tokens · ${[...text].length} characters · ${bytes} bytes` +
        (tokens.length > MOST ? ` · the first ${MOST} are shown` : "");
      report(null);
      if ($("score").checked && found.count < found.max_model_len) await score(tokens);
      else follow([]);
    } catch (problem) {
      if (problem.name !== "AbortError") report(problem.message);
    }
  }

  /** Asks for one token more than there are: the prompt's probabilities come with it. */
  async function score(tokens) {
    const text = $("text").value;
    const prompt = tokens.length ? tokens.map((token) => token.id) : "";
    const body = { model: model(), prompt, echo: true, max_tokens: 1, temperature: 0 };
    const answer = await call(
      "/v1/completions",
      { ...body, logprobs: FOLLOWING },
      asking.signal,
    );
    const { token_logprobs: chosen, top_logprobs: tops } = answer.choices[0].logprobs;
    tokens.forEach((token, at) => {
      token.logprob = chosen[at];
      token.top_logprobs = Object.entries(tops[at] ?? {}).map(([token, logprob]) => ({ token, logprob }));
    });
    scored = text;
    show(tokens);
    const next = Object.entries(tops[tokens.length] ?? {});
    follow(next.sort(([, a], [, b]) => b - a).slice(0, FOLLOWING));
  }

  function show(tokens) {
    strip.ids = $("ids").checked;
    strip.clear();
    const isScored = tokens.some((token) => token.logprob != null);
    $("strip").classList.toggle("coloured", isScored);
    const groups = pieces(tokens.slice(0, MOST));
    $("strip").append(...groups.map(({ text, tokens }) => strip.add(text, tokens)));
  }

  function follow(next) {
    $("next").replaceChildren(
      ...next.map(([text, logprob]) => {
        const bar = h("span", { class: "bar" });
        bar.style.width = `${Math.exp(logprob) * 100}%`;
        const isText = !text.startsWith("bytes:");
        return h(
          "li",
          {},
          h(
            "button",
            { type: "button", disabled: !isText, onclick: () => append(text) },
            bar,
            h("span", { class: "word" }, visible(text)),
            h("span", { class: "chance" }, percent(logprob)),
          ),
        );
      }),
    );
    const sum = next.reduce((total, [, logprob]) => total + Math.exp(logprob), 0);
    $("covered").textContent = next.length
      ? `Together ${(sum * 100).toFixed(0)} % of what might follow.`
      : "Turn on “Colour by probability” to see them.";
  }

  function append(text) {
    $("text").value += text;
    refresh();
    $("text").focus();
  }

  const soon = later(250, refresh);
  $("text").addEventListener("input", soon);
  $("ids").addEventListener("change", refresh);
  $("score").addEventListener("change", refresh);
  return { refresh, isStale: () => scored !== $("text").value };
}
