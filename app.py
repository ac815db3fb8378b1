"""The web UI: `python app.py [--host H] [--port P]`, which is `pointillist app`."""

import sys

from pointillist.cli import main

if __name__ == "__main__":
    main(["app", *sys.argv[1:]])
