"""Uploads a student to the Hugging Face hub: weights, model card, and code to load it."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.transforms import val_resize
from ..errors import RunError, UserError, first_line
from ..models.network import Network, load_trained, save_student
from ..outputs import check_new_folder
from ..run_folder import RunFolder
from .graph import save_pt2
from .hub_code import GRAPH, WEIGHTS, library, library_name, mean_and_std
from .model_card import model_card, public_name
from .options import PushOptions

CARD = "README.md"


def push(options: PushOptions, say: Callable[[str], None]) -> None:
    """Writes the folder of a student for the hub, and uploads it unless `dry_run`.

    Raises:
        UserError: for a name that the hub does not allow, a folder without a finished run, and an
            `out` that exists.
        RunError: if the upload fails.
    """
    _check_repo(options.repo)
    out = options.out
    if out is None and options.dry_run:
        out = Path(options.repo.partition("/")[2])
    if out is not None:
        check_new_folder("--out", out)
    network = load_trained(options.run, options.trust_code)
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        files = write_folder(network, options.run, options.repo, folder)
        if out is not None:
            say(f"{options.run} for the hub: {out} ({', '.join(files)})")
        if options.dry_run:
            say(f"nothing was uploaded; the target without --dry-run: {_address(options.repo)}")
            return
        kept = _upload(folder, options)
    say(f"{options.run} is at {_address(options.repo)}")
    if kept:
        say("the existing model card was kept; --force replaces it")
    else:
        say(f"next: fill in the licence in its {CARD}")


def _check_repo(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} cannot be a name on the hub: {first_line(error)}") from error
    if repo.count("/") != 1:
        raise UserError(f"{repo!r} names no owner: expected OWNER/NAME")


def write_folder(network: Network, run: Path, repo: str, folder: Path) -> list[str]:
    """Writes weights, card and the files for the loading code; returns the names of the files.

    Raises:
        UserError: if a network that is neither timm's nor torchvision's cannot be traced.
    """
    config, summary = RunFolder(run).config(), RunFolder(run).summary() or {}
    about = network.metadata() | {"model": public_name(network.name)}
    folder.mkdir(parents=True, exist_ok=True)
    save_student(folder / WEIGHTS, network.module, about)
    match library(network):
        case "timm":
            described = json.dumps(_timm_config(network, config), indent=2)
            (folder / "config.json").write_text(described)
        case None:
            save_pt2(network, about, folder / GRAPH, layers=[])
    (folder / CARD).write_text(model_card(network, repo, config, summary), encoding="utf-8")
    return sorted(file.name for file in folder.iterdir())


def _timm_config(network: Network, config: dict[str, Any]) -> dict[str, Any]:
    """The config.json from which timm creates a network of the hub and its preprocessing."""
    mean, std = mean_and_std(network)
    own: dict[str, Any] = getattr(network.module, "pretrained_cfg", {})
    same = {key: own[key] for key in ("first_conv", "classifier", "fixed_input_size") if key in own}
    images = {
        "input_size": [3, *network.image_size],
        "mean": mean,
        "std": std,
        "crop_pct": 1 / val_resize(config.get("augment") or "crop"),
        "crop_mode": "center",
        "interpolation": "bilinear",
        "num_classes": len(network.classes),
    }
    return {
        "architecture": library_name(network),
        "num_classes": len(network.classes),
        "label_names": list(network.classes),
        "pretrained_cfg": same | images,
    }


def _upload(folder: Path, options: PushOptions) -> bool:
    """Uploads the folder; returns whether an existing model card was kept."""
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = huggingface_hub.HfApi(library_name="attention-transfer")
    try:
        api.create_repo(options.repo, private=options.private, exist_ok=True)
        # Someone may have filled in the licence.
        keeps_card = not options.force and api.file_exists(options.repo, CARD)
        ignored = [CARD] if keeps_card else None
        api.upload_folder(
            repo_id=options.repo,
            folder_path=folder,
            commit_message="Upload the student",
            ignore_patterns=ignored,
        )
    except Exception as error:  # network errors and the hub's errors have no common class
        raise RunError(
            f"{options.repo} could not be uploaded: {type(error).__name__}: {first_line(error)} "
            "(`hf auth login` stores a token; --dry-run writes the folder and uploads nothing)"
        ) from error
    return keeps_card


def _address(repo: str) -> str:
    return f"https://huggingface.co/{repo}"
