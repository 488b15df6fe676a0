// The frame of the page: navigation, the choice of the model, and error messages.

import { requestJson } from "./api.js";
import * as chat from "./chat.js";
import { $, h } from "./dom.js";
import * as tokens from "./tokens.js";

const PAGES = ["chat", "tokens"];
const model = () => $("model").value;

function report(message) {
  $("problem").hidden = !message;
  $("problem").textContent = message ?? "";
}

function showPage(page) {
  for (const name of PAGES) {
    $(name).hidden = name !== page;
    if (name === page) $(`to-${name}`).setAttribute("aria-current", "page");
    else $(`to-${name}`).removeAttribute("aria-current");
  }
  document.title = page === "chat" ? "Pellucid" : "Tokens · Pellucid";
  report(null);
  if (page === "tokens" && model() && tokenPage.isStale()) tokenPage.refresh();
  if (page === "chat") $("message").focus();
}

const currentPage = () => (PAGES.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat");

const tokenPage = tokens.start({ model, report });
chat.start({ model, report });
addEventListener("hashchange", () => showPage(currentPage()));

try {
  const { data } = await requestJson("/v1/models");
  const generators = data.filter(({ kind }) => kind === "decoder");
  $("model").append(...generators.map(({ id }) => h("option", {}, id)));
  const showDefaults = () => chat.showDefaults(data.find(({ id }) => id === model())?.sampling);
  $("model").addEventListener("change", () => {
    showDefaults();
    if (currentPage() === "tokens") tokenPage.refresh();
  });
  showDefaults();
} catch (error) {
  report(error.message);
}
showPage(currentPage());
document.body.dataset.ready = "true";
