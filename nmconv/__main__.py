"""The command line: ``python -m nmconv bench MODEL``."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line, or say what to install for it."""
    missing = [name for name in ("typer", "rich") if _missing(name)]
    if missing:
        sys.exit(f"python -m nmconv needs {' and '.join(missing)}: pip install 'nmconv[bench]'")
    from nmconv.bench import app

    app(prog_name="python -m nmconv")


def _missing(name: str) -> bool:
    try:
        return find_spec(name) is None
    except ValueError:
        return True


if __name__ == "__main__":
    main()
