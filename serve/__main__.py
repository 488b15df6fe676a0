"""`python -m serve` is the `pellucid` command."""

from serve.cli.main import main

if __name__ == "__main__":
    main()
