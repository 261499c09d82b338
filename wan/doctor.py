"""`python -m wan.doctor`, see `wan.tools.doctor`."""

from __future__ import annotations

from wan.observe.console import exit_with
from wan.tools.doctor.__main__ import main

if __name__ == "__main__":
    exit_with(main())
