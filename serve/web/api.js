// Talking to the server, the way any client would.

import { $ } from "./dom.js";

/** What went wrong, in the server's words. */
export class Problem extends Error {}

const KEY = "pellucid-key";

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

/** Asks for a key; resolves when there is one. */
function askForKey() {
  const dialog = $("key-dialog");
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, $("key").value.trim());
      $("key").value = "";
      dialog.close();
      resolve();
    };
    dialog.oncancel = (event) => event.preventDefault();
  });
}

async function ask(path, body, signal) {
  for (;;) {
    let response;
    try {
      const method = body === undefined ? "GET" : "POST";
      const data = body === undefined ? undefined : JSON.stringify(body);
      response = await fetch(path, { method, body: data, signal, headers: headers() });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server does not answer. Is it still running?");
    }
    if (response.ok) return response;
    if (response.status !== 401) {
      const said = await response.json().catch(() => ({}));
      throw new Problem(said.error?.message ?? `The server answered ${response.status}.`);
    }
    await askForKey();
  }
}

/** The answer to a request; without a body it is a GET. */
export async function call(path, body, signal) {
  return (await ask(path, body, signal)).json();
}

/** The events of a streamed answer, as they come. */
export async function* stream(path, body, signal) {
  const response = await ask(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Problem("The answer broke off.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const said = JSON.parse(data);
      if (said.error) throw new Problem(said.error.message);
      yield said;
    }
  }
}
