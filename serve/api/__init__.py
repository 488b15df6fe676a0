"""The HTTP API: `app` assembles middleware, routes and error handlers; `server` binds the port.

Middleware, from the outermost: `headers`, `middleware` (hosts, origins, and keys from `auth`),
`rate_limit`, `body_limit`. `request_context` holds the state of one request, `logs` and `metrics`
report it, and `errors` defines the JSON shape of every error.

Modules that the routes share:

- `requests`, `responses`, `openapi`: schemas of requests and responses, and their description.
- `token_ids`, `context_window`: translate token ids and check lengths.
- `generation`, `detokenize`, `infill`: turn token events into text.
- `sse`, `multipart`, `pagination`: streamed responses, forms, and lists.
- `stored_files`, `image_requests`, `image_uploads`, `base64_chunks`: uploaded files and images.
"""
