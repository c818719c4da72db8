"""The commands: a dataclass of options and a function each. Its docstring is the help.

Heavy packages are imported inside the functions, so that --help is quick.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from . import bench as benches
from .apply.options import (
    CompareOptions,
    EvaluateOptions,
    ExportOptions,
    MapsOptions,
    PredictOptions,
    PushOptions,
    StagesOptions,
)
from .config import LaunchOptions, distill_groups, recipe_from_flags, train_groups
from .errors import UserError, plural
from .options import Int, OptionSpec, from_mapping, option, option_specs
from .outputs import check_output
from .store import options as store_options
from .view.options import ViewOptions


def _console() -> Any:
    from rich.console import Console

    if os.environ.get("NO_COLOR"):
        # Bold text and the live line are control characters, too.
        return Console(force_terminal=False)
    return Console()


def _check_json(file: Path | None, force: bool, inputs: Iterable[Path] = ()) -> None:
    if file is not None:
        check_output("--json", file, "json", force, inputs)


def _write_json(file: Path | None, value: Any) -> None:
    if file is not None:
        from .run_folder import write_json

        write_json(file, value)


# train, distill


def train(arguments: dict[str, Any]) -> None:
    """Train one network alone: a teacher, or a baseline."""
    _launch("train", arguments)


def distill(arguments: dict[str, Any]) -> None:
    """Train a student under a teacher's guidance; without --teacher, the student alone."""
    _launch("distill", arguments)


def _launch(command: str, arguments: dict[str, Any]) -> None:
    keys = option_specs(LaunchOptions).keys() & arguments.keys()
    launch = from_mapping(LaunchOptions, {key: arguments.pop(key) for key in keys})
    recipe = recipe_from_flags(command, launch.recipe, launch.config, arguments)
    from .launch import run_seeds
    from .next_steps import next_steps
    from .runtime.process import local_rank

    folders = run_seeds(recipe, launch.out, launch.seeds, _console(), launch.jobs)
    if local_rank() == 0 and all(folder.finished for folder in folders):
        for line in next_steps(launch.out, folders):
            print(line)


# evaluate, predict, export, compare, maps, stages, view


def evaluate(arguments: dict[str, Any]) -> None:
    """Error and loss of a run's network, or of a model with trained weights."""
    options = from_mapping(EvaluateOptions, arguments)
    _check_json(options.json, options.force)
    from .apply.evaluate import evaluate_network

    numbers = evaluate_network(
        options.network,
        options.data,
        options.weights,
        options.image_size,
        options.limit_val,
        options.device,
        options.precision,
        options.trust_code,
    )
    top5 = ""
    if "top5" in numbers:
        top5 = f", top-5 error {100 * (1 - numbers['top5']):.2f} %"
    print(
        f"{options.network}: error {100 * (1 - numbers['accuracy']):.2f} %{top5}, "
        f"loss {numbers['loss']:.4f} on {plural(numbers['images'], 'image')} "
        f"in {numbers['precision']}"
    )
    _write_json(options.json, numbers)


def predict(arguments: dict[str, Any]) -> None:
    """Classes and probabilities of image files, or of folders of them."""
    options = from_mapping(PredictOptions, arguments)
    _check_json(options.json, options.force, options.files)
    from .apply.predict import predict_files

    images = predict_files(
        options.run, options.files, options.top, options.device, options.trust_code
    )
    for image in images:
        ranked = []
        for guess in image["predictions"]:
            ranked.append(f"{guess['class']} {100 * guess['probability']:.1f} %")
        print(f"{image['file']}: {', '.join(ranked)}")
    _write_json(options.json, {"run": str(options.run), "images": images})


def export(arguments: dict[str, Any]) -> None:
    """Write a run's network for other programs."""
    options = from_mapping(ExportOptions, arguments)
    _check_json(options.json, options.force)
    from .apply.export import export as write

    form, numbers = write(options)
    print(f"{options.run} as {form}: {options.out}")
    for precision in ("fp32", "int8"):
        if precision in numbers:
            measured = numbers[precision]
            print(
                f"  {precision}: error {100 * (1 - measured['accuracy']):.2f} %, loss "
                f"{measured['loss']:.4f} on {plural(numbers['images'], 'image')}, "
                f"{measured['bytes'] / 1e6:.2f} MB"
            )
    _write_json(options.json, numbers)


def push(arguments: dict[str, Any]) -> None:
    """Upload a run's network to the Hugging Face hub, with a model card."""
    options = from_mapping(PushOptions, arguments)
    from .apply.push import push as upload

    upload(options, print)


def compare(arguments: dict[str, Any]) -> None:
    """Table and report across runs; the seeds of one setting make one row."""
    options = from_mapping(CompareOptions, arguments)
    from .report import check_page_file, group_runs, print_table, read_run, write_report
    from .run_folder import find_runs

    if options.out is not None:
        check_page_file(options.out)
        check_output("--out", options.out, "html", options.force)
    runs = [read_run(folder) for folder in find_runs(list(options.runs))]
    if options.speed:
        from .apply.speed import measure_speeds

        folders = [run.folder for run in runs]
        speeds = measure_speeds(folders, options.device, options.trust_code)
        for run in runs:
            run.speed = speeds.get(run.folder)
    console = _console()
    print_table(group_runs(runs), console)
    if options.out is not None:
        write_report(runs, options.out, options.title)
        console.print(f"report: {options.out}", markup=False, highlight=False, soft_wrap=True)


def maps(arguments: dict[str, Any]) -> None:
    """Draw the attention maps of runs or models side by side."""
    options = from_mapping(MapsOptions, arguments)
    from .apply.load import image_files
    from .apply.maps import map_columns
    from .report import MapColumn, check_figure_file, save_maps_figure

    check_figure_file(options.out)
    kind = options.out.suffix.lower().removeprefix(".")
    images = Path(options.images)
    inputs = image_files(images) if images.exists() else []
    check_output("--out", options.out, kind, options.force, inputs)
    pictures, columns, notes = map_columns(
        list(options.networks),
        options.images,
        options.limit,
        options.kind,
        options.p,
        options.trust_code,
    )
    save_maps_figure([MapColumn(*column) for column in columns], pictures, options.out)
    for note in notes:
        print(note)
    size = f"{plural(len(pictures), 'image')} × {plural(len(columns), 'network')}"
    print(f"{size}: {options.out}")


def stages(arguments: dict[str, Any]) -> None:
    """The layers of a network, and the pairs that "auto" picks for a student and a teacher."""
    options = from_mapping(StagesOptions, arguments)
    from .apply.stages import print_stages

    print_stages(options.model, options.teacher, options.image_size, _console(), options.trust_code)


def view(arguments: dict[str, Any]) -> None:
    """Serve a page on this machine: drop an image, and see where each network looks."""
    options = from_mapping(ViewOptions, arguments)
    try:
        from .view.server import open_socket, serve
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        raise UserError("view needs aiohttp: pip install 'attention-transfer[view]'") from error
    from .view.look import Viewer

    with open_socket(options.host, options.port) as listening:
        viewer = Viewer(options.networks, options.kind, options.p, options.trust_code)
        host, port = listening.getsockname()[:2]
        if ":" in host:
            host = f"[{host}]"
        print(f"http://{host}:{port}/ shows {plural(len(viewer.viewed), 'network')}", flush=True)
        serve(viewer, listening)
    raise KeyboardInterrupt("the page is closed")


# teach


def teach(arguments: dict[str, Any]) -> None:
    """Keep what a teacher says of fixed views of the images: distill --teacher STORE needs no more.

    The same command goes on filling a store that is not full.
    """
    options = store_options.teach_options(arguments)
    from .runtime.process import deterministic_algorithms
    from .train.teach import teach as fill

    with deterministic_algorithms(options.deterministic):
        fill(options, _console())


# demo, bench


@dataclass(frozen=True)
class DemoOptions:
    """The demo."""

    out: Annotated[Path, option("Folder to write.")] = Path("runs/demo")
    seeds: Annotated[Int, option("Seeds of each student.", ge=1)] = 3


def demo(arguments: dict[str, Any]) -> None:
    """The whole story on the built-in data: about 6 minutes on a 2-core CPU."""
    options = from_mapping(DemoOptions, arguments)
    from .demo import run_demo

    run_demo(options.out, options.seeds, _console())


def bench(arguments: dict[str, Any]) -> None:
    """Measure speed, as ratios to the authors' step within one run."""
    name, json = arguments.pop("name"), arguments.pop("json", None)
    force = arguments.pop("force", False)
    options = from_mapping(
        benches.BenchCommandOptions, {"name": name, "json": json, "force": force}
    )
    _check_json(options.json, options.force)
    benches.run_bench(options.name, arguments, _console(), options.json)


def _bench_groups() -> dict[str, list[OptionSpec]]:
    specs = option_specs(benches.BenchCommandOptions) | option_specs(benches.BenchOptions)
    return {"options": [*specs.values()]}


@dataclass(frozen=True)
class ZooOptions:
    """The list takes no options."""


def zoo(arguments: dict[str, Any]) -> None:
    """List the trained networks that come with the package, named zoo:NAME like any model."""
    from .apply.zoo import print_zoo

    print_zoo(_console())


@dataclass(frozen=True)
class CompletionOptions:
    """Which shell."""

    shell: Annotated[Literal["bash", "zsh"], option("bash or zsh.", positional=True)]


def completion(arguments: dict[str, Any]) -> None:
    """Print a script that completes commands and flags in bash or zsh."""
    options = from_mapping(CompletionOptions, arguments)
    from .completion import completion_script

    described = {}
    for name, command in COMMANDS.items():
        described[name] = (str(command.run.__doc__).splitlines()[0], command.groups())
    print(completion_script("attention-transfer", options.shell, described))


def reproduce(arguments: dict[str, Any]) -> None:
    """A table of the paper: carry out its runs, or continue, and print it beside the paper's."""
    from .studies.options import PASSED_ON, ReproduceOptions

    changes = {key: arguments.pop(key) for key in PASSED_ON if key in arguments}
    options = from_mapping(ReproduceOptions, arguments)
    from .studies.reproduce import reproduce

    reproduce(options, changes, _console())


def study(arguments: dict[str, Any]) -> None:
    """A question of the paper's reviewers: its runs, a table with intervals, and a plot."""
    from .studies.options import PASSED_ON, StudyOptions

    changes = {key: arguments.pop(key) for key in PASSED_ON if key in arguments}
    options = from_mapping(StudyOptions, arguments)
    from .studies.study import run_study

    run_study(options, arguments, changes, _console())


def _reproduce_groups() -> dict[str, list[OptionSpec]]:
    from .studies.options import ReproduceOptions

    return _lot_groups(ReproduceOptions, "the table's")


def _study_groups() -> dict[str, list[OptionSpec]]:
    from .studies.options import StudyOptions

    return _lot_groups(StudyOptions, "the study's")


def _lot_groups(options: type, theirs: str) -> dict[str, list[OptionSpec]]:
    """Options of many runs, and those of the recipe that hold for all of them."""
    from .config import Recipe
    from .studies.options import PASSED_ON

    recipe = option_specs(Recipe)
    passed_on = [replace(recipe[key], default_text=theirs) for key in PASSED_ON]
    return {"options": [*option_specs(options).values()], "of every run": passed_on}


@dataclass(frozen=True)
class Command:
    """A command: `run` gets the arguments that were given; its docstring is the help."""

    run: Callable[[dict[str, Any]], None]
    options: type | None = None
    grouped_options: Callable[[], dict[str, list[OptionSpec]]] | None = None

    def groups(self) -> dict[str, list[OptionSpec]]:
        """The options by the titles of their groups in the help."""
        if self.grouped_options is not None:
            return self.grouped_options()
        assert self.options is not None, "a command has options"
        return {"options": list(option_specs(self.options).values())}


COMMANDS = {
    "demo": Command(demo, DemoOptions),
    "train": Command(train, grouped_options=train_groups),
    "distill": Command(distill, grouped_options=distill_groups),
    "teach": Command(teach, grouped_options=store_options.teach_groups),
    "evaluate": Command(evaluate, EvaluateOptions),
    "predict": Command(predict, PredictOptions),
    "compare": Command(compare, CompareOptions),
    "maps": Command(maps, MapsOptions),
    "stages": Command(stages, StagesOptions),
    "view": Command(view, ViewOptions),
    "export": Command(export, ExportOptions),
    "push": Command(push, PushOptions),
    "zoo": Command(zoo, ZooOptions),
    "reproduce": Command(reproduce, grouped_options=_reproduce_groups),
    "study": Command(study, grouped_options=_study_groups),
    "bench": Command(bench, grouped_options=_bench_groups),
    "completion": Command(completion, CompletionOptions),
}
