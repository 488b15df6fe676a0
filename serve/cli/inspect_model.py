"""`pellucid inspect`: look inside a model while it reads a text; four pictures."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from serve.cli import console
from serve.cli.options import Json, model_option
from serve.exceptions import WrongUsage


def inspect(
    text: Annotated[str, typer.Argument(help="What the model reads, without a chat template.")],
    model: Annotated[
        str | None,
        model_option("A model of `pellucid models`."),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Whose attention to draw, from 0. [default: the middle]")
    ] = None,
    heads: Annotated[
        bool, typer.Option("--heads", help="Draw what each head is worth too; this takes longer.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path(
        "inspect"
    ),
    json: Json = False,
) -> None:
    """Draw attention, the logit lens and the alternatives of each token."""
    import bpe
    from serve.cli import local
    from serve.models.compiled import keep_compiled_programs

    place = local.of_kind(model, "decoder", "only models that do can be inspected")
    keep_compiled_programs()

    import numpy as np

    from transformer import checkpoint, pictures
    from transformer import inspect as looking

    with local.loading(place):
        params, cfg, metadata = checkpoint.load(place.path)
        is_folder = place.path.is_dir()
        tokenizer = bpe.load(place.path) if is_folder else bpe.from_gguf(metadata)
    encoding = tokenizer.encoding
    ids = encoding.encode(text, allowed_special="all")
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    if not 2 <= len(ids) <= pictures.MAX_TOKENS:
        raise WrongUsage(
            f"the text is {len(ids)} tokens: between 2 and {pictures.MAX_TOKENS} can be drawn"
        )

    def label(id: int) -> str:
        with contextlib.suppress(KeyError):
            return encoding.decode_single_token_bytes(id).decode("utf-8", "replace")
        return f"#{id}"  # a row of the table that stands for nothing

    tokens = [label(id) for id in ids]
    layer = cfg.num_layers // 2 if layer is None else layer
    paths = [output / f"attention-{layer}.png", output / "lens.png", output / "alternatives.png"]
    try:
        pictures.attention(np.asarray(looking.attention(params, cfg, ids)), tokens, layer, paths[0])
        seen = looking.lens(params, cfg, ids)
        said = [[label(id) for id in row] for row in np.asarray(seen.ids)[..., 0].tolist()]
        pictures.lens(seen, tokens, said, paths[1])
        others = looking.alternatives(params, cfg, ids)
        likely = [[label(id) for id in row] for row in others.ids.tolist()]
        pictures.alternatives(others, tokens, likely, paths[2])
        if heads:
            paths.append(output / "heads.png")
            pictures.head_effects(np.asarray(looking.head_effects(params, cfg, ids)), paths[-1])
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    if json:
        found = zip(ids[1:], tokens[1:], np.exp(others.chosen).tolist(), others.rank.tolist(),
                    others.entropy.tolist(), strict=True)  # fmt: skip
        rows = [
            {"id": id, "text": token, "probability": chance, "rank": rank, "entropy": bits}
            for id, token, chance, rank, bits in found
        ]
        files = [str(path) for path in paths]
        console.answer_json({"model": place.id, "tokens": rows, "pictures": files})
    else:
        for path in paths:
            console.answer(str(path))
