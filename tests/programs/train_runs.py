"""Train by the settings of YAML files, one run after the other, all processes together."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from wan.training.config import TrainingSettings
from wan.training.trainer import Trainer

if __name__ == "__main__":
    for path in sys.argv[1:]:
        trainer = Trainer(TrainingSettings.from_dict(yaml.safe_load(Path(path).read_text())))
        trainer.run()
        trainer.close()
    trainer.accelerator.end_training()
