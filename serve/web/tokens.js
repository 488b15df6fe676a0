// The token page: a text as tokens, their probabilities, and the likeliest next tokens.

import { requestJson } from "./api.js";
import { $, debounce, h, percent, visible } from "./dom.js";
import { tokenFromPiece } from "./chat.js";
import { TokenStrip } from "./strip.js";
import { groupTokens } from "./token_groups.js";

const MAX_TOKENS_SHOWN = 1500;
const NUM_NEXT_TOKENS = 10;

export function start({ model, report }) {
  const strip = new TokenStrip($("strip"), { isList: true });
  let scoredText = null; // the text whose probabilities are shown
  let running = null; // an AbortController during a request

  async function refresh() {
    const text = $("text").value;
    running?.abort();
    running = new AbortController();
    try {
      const body = { model: model(), text, with_pieces: true };
      const result = await requestJson("/tokenize", body, running.signal);
      const tokens = result.tokens.map(tokenFromPiece);
      show(tokens);
      const bytes = new TextEncoder().encode(text).length;
      $("counts").textContent =
        `${result.count} tokens · ${[...text].length} characters · ${bytes} bytes` +
        (tokens.length > MAX_TOKENS_SHOWN ? ` · showing the first ${MAX_TOKENS_SHOWN}` : "");
      report(null);
      if ($("score").checked && result.count < result.max_model_len) await score(tokens);
      else showNext([]);
    } catch (error) {
      if (error.name !== "AbortError") report(error.message);
    }
  }

  /** Get the probabilities: requests one more token, with the logprobs of the prompt. */
  async function score(tokens) {
    const text = $("text").value;
    const prompt = tokens.length ? tokens.map((token) => token.id) : "";
    const body = { model: model(), prompt, echo: true, max_tokens: 1, temperature: 0 };
    const completion = await requestJson(
      "/v1/completions",
      { ...body, logprobs: NUM_NEXT_TOKENS },
      running.signal,
    );
    const { token_logprobs: chosen, top_logprobs: tops } = completion.choices[0].logprobs;
    tokens.forEach((token, index) => {
      token.logprob = chosen[index];
      token.top_logprobs = Object.entries(tops[index] ?? {}).map(([token, logprob]) => ({ token, logprob }));
    });
    scoredText = text;
    show(tokens);
    const next = Object.entries(tops[tokens.length] ?? {});
    showNext(next.sort(([, a], [, b]) => b - a).slice(0, NUM_NEXT_TOKENS));
  }

  function show(tokens) {
    strip.showsIds = $("ids").checked;
    strip.clear();
    const isScored = tokens.some((token) => token.logprob != null);
    $("strip").classList.toggle("coloured", isScored);
    const groups = groupTokens(tokens.slice(0, MAX_TOKENS_SHOWN));
    $("strip").append(...groups.map(({ text, tokens }) => strip.add(text, tokens)));
  }

  function showNext(next) {
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
      ? `Together these tokens have a probability of ${(sum * 100).toFixed(0)} %.`
      : "Select “Colour by probability” to see them.";
  }

  function append(text) {
    $("text").value += text;
    refresh();
    $("text").focus();
  }

  const refreshSoon = debounce(250, refresh);
  $("text").addEventListener("input", refreshSoon);
  $("ids").addEventListener("change", refresh);
  $("score").addEventListener("change", refresh);
  return { refresh, isStale: () => scoredText !== $("text").value };
}
