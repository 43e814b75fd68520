"""``kvpitfalls`` and ``python -m kvpitfalls``."""

import sys


def main() -> int:
    """:func:`kvpitfalls.cli.main`, and one line where Ctrl-C comes before that is imported."""
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:
        print("kvpitfalls: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
