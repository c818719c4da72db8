"""Adds the network of a finished run to the trained networks that come with the package.

    python bench/add_to_zoo.py RUN NAME [--half] [--data D] [--about TEXT]

The entry is a run folder in src/attention_transfer/zoo/NAME: weights, config.yaml, environment.json
and summary.json without paths of this machine, the checksum of the weights, and README.md, a model
card. The stored weights are evaluated once more, on the run's own data or on --data.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from attention_transfer import run_folder
from attention_transfer.apply.evaluate import evaluate_network
from attention_transfer.errors import UserError
from attention_transfer.models.network import file_fingerprint, load_run_network, save_student
from attention_transfer.run_folder import ZOO, RunFolder, write_json

LARGEST = 4_000_000  # bytes of weights in the repository
# Keys of summary.json that describe the machine, not the network.
LEFT_OUT = ("inference", "images_per_second")


def add(run: Path, name: str, half: bool, data: str | None, about: str) -> Path:
    """The folder of the new entry.

    Raises:
        UserError: for an invalid or existing name, an unfinished run, and weights that are too
            large.
    """
    folder = run_folder.ZOO_FOLDER / name
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise UserError(f"NAME is {name!r}: expected lower-case letters, digits, dots and dashes")
    if folder.exists():
        raise UserError(f"{folder} exists: choose another NAME, or remove it")
    source = RunFolder.open(run)
    summary = source.summary()
    if summary is None:
        raise UserError(f"{run} is not finished")
    try:
        _write(source, RunFolder(folder), summary, half)
        metrics = evaluate_network(
            f"{ZOO}{name}", data or source.config()["data"], precision="fp32"
        )
        stored = RunFolder(folder).summary() or {}
        stored["stored_accuracy"] = metrics["accuracy"]
        stored["attention"] = metrics.get("attention")
        write_json(folder / "summary.json", stored)
        card = model_card(name, stored, RunFolder(folder), about)
        (folder / "README.md").write_text(card)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _write(source: RunFolder, entry: RunFolder, summary: dict[str, Any], half: bool) -> None:
    network = load_run_network(source.path)
    if half:
        network.module.half()
    model = network.name.removesuffix(":pretrained")
    about = network.metadata() | {"model": model}
    save_student(entry.student_file, network.module, about)
    size = entry.student_file.stat().st_size
    if size > LARGEST:
        raise UserError(
            f"the weights have {size / 1e6:.1f} MB: expected at most {LARGEST / 1e6:.0f} MB "
            "(--half stores them in float16)"
        )
    places = _places(source, summary)
    config = source.config() | {"model": model, "student_weights": None}
    entry.write_config(_without_places(config, places))
    write_json(entry.environment_file, _without_places(source.environment(), places))
    kept = {key: value for key, value in summary.items() if key not in LEFT_OUT}
    kept |= {"model": model, "dtype": "float16" if half else "float32"}
    kept |= {"sha256": file_fingerprint(entry.student_file)}
    # Provisional, so that the entry can be opened to evaluate the stored weights.
    kept["stored_accuracy"] = summary["final"]["val_accuracy"]
    write_json(entry.summary_file, _without_places(kept, places))


def _places(source: RunFolder, summary: dict[str, Any]) -> dict[str, str]:
    """The replacement for each path of this machine."""
    config = source.config()
    kind, _, place = str(config.get("data", "")).partition(":")
    places = {}
    if place:
        places[f"{kind}:{place}"] = (
            kind if kind.startswith("cifar") else f"{kind}:{Path(place).name}"
        )
    teacher = summary.get("teacher") or {}
    own = str(config.get("teacher"))
    model = own if own.startswith(ZOO) else str(teacher.get("model"))
    for name in (own, teacher.get("folder")):
        if teacher and name:
            places[str(name)] = model
    return places


def _without_places(value: Any, places: dict[str, str]) -> Any:
    """`value` with these paths replaced; of any other absolute path, the last part is kept."""
    text = json.dumps(value, ensure_ascii=False)
    if places:
        names = {json.dumps(place, ensure_ascii=False)[1:-1]: places[place] for place in places}
        longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        # A whole path, or the folders at the start of one: not runs/at within runs/at+kd.
        text = re.sub(rf'(?<=["=])({longest_first})(?=["/])', lambda m: names[m[1]], text)
    return json.loads(re.sub(r'"/[^"]*/([^"/]+)"', r'"\1"', text))


def model_card(name: str, summary: dict[str, Any], entry: RunFolder, about: str) -> str:
    """README.md of an entry."""
    environment, config = entry.environment(), entry.config()
    hardware = environment.get("hardware") or {}
    teacher = summary.get("teacher") or {}
    method = "alone" if summary["method"] == "none" else summary["method"]
    lines = [
        f"# `{ZOO}{name}`",
        "",
        about or f"{summary['model']} on {summary['data']}.",
        "",
        "| | |",
        "|---|---|",
        f"| network | {summary['model']}, {summary['parameters']:,.0f} parameters |",
        f"| data | {summary['data']}, {len(summary['classes'])} classes |",
        f"| training | {method}, {summary['epochs']} epochs, seed {summary['seed']} |",
        f"| error | {100 * (1 - summary['stored_accuracy']):.2f} %, the last epoch's weights in "
        f"{summary['dtype']} |",
    ]
    if teacher:
        error = 100 * (1 - teacher["val_accuracy"])
        lines.append(f"| teacher | {teacher['model']}, {error:.2f} % error |")
    words = " ".join(environment.get("command") or [])
    machine = hardware.get("gpu") or hardware.get("cpu")
    lines += [
        f"| command | `{words}` |",
        f"| commit | {environment.get('commit')} |",
        f"| hardware | {machine} |",
        f"| SHA-256 | `{summary['sha256']}` |",
        "",
        f"The recipe is in config.yaml (batch {config.get('batch_size')}, "
        f"rate {config.get('lr')}, {config.get('schedule')}).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--half", action="store_true", help="store the weights in float16")
    parser.add_argument("--data", help="the images to evaluate on, if they have moved")
    parser.add_argument("--about", default="", help="a sentence for the card")
    given = parser.parse_args()
    try:
        print(add(given.run, given.name, given.half, given.data, given.about))
    except UserError as error:
        print(f"add_to_zoo.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
