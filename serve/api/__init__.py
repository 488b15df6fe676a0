"""The routes: one file a route, and what the routes share.

OpenAI's are `models.py`, `chat.py`, `completions.py` (with `insertion.py` for its suffix) and
`embeddings.py`, and of 2023 `edits.py` and `engines.py`; harnesses ask `tokens.py`, supervisors
`health.py`, people `pages.py` and `docs.py`. What outlives a request: `files.py`, and jobs as today
(`fine_tuning.py`) and in 2023 (`fine_tunes.py`).

Shared: `schemas.py` is what a request may say, `ids.py` what its token ids mean, `context.py`
whether it fits the model, `generation.py` and `pieces.py` how token events become text, `sse.py`
how an answer is streamed, `forms.py` how a file arrives, `listing.py` how a list is paged through,
`replies.py` and `openapi.py` how all of it is described.
"""
