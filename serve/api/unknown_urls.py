"""Sentences for URLs that this server does not have: what is wrong with them, and what to do.

A client that was set up wrong, or a route of OpenAI's API that is not here, is easier to fix with
its own sentence than with "Invalid URL".
"""

import re
from collections.abc import Callable, Mapping

_NO_ASSISTANTS = "Send the messages to /v1/responses, in a conversation of /v1/conversations"
_NO_STORE = "This server has no vector stores: use /v1/embeddings and /v1/rerank"
# Routes of OpenAI's API without /v1, and what to do instead. The first that matches counts.
OPENAI_ROUTES: Mapping[str, str] = {
    r"/responses/compact": "Send 'truncation': 'auto' to /v1/responses",
    r"/(assistants|threads|chatkit)(/.*)?": _NO_ASSISTANTS,
    r"/vector_stores(/.*)?": _NO_STORE,
    r"/(answers|classifications|search|engines/.+/search)": _NO_STORE,
    r"/realtime(/.*)?": "Use /v1/audio/transcriptions for speech and /v1/chat/completions for text",
    r"/audio/(speech|voices|voice_consents)(/.*)?": "No model of this server speaks",
    r"/videos(/.*)?": "No model of this server makes videos: use /v1/images/generations",
    r"/fine_tuning/jobs/[^/]+/(pause|resume)": "A job can be cancelled, and survives a restart",
    r"/fine_tuning/(alpha|checkpoints)(/.*)?": "Use /v1/fine_tuning/jobs",
    r"/evals(/.*)?": "Run an evaluation program, such as lm-evaluation-harness, on /v1/completions",
    r"/(containers|skills)(/.*)?": "This server runs no tools",
    r"/(organization|projects)(/.*)?": "Create API keys with `pellucid keys create NAME`",
}


def base_url_mistake(path: str, is_route: Callable[[str], bool]) -> str | None:
    """Return what is wrong with the base URL that led to a path, and the right path; else None.

    Args:
        path: The path of the request, which is no route.
        is_route: Whether a path is a route.
    """
    intended = "/v1" + re.sub(r"^(/v1)+(?=/|$)", "", re.sub("/+", "/", path)).rstrip("/")
    if intended in (path, "/v1") or not is_route(intended):
        return None
    if "//" in path or path.endswith("/"):
        reason = "the path has a slash too many"
    elif path.startswith("/v1/v1/"):
        reason = "the base URL contains /v1 twice"
    else:
        reason = "the base URL must end with /v1"
    return f"{reason}. The right path is {intended}"


def openai_route(path: str) -> str | None:
    """Return what to do instead of calling a route of OpenAI that is not here, or None."""
    rest = re.sub(r"^(/v1)*", "", path).rstrip("/")
    return next(
        (hint for pattern, hint in OPENAI_ROUTES.items() if re.fullmatch(pattern, rest)), None
    )
