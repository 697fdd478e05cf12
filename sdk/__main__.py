"""`python -m skipstone`: the same as the `skipstone` command."""

from skipstone.cli import main

if __name__ == "__main__":
    main()
