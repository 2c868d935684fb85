"""`python -m taskd` is the same as the `taskd` command."""

from taskd.cli import main

if __name__ == "__main__":
    main()
