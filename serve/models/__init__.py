"""Models: what there is, where its files are, and how each kind is loaded.

Read `spec` (the types), `catalogue` (models.toml), `download` (fetches and checks files), `kinds`
(the table of kinds; `decoder`, `encoder`, `speech` and `images` describe and load one each),
`resolve` (from files to a spec), `registry` (what is offered, and what is loaded). `adapters` keeps
what was fine-tuned; `dtypes` chooses the dtype, `compiled` keeps programs; `disk`, `hashes` and
`json_cache` write files.
"""
