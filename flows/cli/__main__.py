"""Run the command line as ``python -m flows.cli``."""

from __future__ import annotations

from flows.cli.main import main

main()
