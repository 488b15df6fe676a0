"""`pellucid tokenize`: the tokens of a text."""

from typing import Annotated, Any

import typer

from serve.cli import console, stdin
from serve.cli.options import Json, ModelName
from serve.exceptions import WrongUsage


def tokenize(
    text: Annotated[
        str | None, typer.Argument(help="Text. Text piped in follows it, byte for byte.")
    ] = None,
    model: ModelName = None,
    parse_special: Annotated[
        bool, typer.Option("--special", help="Read <|special|> tokens as such, not as text.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the tokens a model cuts a text into."""
    piped = stdin.piped()
    if text is None and piped is None:
        raise WrongUsage("there is no text: give it as an argument, or pipe it in")
    whole = (stdin.require_utf8(text) or "") + (piped or "")
    import bpe
    from serve.cli import local

    place = local.locate_model(model)
    with local.report_load_errors(place):
        encoding = bpe.load(place.path).encoding
    allowed = "all" if parse_special else set()
    ids = encoding.encode(whole, allowed_special=allowed, disallowed_special=())
    parts = [encoding.decode_single_token_bytes(id) for id in ids]
    size = len(whole.encode())
    if json:
        tokens = [_token(id, part) for id, part in zip(ids, parts, strict=True)]
        console.write_json({"model": place.id, "bytes": size, "tokens": tokens})
        return
    print(console.format_tokens(parts))
    print(*ids)
    console.info(f"{len(ids)} tokens, {size} bytes, {place.id}")


def _token(id: int, part: bytes) -> dict[str, Any]:
    try:
        text = part.decode()
    except UnicodeDecodeError:
        text = None  # part of a character
    return {"id": id, "text": text, "bytes": list(part)}
