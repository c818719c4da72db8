"""Speed, as ratios to the authors' step within one run: `attention-transfer bench step|epoch|gradient|loss`.

`zoo` counts which networks of timm can be a teacher.
"""

NAMES = ("step", "epoch", "gradient", "loss", "zoo")
