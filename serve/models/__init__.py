"""Models: the catalogue, the files on disk, and how each kind of model is loaded.

Read `spec` (the types), `catalogue` (models.toml), `download` (fetches and checks files), `kinds`
(the table of kinds; `decoder`, `encoder`, `speech` and `images` describe and load one each),
`resolve` (from files to a spec), and `registry` (served and loaded models). `adapters` stores
fine-tuned models, `dtypes` chooses the dtype, `compilation_cache` caches compiled programs, and
`disk`, `hashes` and `json_cache` write files.
"""
