"""Every code block of every guide, run with a real server and the real models.

Decoders run in int8, so that their answers do not depend on the dtype that is fastest on a machine.
"""

import re
import shutil
from pathlib import Path

import pytest

from serve import settings
from serve.models import catalogue
from tests.docs.blocks import ROOT, Session, blocks
from tests.serve import processes

GUIDES = ROOT / "docs" / "guides"
INDEX = GUIDES / "index.md"
# In reading order. Fine-tuning is near the end, because it adds models that other pages would list.
LINKED = [
    (GUIDES / name).resolve()
    for name in re.findall(r"^\| \[.*?\]\((.+?\.md)\)", INDEX.read_text("utf-8"), re.MULTILINE)
]
PAGES = [INDEX, *LINKED]


@pytest.fixture(scope="module")
def home(model_file, tmp_path_factory) -> Path:
    """Return a separate data folder with the pulled models, in which decoders run in int8."""
    for name, model in catalogue.load().models.items():
        if not model.folder:
            model_file(name)
    home = tmp_path_factory.mktemp("home")
    user_home = settings.data_folder()
    for name in ("models", "compiled"):
        if (user_home / name).exists():
            (home / name).symlink_to(user_home / name)
    if (user_home / "formats.json").exists():  # measured dtypes of models without a pinned dtype
        shutil.copy(user_home / "formats.json", home)
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


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_guide_blocks_print_the_output_shown(session, page):
    session.run(blocks(page))


def test_guides_index_names_every_page():
    assert sorted(PAGES) == sorted([*GUIDES.glob("*.md"), ROOT / "docs" / "usage-policies.md"])
