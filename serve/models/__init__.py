"""Models: the catalogue, the files on disk, and how each kind of model is loaded.

Start with `spec` (the types), `catalogue` (models.toml), `download` and `hub` (fetch and verify
files), `kinds` (the table of model kinds; `decoder`, `encoder`, `reranker`, `speech` and `images`
describe and load one kind each), `resolve` (from files to a `ModelSpec`), and `registry` (served
and loaded models). `adapters` stores fine-tuned models, `dtypes` chooses the dtype of the weights,
`generation_config` reads the sampling defaults, `compilation_cache` caches compiled programs, and
`disk`, `hashes` and `json_cache` read and write small files.
"""
