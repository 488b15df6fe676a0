"""The `pellucid` command: `main` holds the root command, one file each the others.

`console` is where output goes, `stdin` where text comes from, `options` what commands share.
`local` finds and loads a model, `talk` generates in this process. Jobs are of `here` or `remote`.
"""
