"""The HTTP API: `app` assembles middleware, routes and error handlers; `server` binds the port.

Middleware, from the outermost: `headers`, `middleware` (hosts, origins, and keys from `auth`),
`rate_limit`, `body_limit`. `request_context` holds the state of one request, `logs` and `metrics`
report it, and `errors` defines the JSON shape of every error.

Modules that the routes share:

- `requests`, `responses`, `openapi`: pydantic models of request and response bodies, and the
  OpenAPI description that is generated from them.
- `token_ids`, `context_window`: translate token ids of OpenAI's encodings, and check that prompt
  and completion fit the context window.
- `generation`, `detokenize`, `infill`: run the engine for a request, turn its events into text, and
  build fill-in-the-middle prompts.
- `sse`, `multipart`, `pagination`: server-sent events, multipart forms, and pages of lists.
- `stored_files`, `image_requests`, `image_uploads`, `base64_chunks`: uploaded files and images.
"""
