// Requests to the server through its public API.

import { $ } from "./dom.js";

/** An error with the server's message. */
export class ApiError extends Error {}

const KEY = "pellucid-key";

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

/** Show the dialog for the API key; resolves when the user has entered one. */
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

/** Send a request and return the response; a request without a body is a GET. */
async function request(path, body, signal) {
  for (;;) {
    let response;
    try {
      const method = body === undefined ? "GET" : "POST";
      const data = body === undefined ? undefined : JSON.stringify(body);
      response = await fetch(path, { method, body: data, signal, headers: headers() });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server does not respond. Check that it is running, then try again.");
    }
    if (response.ok) return response;
    if (response.status !== 401) {
      const data = await response.json().catch(() => ({}));
      throw new ApiError(data.error?.message ?? `The server responded with status ${response.status}.`);
    }
    await askForKey();
  }
}

/** Return the JSON of a response; a request without a body is a GET. */
export async function requestJson(path, body, signal) {
  return (await request(path, body, signal)).json();
}

/** Yield the events of a streamed response. */
export async function* streamEvents(path, body, signal) {
  const response = await request(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError("The connection ended before the answer was complete. Try again.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new ApiError(value.error.message);
      yield value;
    }
  }
}
