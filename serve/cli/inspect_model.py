"""`pellucid inspect`: plots attention, logit lens and most likely next tokens of a text."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from serve.cli import console
from serve.cli.options import Json, model_option
from serve.exceptions import WrongUsage


def inspect(
    text: Annotated[str, typer.Argument(help="The text to analyze, without a chat template.")],
    model: Annotated[
        str | None,
        model_option("A model of `pellucid models`."),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            help="Layer whose attention is plotted, counted from 0. [default: the middle one]"
        ),
    ] = None,
    heads: Annotated[
        bool,
        typer.Option(
            "--heads", help="Also plot the loss without each attention head; this takes longer."
        ),
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the plots.")] = Path(
        "inspect"
    ),
    json: Json = False,
) -> None:
    """Plot the attention, the logit lens and the most likely next tokens of a text."""
    import bpe
    from serve.cli import local
    from serve.models.compilation_cache import enable_compilation_cache

    files = local.locate_model_of_kind(
        model, "decoder", "`pellucid inspect` needs a model that does"
    )
    enable_compilation_cache()

    import numpy as np

    from transformer import checkpoint, interpret, plots

    with local.report_load_errors(files):
        params, cfg, metadata = checkpoint.load(files.path)
        is_folder = files.path.is_dir()
        tokenizer = bpe.load(files.path) if is_folder else bpe.from_gguf(metadata)
    encoding = tokenizer.encoding
    ids = encoding.encode(text, allowed_special="all")
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    if not 2 <= len(ids) <= plots.MAX_TOKENS:
        raise WrongUsage(
            f"the text has {len(ids)} tokens; give a text of 2 to {plots.MAX_TOKENS} tokens"
        )

    def label(id: int) -> str:
        with contextlib.suppress(KeyError):
            return encoding.decode_single_token_bytes(id).decode("utf-8", "replace")
        return f"#{id}"  # a row of the embedding table without a token

    tokens = [label(id) for id in ids]
    layer = cfg.num_layers // 2 if layer is None else layer
    paths = [output / f"attention-{layer}.png", output / "lens.png", output / "alternatives.png"]
    try:
        plots.attention(np.asarray(interpret.attention(params, cfg, ids)), tokens, layer, paths[0])
        lens = interpret.logit_lens(params, cfg, ids)
        top_tokens = [[label(id) for id in row] for row in np.asarray(lens.ids)[..., 0].tolist()]
        plots.logit_lens(lens, tokens, top_tokens, paths[1])
        alternatives = interpret.alternatives(params, cfg, ids)
        labels = [[label(id) for id in row] for row in alternatives.top_ids.tolist()]
        plots.alternatives(alternatives, tokens, labels, paths[2])
        if heads:
            paths.append(output / "heads.png")
            plots.head_effects(np.asarray(interpret.head_effects(params, cfg, ids)), paths[-1])
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    if json:
        columns = (
            ids[1:],
            tokens[1:],
            np.exp(alternatives.token_logprobs).tolist(),
            alternatives.rank.tolist(),
            alternatives.entropy.tolist(),
        )
        names = ("id", "text", "probability", "rank", "entropy")
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        pictures = [str(path) for path in paths]
        console.write_json({"model": files.id, "tokens": rows, "pictures": pictures})
    else:
        for path in paths:
            console.write(str(path))
