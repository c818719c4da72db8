"""Speed, as ratios to the authors' step within one run: `attention-transfer bench step|epoch|gradient|loss|…`.

`zoo` counts which networks of timm can be a teacher.
"""

NAMES = (
    "step",
    "epoch",
    "gradient",
    "loss",
    "teacher",
    "data",
    "compile",
    "parts",
    "peer",
    "scale",
    "zoo",
)
# Where a bench's own defaults differ from those of `step`.
DEFAULTS: dict[str, dict[str, object]] = {
    "gradient": {"student": "nin-thin-no-bn", "teacher": "nin-wide-no-bn"},
    "compile": {"batch_size": 64, "rounds": 1, "steps": 600},  # a step of the demo's students
    "scale": {
        "rounds": 3,
        "steps": 2,
        "compile": "off",
    },  # some 15 settings, each of which would be compiled anew
}
