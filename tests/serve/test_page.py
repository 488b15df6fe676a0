"""Test the page at /: its files, and its behaviour in Chromium."""

import dataclasses
import re

import httpx
import pytest

from serve.api import auth
from serve.api.routes import pages
from tests.serve import scripted
from tests.serve.scripted import HELLO
from tests.serve.test_harmony import ENCODING as HARMONY_ENCODING
from tests.serve.test_harmony import FINAL, THINK
from tests.serve.test_harmony import TEMPLATE as HARMONY_TEMPLATE

pytestmark = pytest.mark.heavy

LIMIT = 60_000  # bytes of all files together, to keep the page small


# --- files ----------------------------------------------------------------------------------------


def test_page_has_strict_content_security_policy(http):
    page = http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    for name in re.findall(r"/web/([\w.-]+)", page.text):
        file = http.get(f"/web/{name}")
        assert file.status_code == 200, name
        assert file.headers["x-content-type-options"] == "nosniff"


def test_unknown_or_html_file_under_web_is_404(http):
    for name in ("nobody.js", "..%2Fapp.py", "../settings.py", "%2e%2e/app.py", "index.html"):
        assert http.get(f"/web/{name}").status_code == 404


def test_scripts_load_nothing_foreign_and_parse_no_html():
    sizes = 0
    for path in pages.FOLDER.iterdir():
        text = path.read_text("utf-8")
        sizes += len(text.encode())
        outside = set(re.findall(r"https?://[^\"'\s]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not outside, f"{path.name} loads {outside}"
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in text, f"{path.name}: {word}"
        assert not re.search(r'\bstyle="|\bon\w+="', text), (
            f"{path.name}: the security policy forbids inline styles and handlers"
        )
    assert sizes < LIMIT


def test_page_needs_no_key_but_api_does(tmp_path):
    auth.create(tmp_path, "ann")
    with (
        scripted.serve_models(scripted.model(), home=tmp_path) as address,
        httpx.Client(base_url=address) as http,
    ):
        for path in ("/", "/web/app.js", "/docs", "/openapi.json"):
            assert http.get(path).status_code == 200
        for path in ("/v1/models", "/tokenizer_info", "/metrics", "/web/../v1/models"):
            assert http.get(path).status_code == 401


# --- behaviour ------------------------------------------------------------------------------------

in_browser = pytest.mark.slow  # needs Chromium: apt-get install chromium


@pytest.fixture
def open_page(browser, address):
    """Return a function that opens the page; fail on foreign requests and console errors."""
    contexts, wrong = [], []

    def open(at=address, path="/", ready="body[data-ready]", **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: None if r.url.startswith(at) else wrong.append(r.url))
        page.goto(at + path)
        page.wait_for_selector(ready)
        return page

    yield open
    for context in contexts:
        context.close()
    assert not wrong


def ask(page, text):
    page.fill("#message", text)
    page.press("#message", "Enter")
    page.wait_for_selector(".turn.assistant .stats")


@in_browser
def test_answer_streams_and_tokens_show_probabilities(open_page):
    page = open_page()
    ask(page, "Say hello")
    assert page.text_content(".turn.user .message-text") == "Say hello"
    assert page.text_content(".turn.assistant .message-text") == HELLO
    assert f"{len(HELLO.encode())} tokens" in page.text_content(".turn.assistant .stats")
    emoji = page.locator(".token", has_text="😀")
    assert emoji.count() == 1, "four tokens encode it: they share one button"
    page.locator(".token").first.hover()
    assert page.is_visible("#tip") and "78 %" in page.text_content("#tip tr.chosen")
    assert "A" in page.text_content("#tip") and "8.2 %" in page.text_content("#tip")
    emoji.hover()
    assert page.locator("#tip table").count() == 4
    assert HELLO in page.text_content("#answer-status"), (
        "the screen reader gets the answer once, at the end"
    )


@in_browser
def test_reasoning_is_shown_in_a_section_that_opens(open_page, tmp_path):
    model = scripted.model("oss", HARMONY_TEMPLATE.source, HARMONY_ENCODING)
    model.engine.answer = THINK + FINAL
    with scripted.serve_models(model, home=tmp_path) as address:
        page = open_page(address)
        ask(page, "3 + 4?")
        assert page.text_content(".turn.assistant .message-text") == "It is 7."
        assert not page.is_visible(".reasoning div")
        page.click(".reasoning summary")
        assert page.is_visible(".reasoning div")
        model.engine.answer = THINK
        ask(page, "And 5 + 6?")
        assert page.locator(".reasoning").count() == 2


@in_browser
def test_tokens_are_reachable_by_keyboard(open_page):
    page = open_page()
    ask(page, "Say hello")
    page.locator("#message").press("Shift+Tab")
    for _ in range(20):
        if page.evaluate("document.activeElement.className").startswith("token"):
            break
        page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.dataset.index") == "0", (
        "the row of tokens is one tab stop"
    )
    page.keyboard.press("ArrowRight")
    name = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert name == "token 2, e, probability 78 %, alternative A 8.2 %"
    assert page.is_visible("#tip")
    page.keyboard.press("Enter")
    page.mouse.move(5, 5)
    assert page.is_visible("#tip"), "Enter keeps the details of a token open"
    page.keyboard.press("Escape")
    assert not page.is_visible("#tip")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == "."


@in_browser
def test_stop_button_ends_generation(open_page, engine):
    page = open_page()
    page.fill("#message", "endless")
    page.click("#send")
    page.locator(".assistant .token").nth(5).wait_for()
    page.click("#stop")
    page.wait_for_selector(".turn.assistant .stats")
    assert "stopped" in page.text_content(".turn.assistant .stats")
    scripted.wait_until(lambda: engine.running == 0)
    assert page.is_visible("#send")
    page.fill("#message", "endless")
    page.click("#send")
    page.locator(".turn:last-child .token").nth(5).wait_for()
    page.keyboard.press("Escape")
    page.wait_for_selector(".turn:last-child .stats")
    scripted.wait_until(lambda: engine.running == 0)


@in_browser
def test_settings_and_conversation_are_sent(open_page, engine):
    page = open_page()
    page.click(".settings summary")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.3")
    page.fill("#seed", "7")
    ask(page, "seed one")
    page.fill("#message", "two")
    page.press("#message", "Enter")
    page.wait_for_selector(".turn:nth-of-type(5) .stats")
    request = engine.requests[-1]
    assert scripted.encoding.decode(request.prompt) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nseed one<|im_end|>\n"
        "<|im_start|>assistant\n7/0<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert request.sampling_params.temperature == 0.3 and request.sampling_params.seed == 7
    page.click("#show-prompt")
    page.wait_for_selector("#prompt-strip .special")
    assert "Be brief." in page.text_content("#prompt-strip")


@in_browser
def test_empty_settings_show_model_defaults(open_page):
    defaults = {"temperature": 0.25, "top_p": 0.5, "top_k": 7}
    model = dataclasses.replace(scripted.model(), default_sampling=defaults)
    with scripted.serve_models(model, scripted.model("other")) as address:
        page = open_page(address)
        page.click(".settings summary")
        assert page.get_attribute("#temperature", "placeholder") == "0.25"
        assert page.get_attribute("#top-p", "placeholder") == "0.5"
        assert "top_k 7" in page.text_content("#defaults")
        ask(page, "Say hello")
        sampling_params = model.engine.requests[-1].sampling_params
        assert {name: getattr(sampling_params, name) for name in defaults} == defaults
        page.select_option("#model", "other")
        assert page.get_attribute("#temperature", "placeholder") == "1"


@in_browser
def test_error_is_shown_and_cleared(open_page):
    page = open_page()
    page.fill("#message", "fail later")
    page.click("#send")
    page.wait_for_selector("#problem:not([hidden])")
    assert "The server had an error" in page.text_content("#problem")
    page.click("#clear")
    ask(page, "Say hello")
    assert not page.is_visible("#problem")


@in_browser
def test_token_page_shows_tokens_and_next_tokens(open_page):
    page = open_page(path="/#tokens")
    page.fill("#text", "aö\n<b>")
    page.locator("#counts", has_text="7 tokens").wait_for()
    assert "6 characters · 7 bytes" in page.text_content("#counts")
    assert page.locator("#strip .token").all_text_contents() == ["a", "ö", "↵\n", "<", "b", ">"]
    page.wait_for_selector("#strip.coloured")
    page.locator("#strip .token").nth(1).hover()
    assert page.locator("#tip caption").all_text_contents() == [
        r"bytes:\xc3 · part of ö · id 195 · byte c3",
        r"bytes:\xb6 · part of ö · id 182 · byte b6",
    ]
    page.wait_for_selector("#next li")
    page.locator("#next button").first.click()
    page.locator("#counts", has_text="8 tokens").wait_for()
    page.check("#ids")
    page.wait_for_selector("#strip small")


@in_browser
@pytest.mark.parametrize(
    "text",
    ["<img src=x onerror=alert(1)>", "\u202e\u200b\x1b[31m", "x" * 100_000, "\U0001f468\u200d"],
)
def test_hostile_text_is_displayed_as_text(open_page, text):
    page = open_page(path="/#tokens")
    page.uncheck("#score")
    page.fill("#text", text)
    page.locator("#counts", has_text=f"{len(text.encode())} bytes").wait_for()
    assert page.locator("#strip img").count() == 0
    assert "\u202e" not in page.text_content("#strip")
    assert page.locator("#strip .token").count() <= 1500


@in_browser
def test_docs_page_sends_requests(open_page):
    page = open_page(path="/docs", ready=".opblock-summary-path")
    page.click("[data-path='/tokenize']")
    page.click(".try-out__btn")
    page.fill(".body-param textarea", '{"text": "hé"}')
    page.click(".execute")
    page.locator(".response-col_description code", has_text='"count": 3').first.wait_for()


@in_browser
def test_server_with_keys_shows_key_dialog(browser, tmp_path):
    key = auth.create(tmp_path, "ann")
    with scripted.serve_models(scripted.model(), home=tmp_path) as address:
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", key)
        page.press("#key", "Enter")
        page.wait_for_selector("body[data-ready]")
        assert page.input_value("#model") == "scripted"
        assert key not in page.content()
        page.close()


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_page_is_accessible(open_page, scheme, width):
    """The checker axe finds no serious violation, and nothing is wider than the screen."""
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 760})

    def check(where):
        violations = Axe().run(page).response["violations"]
        serious = [v for v in violations if v["impact"] in ("serious", "critical")]
        summaries = [(v["id"], [n["html"][:90] for n in v["nodes"][:3]]) for v in serious]
        assert not summaries, where
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), where

    check("greeting")
    ask(page, "Say hello")
    check("answer")
    page.click("#to-tokens")
    page.wait_for_selector("#next li")
    check("tokens")
