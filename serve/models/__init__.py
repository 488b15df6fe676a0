"""Models: what there is, where its files are, and how each kind is loaded.

`catalogue` reads models.toml, `download` fetches and checks files, `adapters` keeps what was
fine-tuned, `registry` holds what is loaded. One file a kind loads it: `decoder`, `encoder`,
`speech`, `images`.
"""
