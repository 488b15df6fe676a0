"""The `pellucid` command: `main` holds the root command, one file each the others.

`console` is where output goes, `local` finds a model's files, `talk` generates in this process,
`remote` asks a server.
"""
