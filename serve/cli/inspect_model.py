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
    from serve.models.compilation_cache import enable_compilation_cache

    place = local.locate_model_of_kind(model, "decoder", "only models that do can be inspected")
    enable_compilation_cache()

    import numpy as np

    from transformer import checkpoint, interpret, plots

    with local.report_load_errors(place):
        params, cfg, metadata = checkpoint.load(place.path)
        is_folder = place.path.is_dir()
        tokenizer = bpe.load(place.path) if is_folder else bpe.from_gguf(metadata)
    encoding = tokenizer.encoding
    ids = encoding.encode(text, allowed_special="all")
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    if not 2 <= len(ids) <= plots.MAX_TOKENS:
        raise WrongUsage(
            f"the text is {len(ids)} tokens: between 2 and {plots.MAX_TOKENS} can be drawn"
        )

    def label(id: int) -> str:
        with contextlib.suppress(KeyError):
            return encoding.decode_single_token_bytes(id).decode("utf-8", "replace")
        return f"#{id}"  # a row of the table that stands for nothing

    tokens = [label(id) for id in ids]
    layer = cfg.num_layers // 2 if layer is None else layer
    paths = [output / f"attention-{layer}.png", output / "lens.png", output / "alternatives.png"]
    try:
        plots.attention(np.asarray(interpret.attention(params, cfg, ids)), tokens, layer, paths[0])
        seen = interpret.logit_lens(params, cfg, ids)
        said = [[label(id) for id in row] for row in np.asarray(seen.ids)[..., 0].tolist()]
        plots.logit_lens(seen, tokens, said, paths[1])
        others = interpret.alternatives(params, cfg, ids)
        likely = [[label(id) for id in row] for row in others.top_ids.tolist()]
        plots.alternatives(others, tokens, likely, paths[2])
        if heads:
            paths.append(output / "heads.png")
            plots.head_effects(np.asarray(interpret.head_effects(params, cfg, ids)), paths[-1])
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    if json:
        found = zip(ids[1:], tokens[1:], np.exp(others.token_logprobs).tolist(), others.rank.tolist(),
                    others.entropy.tolist(), strict=True)  # fmt: skip
        rows = [
            {"id": id, "text": token, "probability": chance, "rank": rank, "entropy": bits}
            for id, token, chance, rank, bits in found
        ]
        files = [str(path) for path in paths]
        console.write_json({"model": place.id, "tokens": rows, "pictures": files})
    else:
        for path in paths:
            console.write(str(path))
