"""The `pellucid` command: `main` holds the root command, every other command has its own file.

`console` writes output, `stdin` reads piped text, and `options` holds the options that several
commands share. `local` finds and loads a model, `local_completion` generates text in this process.
`finetune` works on jobs through `local_backend` or `remote_backend`. `old_flags` lists the earlier
names of flags.
"""
