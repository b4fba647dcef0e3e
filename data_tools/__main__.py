"""`spark-data`, and `python -m data_tools`."""

import sys

from .errors import INTERRUPTED


def main() -> int:
    """Run the command line. What it needs is imported here, as Ctrl-C may come while it is."""
    try:
        from .cli import main

        return main()
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
