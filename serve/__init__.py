"""The stack behind an API: models by name, an engine that runs them, OpenAI's routes over HTTP.

Read `app.py` first (the whole server in one function), then `api/completions.py` (one route from
request to answer), then `engine/` (how requests share the device).
"""
