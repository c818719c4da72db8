"""The commands for trained networks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..apply.options import (
    CompareOptions,
    EvaluateOptions,
    ExportOptions,
    MapsOptions,
    PredictOptions,
    PushOptions,
    StagesOptions,
)
from ..console import make_console
from ..errors import UserError, plural
from ..options import from_mapping
from ..outputs import Force, JsonFile, check_json, check_output, write_numbers
from ..run_folder import find_runs, zoo_names
from ..view.options import ViewOptions
from .shared import Command


def evaluate(arguments: dict[str, Any]) -> None:
    """Measure the error and loss of a run's network, or of a model with trained weights."""
    options = from_mapping(EvaluateOptions, arguments)
    check_json(options.json, options.force)
    from ..apply.evaluate import evaluate_network

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
    if (attention := numbers.get("attention")) is not None:
        share, hits = attention["in_box"][-1], attention["pointing"][-1]
        area, random = attention["box_area"], attention["random_pointing"][-1]
        print(
            f"attention of the last stage: {100 * share:.1f} % in the box "
            f"(chance {100 * area:.1f} %), pointing game {100 * hits:.1f} % "
            f"(chance {100 * random:.1f} %) on {plural(attention['images'], 'image')}"
        )
    write_numbers(options.json, numbers)


def predict(arguments: dict[str, Any]) -> None:
    """Classify image files, or folders of images: classes with probabilities."""
    options = from_mapping(PredictOptions, arguments)
    check_json(options.json, options.force, options.files)
    from ..apply.predict import predict_files

    images = predict_files(
        options.run, options.files, options.top, options.device, options.trust_code
    )
    for image in images:
        ranked = []
        for guess in image["predictions"]:
            ranked.append(f"{guess['class']} {100 * guess['probability']:.1f} %")
        print(f"{image['file']}: {', '.join(ranked)}")
    write_numbers(options.json, {"run": str(options.run), "images": images})


def export(arguments: dict[str, Any]) -> None:
    """Write a run's network for other programs."""
    options = from_mapping(ExportOptions, arguments)
    check_json(options.json, options.force)
    from ..apply.export import export as write

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
    write_numbers(options.json, numbers)


def push(arguments: dict[str, Any]) -> None:
    """Upload a run's network to the Hugging Face hub, with a model card."""
    options = from_mapping(PushOptions, arguments)
    from ..apply.push import push as upload

    upload(options, print)


def compare(arguments: dict[str, Any]) -> None:
    """Compare runs in a table and a report; the seeds of one setting make one row."""
    options = from_mapping(CompareOptions, arguments)
    for flag, needed in (("device", "speed"), ("title", "out")):
        if flag in arguments and not getattr(options, needed):
            raise UserError(f"--{flag} does nothing without --{needed}: add it, or leave it out")
    check_json(options.json, options.force)
    from ..report import (
        check_page_file,
        comparison_numbers,
        group_runs,
        print_table,
        read_run,
        write_report,
    )

    if options.out is not None:
        check_page_file(options.out)
        check_output("--out", options.out, "html", options.force)
    runs = [read_run(folder) for folder in find_runs(list(options.runs))]
    if options.speed:
        from ..apply.speed import measure_speeds

        folders = [run.folder for run in runs]
        speeds = measure_speeds(folders, options.device, options.trust_code)
        for run in runs:
            run.speed = speeds.get(run.folder)
    console = make_console()
    rows = group_runs(runs)
    print_table(rows, console)
    if options.json is not None:
        write_numbers(options.json, comparison_numbers(rows))
    if options.out is not None:
        write_report(runs, options.out, options.title)
        console.out(f"report: {options.out}")


def maps(arguments: dict[str, Any]) -> None:
    """Draw the attention maps of runs or models side by side."""
    options = from_mapping(MapsOptions, arguments)
    from ..apply.load import image_files
    from ..apply.maps import map_columns
    from ..report import MapColumn, check_figure_file, save_maps_figure

    check_figure_file(options.out)
    kind = options.out.suffix.lower().removeprefix(".")
    images, spec_path = Path(options.images), options.images.partition(":")[2]
    inputs = [Path(spec_path)] if spec_path else []
    if images.exists():
        inputs = image_files(images)
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
    """List the stages of a network, and the pairs that "auto" picks for a student and a teacher."""
    options = from_mapping(StagesOptions, arguments)
    check_json(options.json, options.force)
    from ..apply.stages import list_stages, print_stages

    listed = list_stages(options.model, options.teacher, options.image_size, options.trust_code)
    print_stages(listed, make_console())
    write_numbers(options.json, listed)


def view(arguments: dict[str, Any]) -> None:
    """Serve a page on this machine that shows where each network looks in an image."""
    options = from_mapping(ViewOptions, arguments)
    try:
        from ..view.server import open_socket, serve
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        raise UserError("view needs aiohttp: pip install 'attention-transfer[view]'") from error
    from ..view.viewer import Viewer

    # Opened first, so that a port in use is reported before the networks are loaded.
    with open_socket(options.host, options.port) as listening:
        viewer = Viewer(options.networks, options.kind, options.p, options.trust_code)
        host, port = listening.getsockname()[:2]
        if ":" in host:
            host = f"[{host}]"
        print(f"http://{host}:{port}/ shows {plural(len(viewer.viewed), 'network')}", flush=True)
        serve(viewer, listening)
    # After Ctrl-C or SIGTERM `serve` returns; every command then ends with status 130.
    raise KeyboardInterrupt("the page is closed")


@dataclass(frozen=True)
class ZooOptions:
    """Where to write the list."""

    json: JsonFile = None
    force: Force = False


def zoo(arguments: dict[str, Any]) -> None:
    """List the trained networks of the package; use one as the model zoo:NAME."""
    options = from_mapping(ZooOptions, arguments)
    check_json(options.json, options.force)
    from ..report.zoo import ZooEntry, print_zoo

    entries = [ZooEntry.read(name) for name in zoo_names()]
    print_zoo(entries, make_console())
    write_numbers(options.json, {"networks": [asdict(entry) for entry in entries]})


NETWORKS = {
    "evaluate": Command(evaluate, EvaluateOptions),
    "predict": Command(predict, PredictOptions),
    "compare": Command(compare, CompareOptions),
    "maps": Command(maps, MapsOptions),
    "stages": Command(stages, StagesOptions),
    "view": Command(view, ViewOptions),
    "export": Command(export, ExportOptions),
    "push": Command(push, PushOptions),
    "zoo": Command(zoo, ZooOptions),
}
