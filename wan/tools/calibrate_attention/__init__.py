"""Which share of blocks each layer keeps, and in which steps: measured on a checkpoint and a card, and solved for."""
