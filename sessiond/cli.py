"""The command `sessiond`. This module needs nothing but the standard library, so that it can say what is missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exits with status 0 only on success."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.stderr.write(f"sessiond's command line needs {error.name}: pip install 'sessiond[cli]'\n")
        sys.exit(1)
    from sessiond.cli_app import app

    app()


if __name__ == "__main__":
    main()
