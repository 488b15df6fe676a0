"""The kinds of model there are.

A new one is a file beside this one, a line here, its name in `catalogue.KINDS`, and a route that
`serve/api/app.py` includes. `tests/serve/toy_kind.py` is the smallest.
"""

from pathlib import Path

from serve.models import decoder, encoder, images, speech
from serve.models.spec import Kind, ModelFiles

KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (decoder.KIND, encoder.KIND, speech.KIND, images.KIND)
}


def recognize(path: Path) -> Kind | None:
    """Return the kind of a file or folder; the narrowest, which stands last in the table."""
    return next((kind for kind in reversed(KINDS.values()) if kind.recognizes(path)), None)


def kind_of(files: ModelFiles) -> Kind:
    """Return the kind of a model: as the catalogue says, or by its files."""
    if files.entry is not None:
        return KINDS[files.entry.kind]
    return recognize(files.path) or decoder.KIND
