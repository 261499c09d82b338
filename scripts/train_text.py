"""Train the text encoder of `shapes`: python scripts/train_text.py --config configs/training/shapes_text.yaml

A second start goes on where the first was cut. Settings may follow as key=value.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

STOPPED = 143


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after so long")
    parser.add_argument("overrides", nargs="*", help="settings that go before those of the file: steps=100")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("wan").setLevel(logging.INFO)

    from nabla import InputError
    from wan.config import read_settings
    from wan.training.schema import with_overrides
    from wan.training.stopping import Diverged, Stopped
    from wan.training.text import TextSettings, TextTrainer

    try:
        settings = TextSettings.from_dict(with_overrides(read_settings(args.config), args.overrides))
        is_done = TextTrainer(settings).run(args.minutes)
    except (InputError, Diverged, Stopped) as error:
        print(f"error: {error}" if not isinstance(error, Stopped) else error, file=sys.stderr)
        return {Diverged: 1, Stopped: STOPPED}.get(type(error), 2)
    except KeyboardInterrupt:
        print("interrupted; the last saved state stands", file=sys.stderr)
        return 130
    print(f"{'trained' if is_done else 'not yet trained in full; start again to go on'}: {settings.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
