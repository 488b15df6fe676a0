"""The documentation site: it builds without a warning, its links resolve, search finds a page."""

import functools
import http.server
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow  # needs the extra `docs`


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-j", "auto"]
    done = subprocess.run(
        [*command, "-c", ROOT / "docs", "-d", folder / "cache", ROOT, folder / "html"],
        stderr=subprocess.PIPE,
        text=True,
        timeout=1800,  # against a hang: it takes half a minute
    )
    assert done.returncode == 0, done.stderr
    return folder / "html"


class Links(HTMLParser):
    """The ids of a page, its links, and the files that it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.files: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name == "href" and value:
                (self.links if tag == "a" else self.files).add(value)
            elif name == "src" and value:
                self.files.add(value)


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Links]:
    return {path: Links(path.read_text("utf-8")) for path in site.rglob("*.html")}


def test_site_has_a_page_for_each_document_notebook_and_package(site):
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        assert (site / path.relative_to(ROOT).with_suffix(".html")).is_file(), path
    for path in ROOT.glob("notebooks/*.ipynb"):
        page = (site / "notebooks" / f"{path.stem}.html").read_text("utf-8")
        assert "cell_output" in page, path
    for package in ("bpe", "transformer", "transformer.engine", "audio", "diffusion", "training"):
        assert (site / f"docs/api/{package}.html").is_file(), package


def test_api_page_documents_a_function_with_its_signature(site):
    page = (site / "docs/api/bpe.html").read_text("utf-8")
    assert "get_encoding" in page and 'id="module-bpe"' in page


def test_internal_links_resolve(site, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links | page.files:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            file = (path.parent / unquote(target.path)).resolve() if target.path else path
            fragment = unquote(target.fragment)
            if not file.is_file() or (
                fragment and file in pages and fragment not in pages[file].ids
            ):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken and sum(len(page.links) for page in pages.values()) > 1000


def test_pages_load_nothing_from_another_server(site, pages):
    hosts = {urlsplit(file).netloc for page in pages.values() for file in page.files}
    assert hosts == {""}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_search_finds_a_page(browser, address):
    page = browser.new_page()
    foreign = []
    page.on("request", lambda r: None if r.url.startswith(address) else foreign.append(r.url))
    page.goto(f"{address}/search.html?q=get_encoding")
    page.wait_for_selector("#search-results li a")
    links = page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
    page.close()
    assert any("/docs/api/bpe." in link for link in links) and not foreign


def test_page_at_phone_width_does_not_scroll_horizontally(browser, address):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    for name in ("docs/index", "README", "ARCHITECTURE", "docs/api/bpe", "notebooks/01_tokens"):
        page.goto(f"{address}/{name}.html")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, name
    page.close()
