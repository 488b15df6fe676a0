"""The HTTP shim: `app` puts layers, routes and errors together, `server` holds the port.

Layers, from the outermost: `headers`, `middleware` (hosts, origins, keys, which `auth` knows),
`rate_limit`, `body_limit`; `request_context` is what they and the routes know of a request, `logs`
and `metrics` what is told of it, `errors` the one shape of every failure.

Shared by the routes: `requests` is what a request may say, `token_ids` what its ids mean,
`context_window` whether it fits the model, `generation` and `detokenize` how token events become
text, `infill` how text is inserted, `sse` how an answer is streamed, `multipart` how a form is
read, `stored_files` how an uploaded file is found, `image_requests` and `image_uploads` how
pictures arrive, `base64_chunks` how they leave, `pagination` how a list is paged through,
`responses` and `openapi` how it is described.
"""
