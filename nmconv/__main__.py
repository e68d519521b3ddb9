"""The command line: ``python -m nmconv bench MODEL``."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line, or exit with a message about the packages that it needs."""
    missing = [name for name in ("typer", "rich") if _is_missing(name)]
    if missing:
        sys.exit(f"python -m nmconv needs {' and '.join(missing)}: pip install 'nmconv[bench]'")
    from nmconv.bench.command import app  # needs the packages checked above

    app(prog_name="python -m nmconv")


def _is_missing(name: str) -> bool:
    try:
        return find_spec(name) is None
    except ValueError:
        return True


if __name__ == "__main__":
    main()
