"""The page about request fields says what the server does."""

from tests.docs import compatibility


def test_compatibility_page_equals_the_request_bodies():
    page = compatibility.PAGE.read_text("utf-8")
    assert page == compatibility.page_with_tables(page), "run python -m tests.docs.compatibility"


def test_tables_have_each_effect():
    rows = compatibility.tables().splitlines()
    assert "| `temperature` | number, 0 to 2 | works |" in rows
    assert "| `user` | string | none; named in the header |" in rows
    assert any(row.startswith("| `audio` | null, false, empty | other values") for row in rows)
