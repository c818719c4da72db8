"""Speed, as ratios to the authors' step within one run: `attention-transfer bench step|epoch`."""

NAMES = ("step", "epoch")
