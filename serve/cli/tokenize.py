"""`pellucid tokenize`: shows the tokens of a text."""

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
        bool, typer.Option("--parse-special", help="Parse <|special|> tokens in the text.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the tokens that a model splits a text into."""
    piped = stdin.piped()
    if text is None and piped is None:
        raise WrongUsage("no text; give it as an argument, or pipe it in")
    full_text = (stdin.require_utf8(text) or "") + (piped or "")
    import bpe
    from serve.cli import local

    files = local.locate_model(model)
    with local.report_load_errors(files):
        encoding = bpe.load(files.path).encoding
    allowed = "all" if parse_special else set()
    ids = encoding.encode(full_text, allowed_special=allowed, disallowed_special=())
    token_bytes = [encoding.decode_single_token_bytes(id) for id in ids]
    size = len(full_text.encode())
    if json:
        tokens = [_token(id, data) for id, data in zip(ids, token_bytes, strict=True)]
        console.write_json({"model": files.id, "bytes": size, "tokens": tokens})
        return
    print(console.format_tokens(token_bytes))
    print(*ids)
    console.info(f"{len(ids)} tokens, {size} bytes, {files.id}")


def _token(id: int, data: bytes) -> dict[str, Any]:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = None  # the token is only a part of a character
    return {"id": id, "text": text, "bytes": list(data)}
