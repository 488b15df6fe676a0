"""Every block of every guide, run against a real server with the real models.

Decoders run in int8, so that their answers do not depend on the dtype that is fastest on a machine.
"""

import re
import shutil
from pathlib import Path

import pytest

from serve import settings
from serve.models import catalogue
from tests.docs.blocks import ROOT, Session, blocks, quick
from tests.serve import processes

pytestmark = pytest.mark.heavy

GUIDES = ROOT / "docs" / "guides"
INDEX = GUIDES / "index.md"
# In the order of reading. Fine-tuning, which makes models that others would list, is near the end.
LINKED = [
    (GUIDES / name).resolve()
    for name in re.findall(r"^\| \[.*?\]\((.+?\.md)\)", INDEX.read_text("utf-8"), re.MULTILINE)
]
PAGES = [INDEX, *LINKED]
# Pages whose requests take seconds. Of these, the default tests leave out commands that load a
# model of their own.
QUICK = {"chat", "embeddings", "index", "models", "tokens", "usage-policies"}
LOADING = r"pellucid (chat|complete|transcribe|image|finetune)"


@pytest.fixture(scope="module")
def home(model_file, tmp_path_factory) -> Path:
    """A data folder of its own, with the pulled models, in which decoders run in int8."""
    for name, model in catalogue.load().models.items():
        if not model.folder:
            model_file(name)
    home = tmp_path_factory.mktemp("home")
    here = settings.data_folder()
    for name in ("models", "compiled"):
        if (here / name).exists():
            (home / name).symlink_to(here / name)
    if (here / "formats.json").exists():  # of the models that have no pinned dtype
        shutil.copy(here / "formats.json", home)
    text = (ROOT / "serve" / "models" / "models.toml").read_text("utf-8")
    pinned, count = re.subn(r"(?m)^formats = .*$", 'formats = ["int8"]', text)
    assert count
    (home / "models.toml").write_text(pinned, "utf-8")
    return home


@pytest.fixture(scope="module")
def url(home):
    with processes.serving(PELLUCID_HOME=str(home)) as server:
        yield server.url


@pytest.fixture
def session(home, url, tmp_path) -> Session:
    return Session(tmp_path, url, processes.environment(PELLUCID_HOME=str(home)))


def pages(names: set[str] | None = None):
    return [pytest.param(page, id=page.stem) for page in PAGES if not names or page.stem in names]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", pages(QUICK))
def test_guide_quick_blocks_print_what_it_shows(session, page):
    session.run(quick(blocks(page), LOADING))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", pages())
def test_guide_blocks_print_what_it_shows(session, page):
    session.run(blocks(page))


def test_guides_index_names_every_page():
    assert sorted(PAGES) == sorted([*GUIDES.glob("*.md"), ROOT / "docs" / "usage-policies.md"])
