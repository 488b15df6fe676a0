"""The interfaces of Pellucid equal the recorded ones; see `surface/record.py`."""

import pytest

from tests.serve.surface import record

pytestmark = pytest.mark.heavy


def compare(surface):
    for name, text in surface().items():
        recorded = (record.FOLDER / name).read_text("utf-8")
        assert text == recorded, f"{name}: if intended, record again and commit the diff"


@pytest.mark.parametrize("surface", record.SURFACES)
def test_surface_equals_the_recorded_one(surface):
    compare(surface)


@pytest.mark.slow
@pytest.mark.parametrize("surface", record.SLOW_SURFACES)
def test_slow_surface_equals_the_recorded_one(surface):
    compare(surface)
