"""`python -m pointillist` is the command line."""

from pointillist.cli import main

if __name__ == "__main__":
    main()
