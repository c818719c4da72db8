"""Whether a folder may be written to: it is empty, or holds this very run."""

from __future__ import annotations

from ..config import Recipe
from ..errors import UserError
from ..run_folder import RunFolder


def check_folder(folder: RunFolder, recipe: Recipe) -> None:
    """Raises `UserError` for a folder that holds something else, or another run than the recipe's."""
    above = next(p for p in (folder.path, *folder.path.absolute().parents) if p.exists())
    if not above.is_dir():
        raise UserError(f"--out {folder}: {above} is a file; choose a new folder")
    if not folder.exists:
        if folder.path.is_file() or (
            folder.path.is_dir() and any(p.name[0] != "." for p in folder.path.iterdir())
        ):
            raise UserError(
                f"--out {folder} exists and holds no run of this tool: choose a new folder"
            )
        return
    precision = (folder.environment().get("auto") or {}).get("precision")
    if precision is not None and recipe.precision not in ("auto", precision):
        raise UserError(
            f"{folder} holds a run in {precision}: leave --precision out, or choose another --out"
        )
    streamed = folder.environment().get("streamed")
    if streamed is not None and recipe.stream == ("off" if streamed else "on"):
        how = "streamed" if streamed else "resident"
        raise UserError(
            f"{folder} holds a run with {how} images: leave --stream out, or choose another --out"
        )
    # Of options that came later than the run, it has what they do by themselves.
    there, here = Recipe().to_dict() | folder.config(), recipe.identity()
    differing = [
        f"{k} is {there.get(k)!r} there and {v!r} here"
        for k, v in here.items()
        if there.get(k) != v
    ]
    if differing:
        raise UserError(
            f"{folder} holds a different run ({'; '.join(differing[:4])}): choose another --out, or remove it"
        )


def check_teacher(folder: RunFolder, fingerprint: str | None) -> None:
    """Raises `UserError` where the run in `folder` had a teacher of other weights."""
    before = folder.environment().get("teacher")
    if fingerprint is not None and before is not None and fingerprint != before:
        raise UserError(
            f"{folder} was trained with other weights of its teacher: choose another --out"
        )
