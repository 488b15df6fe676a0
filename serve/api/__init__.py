"""OpenAI's routes: one file a route, and what the routes share.

`schemas.py` is what a request may say, `context.py` whether it fits the model, `generation.py` and
`pieces.py` how token events become text, `sse.py` how an answer is streamed.
"""
