"""The server and the command line: models by name, OpenAI's API over HTTP, fine-tuning jobs.

Read `api/app.py` first (the whole server in one function), then `api/routes/completions.py` (one
route from request to response), then `transformer/engine` (how requests share the device). The
packages `cli`, `api`, `jobs` and `models` are layers: each imports only those after it.
"""
