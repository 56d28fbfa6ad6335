"""`nox -s matrix`: every cell of the support table, run for real. `nox -s matrix -- --help` says more."""

from __future__ import annotations

import sys

import nox

nox.options.sessions = ["matrix"]


@nox.session(venv_backend="none")
def matrix(session: nox.Session) -> None:
    """Build an environment for each CPU row of the support table, run tests/cell.py in it, write a report."""
    # Each row has an environment of its own, so the session has none.
    session.run(sys.executable, "scripts/matrix.py", *session.posargs, external=True)
