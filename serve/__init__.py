"""The stack behind an API: models by name, OpenAI's routes over HTTP, fine-tuning jobs, a command.

Read `api/app.py` first (the whole server in one function), then `api/routes/completions.py` (one
route from request to answer), then `transformer/engine` (how requests share the device). Each room
imports only those behind it: `cli`, `api`, `jobs`, `models`.
"""
