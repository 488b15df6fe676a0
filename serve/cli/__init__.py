"""The `pellucid` command: `main` has the root command, every other command has its own module.

`console` writes output, `stdin` reads piped text, and `options` holds the options that several
commands share. `local` finds and loads a model, `local_completion` generates text in this process.
`finetune` accesses jobs on this machine through `local_backend` and those of a server through
`remote_backend`. `old_flags` lists the earlier names of flags.
"""
