"""Links to folders of the repository: the site has no page for them, so they become plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform


class FolderLinks(SphinxPostTransform):
    default_priority = 8  # MyST resolves its links, or warns, at 9

    def run(self, **options: Any) -> None:
        folder = Path(self.env.doc2path(self.env.docname)).parent
        for node in list(self.document.findall(pending_xref)):
            if node["reftype"] == "myst" and (folder / node["reftarget"]).is_dir():
                node.replace_self(node.children)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_post_transform(FolderLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
