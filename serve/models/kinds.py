"""The table of kinds of model.

A new kind needs a file in this package, an entry here, its name in `catalogue.KINDS`, and a route
that `serve/api/app.py` includes. `tests/serve/toy_kind.py` is a minimal example.
"""

from pathlib import Path

from serve.models import decoder, encoder, images, reranker, speech
from serve.models.spec import Kind, ModelFiles

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (decoder.KIND, encoder.KIND, reranker.KIND, speech.KIND, images.KIND)
}


def recognize(path: Path) -> Kind | None:
    """Return the kind of a file or folder, or None. The last kind that recognizes it counts."""
    return next((kind for kind in reversed(KINDS.values()) if kind.recognizes(path)), None)


def kind_of(files: ModelFiles) -> Kind:
    """Return the kind of a model, from its catalogue entry or else from its files."""
    if files.entry is not None:
        return KINDS[files.entry.kind]
    return recognize(files.path) or decoder.KIND
