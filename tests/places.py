"""Where the project and what its tests need lie."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
DATA, PROGRAMS = TESTS / "data", TESTS / "programs"
