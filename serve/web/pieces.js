// From tokens to text that can be shown: a character may take several tokens.

/**
 * Groups tokens so that each group is whole characters.
 *
 * @param tokens as the chat API's logprobs have them: {token, bytes, logprob, top_logprobs}, and
 *   perhaps an id.
 * @returns {text, tokens} for each group; the tokens as `Strip` takes them.
 */
export function pieces(tokens) {
  const groups = [];
  let decoder = new TextDecoder();
  let group = [];
  for (const [at, token] of tokens.entries()) {
    group.push({
      text: token.token,
      bytes: token.bytes,
      id: token.id,
      special: token.special,
      logprob: token.logprob,
      top: token.top_logprobs?.map((top) => ({ text: top.token, logprob: top.logprob })),
    });
    const bytes = new Uint8Array(token.bytes);
    const text = decoder.decode(bytes, { stream: at < tokens.length - 1 });
    if (text) {
      groups.push({ text, tokens: group });
      group = [];
    }
  }
  return groups;
}
