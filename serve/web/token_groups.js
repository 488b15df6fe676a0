// Groups of tokens that decode to whole characters: a character may take several tokens.

/**
 * Group tokens so that each group decodes to whole characters.
 *
 * @param tokens objects as in the chat API's logprobs: {token, bytes, logprob, top_logprobs}, with
 *   an optional id.
 * @returns {text, tokens} for each group, with tokens in the format of `TokenStrip`.
 */
export function groupTokens(tokens) {
  const groups = [];
  let decoder = new TextDecoder();
  let group = [];
  for (const [index, token] of tokens.entries()) {
    group.push({
      text: token.token,
      bytes: token.bytes,
      id: token.id,
      special: token.special,
      logprob: token.logprob,
      top: token.top_logprobs?.map((top) => ({ text: top.token, logprob: top.logprob })),
    });
    const bytes = new Uint8Array(token.bytes);
    const text = decoder.decode(bytes, { stream: index < tokens.length - 1 });
    if (text) {
      groups.push({ text, tokens: group });
      group = [];
    }
  }
  return groups;
}
