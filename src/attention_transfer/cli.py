"""The command `attention-transfer`: words -> recipe -> engine. Every heavy package is imported where it is used."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from . import __version__
from .cli_options import DATA_HELP, METHOD_OPTIONS, MODEL_HELP, TRAINING_OPTIONS, Option, option
from .errors import LocalError, RunError, UserError, nearest

PROGRAM = "attention-transfer"


class Commands(click.Group):
    """A group that points to the nearest command."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            names = self.list_commands(ctx)
            raise UserError(
                f"unknown command {args[0]!r}{nearest(args[0], names)} (commands: {', '.join(names)})"
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Stopped(str(stop)) from stop


class _Stopped(Exception):
    """A KeyboardInterrupt on its way through click, which would print an empty line and drop what it says."""


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name=PROGRAM)
def app() -> None:
    """Train a small network to look where a strong one looks (attention transfer, Zagoruyko & Komodakis 2017)."""


def main() -> None:
    """Runs the command; a person's mistake ends with status 2, a failed run with 1, Ctrl-C with 130."""
    try:
        app.main(prog_name=PROGRAM, standalone_mode=False)
    except click.exceptions.Abort:
        _leave("interrupted", 130)
    except click.ClickException as error:
        if (
            type(error).__name__ == "NoArgsIsHelpError"
        ):  # from click 8.2 on; the message is the help
            click.echo(error.format_message())
            sys.exit(0)
        _leave(error.format_message(), 2)
    except UserError as error:
        _leave(str(error), 2, everywhere=isinstance(error, LocalError))
    except _Stopped as stop:
        _leave(f"interrupted: {stop}" if str(stop) else "interrupted", 130)
    except RunError as error:
        _leave(str(error), 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (
        FileExistsError,
        FileNotFoundError,
        IsADirectoryError,
        NotADirectoryError,
        PermissionError,
    ) as error:
        if os.environ.get("ATTENTION_TRANSFER_TRACEBACK"):
            raise
        _leave(f"{error.filename or 'a file'}: {error.strerror or error}", 2)
    except Exception as error:
        if os.environ.get("ATTENTION_TRANSFER_TRACEBACK"):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        _leave(
            f"{type(error).__name__}: {first} (ATTENTION_TRANSFER_TRACEBACK=1 shows where)",
            1,
            everywhere=True,
        )


def _leave(message: str, status: int, everywhere: bool = False) -> None:
    # Where a run has several processes, the first one speaks for all that stopped for the same reason.
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        click.echo(f"{PROGRAM}: {' '.join(message.split())}", err=True)
    sys.exit(status)


def _options(options: list[Option]) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        for names, settings in reversed(options):
            function = click.option(*names, **settings)(function)
        return function

    return add


def _console() -> Any:
    from rich.console import Console

    return Console()


def _recipe(command: str, words: dict[str, Any]) -> Any:
    """Defaults < the data's own < --recipe < --config < flags and the command's own name."""
    from .config import make_recipe, named_recipe, parse_per_method, read_recipe

    layers = []
    if (name := words.pop("recipe")) is not None:
        layers.append(named_recipe(name))
    if (file := words.pop("config")) is not None:
        layers.append(read_recipe(file))
    flags = {k: v for k, v in words.items() if v is not None}
    for key, number in (("beta", True), ("decay", False)):
        if key in flags:
            flags[key] = parse_per_method(flags[key], number)
    if "milestones" in flags:
        try:
            flags["milestones"] = [int(m) for m in flags["milestones"].split(",")]
        except ValueError:
            raise UserError(
                f"--milestones is {flags['milestones']!r}: expected epochs like 60,120,160"
            ) from None
    data = next(
        (layer["data"] for layer in (flags, *reversed(layers)) if "data" in layer), "digits"
    )
    own = {"flip": False} if data == "digits" else {}  # a mirrored digit is another sign
    recipe = make_recipe(own, *layers, flags, {"command": command})
    for key in ("milestones", "lr_decay"):
        if (
            key in flags and recipe.schedule != "step"
        ):  # a recipe may have them for those who choose its schedule
            flag = key.replace("_", "-")
            raise UserError(
                f"--{flag} is given, but --schedule {recipe.schedule} has none: add --schedule step"
            )
    return recipe


def _launch(command: str, words: dict[str, Any]) -> None:
    out, seeds, at_once = (words.pop(key) for key in ("out", "seeds", "at_once"))
    for name, value in (("--seeds", seeds), ("--at-once", at_once)):
        if value < 1:
            raise UserError(f"{name} is {value}: expected at least 1")
    recipe = _recipe(command, words)
    from .launch import run_seeds

    run_seeds(recipe, out, seeds, _console(), at_once)


@app.command()
@_options([option("--model", help=MODEL_HELP), *TRAINING_OPTIONS])
def train(**words: Any) -> None:
    """Train one network alone: a teacher, or a baseline."""
    _launch("train", words)


@app.command()
@_options(
    [option("--student", "--model", "model", help=MODEL_HELP), *METHOD_OPTIONS, *TRAINING_OPTIONS]
)
def distill(**words: Any) -> None:
    """Train a student under a teacher's guidance; --method none is the student alone."""
    _launch("distill", words)


@app.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", help=f"Other data than the run's own validation images. {DATA_HELP}")
@click.option("--limit-val", type=int, help="So many images, balanced over the classes.")
@click.option("--device", default="auto", help="auto, cpu, cuda or mps.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write the numbers here too."
)
def evaluate(
    run: Path, data: str | None, limit_val: int | None, device: str, json_file: Path | None
) -> None:
    """Error and loss of a run's network."""
    from .apply.evaluate import evaluate_run

    found = evaluate_run(run, data, limit_val, device)
    top5 = f", top-5 error {100 * (1 - found['top5']):.2f} %" if "top5" in found else ""
    click.echo(
        f"{run}: error {100 * (1 - found['accuracy']):.2f} %{top5}, loss {found['loss']:.4f} "
        f"on {found['images']} images"
    )
    if json_file is not None:
        from .run_folder import write_json

        write_json(json_file, found)


@app.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", type=int, default=5, help="So many classes an image at most. [5]")
@click.option("--device", default="auto", help="auto, cpu, cuda or mps.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write the probabilities here too."
)
def predict(
    run: Path, files: tuple[Path, ...], top: int, device: str, json_file: Path | None
) -> None:
    """Classes and probabilities of image files, or of folders of them."""
    from .apply.predict import predict_files

    found = predict_files(run, files, top, device)
    for image in found:
        ranked = ", ".join(
            f"{p['class']} {100 * p['probability']:.1f} %" for p in image["predictions"]
        )
        click.echo(f"{image['file']}: {ranked}")
    if json_file is not None:
        from .run_folder import write_json

        write_json(json_file, {"run": str(run), "images": found})


@app.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", required=True, help="safetensors, onnx, pt2 or authors (a folder)."
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The file, or folder, to write."
)
def export(run: Path, form: str, out: Path) -> None:
    """Write a run's network for other programs."""
    from .apply.export import export_run

    export_run(run, form, out)
    click.echo(f"{run} as {form}: {out}")


@app.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write the report here (HTML, one file, no network).",
)
@click.option("--title", help="The report's headline.")
def compare(runs: tuple[Path, ...], out: Path | None, title: str | None) -> None:
    """Table and report across runs; the seeds of one setting make one row."""
    from .report import group_runs, print_table, read_run, write_report
    from .run_folder import find_runs

    found = [read_run(f) for f in find_runs(list(runs))]
    console = _console()
    print_table(group_runs(found), console)
    if out is not None:
        write_report(found, out, title)
        console.print(f"report: {out}", markup=False, highlight=False, soft_wrap=True)


@app.command()
@click.argument("networks", nargs=-1, required=True)
@click.option(
    "--images", required=True, help=f"A folder of images, one image, or data: {DATA_HELP}"
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The PNG to write.")
@click.option("--limit", type=int, default=8, help="So many images at most. [8]")
@click.option("--kind", default="sum", help="sum or max over channels. [sum]")
@click.option("--p", type=float, default=2.0, help="Exponent of the map. [2]")
def maps(
    networks: tuple[str, ...], images: str, out: Path, limit: int, kind: str, p: float
) -> None:
    """Draw the attention maps of runs or models side by side."""
    from .apply.maps import map_columns
    from .report import MapColumn, save_maps_figure

    pictures, columns = map_columns(list(networks), images, limit, kind, p)
    save_maps_figure([MapColumn(*column) for column in columns], pictures, out)
    click.echo(f"{len(pictures)} images × {len(columns)} networks: {out}")


@app.command()
@click.argument("model")
@click.argument("teacher", required=False)
@click.option(
    "--image-size",
    type=int,
    help="Height and width of the example. [32 for wrn and nin, a run's own, else 224]",
)
def stages(model: str, teacher: str | None, image_size: int | None) -> None:
    """The layers of a network, and the pairs of two (student, teacher) that "auto" picks."""
    from .apply.stages import print_stages

    print_stages(model, teacher, image_size, _console())


@app.command()
@click.option("--out", default="runs/demo", type=click.Path(path_type=Path), help="[runs/demo]")
@click.option("--seeds", type=int, default=3, help="Seeds of each student. [3]")
def demo(out: Path, seeds: int) -> None:
    """The whole story on the built-in data: about 6 minutes on a 2-core CPU."""
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}: expected at least 1")
    from .demo import run_demo

    run_demo(out, seeds, _console())


def _bench_flags(function: Any) -> Any:
    from .bench import BenchOptions
    from .options import option_specs

    for spec in reversed(option_specs(BenchOptions).values()):
        shown = spec.default if spec.default_text is None else spec.default_text
        function = click.option(spec.flag, help=f"{spec.help} [{shown}]")(function)
    return function


@app.command()
@click.argument("name")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write the table to this file too."
)
@_bench_flags
def bench(name: str, json_file: Path | None, **given: Any) -> None:
    """Measure speed as ratios to the authors' step: step, epoch, loss, teacher, data, gradient, compile (whole runs)."""
    from .bench import run_bench

    run_bench(name, given, _console(), json_file)
