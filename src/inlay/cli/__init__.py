"""The command line. ``main`` is the ``inlay`` binary; the libraries it is made of are loaded once it runs."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run ``inlay``. Exit codes: 0 done, 1 something broke, 2 the input cannot be used, 130 interrupted.

    Args:
        arguments: the words behind ``inlay``; those of the process when not given.
    """
    try:
        from .app import run
    except ModuleNotFoundError as error:
        sys.exit(f"error: the package '{error.name}' is missing; install the command line with pip install 'inlay[train]'.")
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))
