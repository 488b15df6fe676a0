"""`python -m serve`: the `pellucid` command without an installation."""

from serve.cli.main import main

if __name__ == "__main__":
    main()
