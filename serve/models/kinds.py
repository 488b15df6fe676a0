"""The table of model kinds: decoder, encoder, reranker, moderation, speech and images.

A new kind needs a file in this package, an entry in `KINDS` here and in `catalogue.KINDS`, and a
route that `serve/api/app.py` includes. `tests/serve/toy_kind.py` is a minimal example.
"""

from pathlib import Path

from serve.models import decoder, encoder, images, moderation, reranker, speech
from serve.models.spec import Kind, ModelFiles

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        decoder.KIND,
        encoder.KIND,
        reranker.KIND,
        moderation.KIND,
        speech.KIND,
        images.KIND,
    )
}


def recognize(path: Path) -> Kind | None:
    """Return the last kind in `KINDS` that recognizes a file or folder; None if no kind does."""
    return next((kind for kind in reversed(KINDS.values()) if kind.recognizes(path)), None)


def kind_of(files: ModelFiles) -> Kind:
    """Return the kind of a model: that of its catalogue entry, or else that of its files."""
    if files.entry is not None:
        return KINDS[files.entry.kind]
    return recognize(files.path) or decoder.KIND
