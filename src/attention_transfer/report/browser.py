"""The page's image browser: each stored image with the maps and predictions of all networks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .load_run import StoredMaps
from .pictures import (
    SMALLEST_MAP,
    difference_colours,
    finite_map,
    heat_address,
    image_address,
    map_colours,
    map_size,
    pooled_map,
    share_in_box,
)
from .rows import SettingRow

if TYPE_CHECKING:
    import numpy as np

# Characters of all pictures in a page (docs/report.md).
BUDGET = 3_500_000
# The groups of images in their order, the most interesting ones first, with their titles.
GROUPS = {
    "corrected": "Transfer corrected the prediction",
    "spoiled": "Transfer made the prediction wrong",
    "changed": "Transfer changed one wrong prediction to another",
    "disagree": "Student and teacher disagree",
    "wrong": "All predictions are wrong",
    "right": "All predictions are right",
    "other": "Other images",
}


@dataclass(frozen=True)
class _Network:
    """A row of the report with the maps that its first seed stored."""

    row: SettingRow
    maps: StoredMaps


@dataclass(frozen=True)
class BrowserImage:
    """An image in the page: its picture, and its data for the page's script."""

    picture: str
    label: str
    group: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Browser:
    """The images of a page by group, and the data of the networks for the page's script."""

    networks: list[SettingRow]
    groups: list[tuple[str, list[BrowserImage]]]
    first: int  # the network that the page shows first: the best student
    stored: int  # number of images of all runs; the page may show fewer
    aspect: float  # width / height of an image
    is_pixelated: bool  # whether an image is so small that its pixels are shown as squares
    data: dict[str, Any]

    @property
    def shown(self) -> int:
        return sum(len(images) for _, images in self.groups)


def make_browser(rows: list[SettingRow], budget: int = BUDGET) -> Browser | None:
    """The images of all rows that stored maps; None if no row did.

    Images for which transfer changed the prediction come first. Images at the end are left out if
    they exceed the budget.
    """
    networks = []
    for row in rows:
        maps = _stored_maps(row, rows)
        if maps is not None:
            networks.append(_Network(row, maps))
    if not networks:
        return None
    ranked = sorted(_all_images(networks), key=lambda image: _rank(networks, image))
    images: list[BrowserImage] = []
    used = 0
    for image in ranked:
        described = _describe_image(networks, image, number=len(images) + 1)
        used += len(described.picture) + len(json.dumps(described.data))
        if used > budget and images:
            break
        images.append(described)
    groups: dict[str, list[BrowserImage]] = {}
    for shown in images:
        groups.setdefault(GROUPS[shown.group], []).append(shown)
    height, width = networks[0].maps.images.shape[1:3]
    data = {
        "networks": [_describe_network(network, networks, rows) for network in networks],
        "images": [image.data for image in images],
    }
    return Browser(
        [network.row for network in networks],
        [*groups.items()],
        _best_student(networks),
        len(ranked),
        round(width / height, 3),
        max(height, width) <= SMALLEST_MAP,
        data,
    )


def _best_student(networks: list[_Network]) -> int:
    """The student with the lowest error; without any, the last network."""
    errors = {}
    for i, network in enumerate(networks):
        if network.row.role == "student" and network.row.error is not None:
            errors[i] = network.row.error.mean
    return min(errors, key=errors.__getitem__, default=len(networks) - 1)


def _stored_maps(row: SettingRow, rows: list[SettingRow]) -> StoredMaps | None:
    """The maps of a row; a teacher's maps come from its students' runs, if they have any."""
    for student in rows:
        if row.role == "teacher" and student.teacher is row:
            for run in student.runs:
                if run.teacher_maps is not None:
                    return run.teacher_maps
    return next((run.maps for run in row.runs if run.maps is not None), None)


def _all_images(networks: list[_Network]) -> list[tuple[bytes, str]]:
    """The images of all networks, each once, in the order of the files."""
    images: dict[tuple[bytes, str], None] = {}
    for network in networks:
        images |= dict.fromkeys(network.maps.index_of)
    return list(images)


def _rank(networks: list[_Network], image: tuple[bytes, str]) -> tuple[int, int]:
    """The sort key of an image: its group, then the number of students in that group."""
    group, votes = classify(networks, image)
    return [*GROUPS].index(group), -votes


def classify(networks: list[_Network], image: tuple[bytes, str]) -> tuple[str, int]:
    """The group of an image, and the number of students for which it is in that group."""
    votes = dict.fromkeys(GROUPS, 0)
    answers = {n.row: answer for n, answer in _answers(networks, image)}
    label = image[1]
    for row, answer in answers.items():
        alone = answers.get(row.baseline) if row.baseline else None
        if alone is not None and answer != alone and label:
            if answer == label:
                votes["corrected"] += 1
            elif alone == label:
                votes["spoiled"] += 1
            else:
                votes["changed"] += 1
        teacher = answers.get(row.teacher) if row.teacher else None
        if teacher is not None and answer != teacher:
            votes["disagree"] += 1
    for group in ("corrected", "spoiled", "changed", "disagree"):
        if votes[group]:
            return group, votes[group]
    if not label or not answers:
        return "other", 0
    if label in answers.values():
        return "right", 0
    return "wrong", 0


def _answers(networks: list[_Network], image: tuple[bytes, str]) -> Iterator[tuple[_Network, str]]:
    """The networks that have an image, with the class that each predicted."""
    for network in networks:
        k = network.maps.index_of.get(image)
        if k is not None and network.maps.predictions[k]:
            yield network, network.maps.predictions[k]


def _describe_network(
    network: _Network, networks: list[_Network], rows: list[SettingRow]
) -> dict[str, Any]:
    """A network for the script; peers[s][m] is the stage of network m that matches stage s."""
    peers = []
    for stage in range(len(network.maps.stages)):
        peers.append([counterpart(network.maps, stage, other.maps) for other in networks])
    return {
        "label": network.row.label,
        "row": rows.index(network.row),
        "teacher": _index_of_teacher(network, networks),
        "stages": network.maps.stages,
        "sizes": [list(maps.shape[1:]) for maps in network.maps.maps],
        "peers": peers,
    }


def _index_of_teacher(network: _Network, networks: list[_Network]) -> int | None:
    for i, other in enumerate(networks):
        if other.row is network.row.teacher:
            return i
    return None


def counterpart(maps: StoredMaps, stage: int, other: StoredMaps) -> int | None:
    """The stage of another network at the same resolution, within a factor of √2.

    Of several, the one of the same name, or the last one.
    """
    height = maps.maps[stage].shape[1] / maps.images.shape[1]
    same_size = None
    for i, candidate in enumerate(other.maps):
        ratio = candidate.shape[1] / other.images.shape[1] / height
        if abs(math.log2(ratio)) <= 0.5:
            same_size = i
            if other.stages[i] == maps.stages[stage]:
                return i
    return same_size


def _describe_image(
    networks: list[_Network], image: tuple[bytes, str], number: int
) -> BrowserImage:
    reference = next(n.maps for n in networks if image in n.maps.index_of)
    k = reference.index_of[image]
    pixels, box = reference.images[k], reference.boxes[k]
    seen: list[dict[str, Any] | None] = []
    for network in networks:
        index = network.maps.index_of.get(image)
        if index is None:
            seen.append(None)
            continue
        teacher = _index_of_teacher(network, networks)
        of_teacher = None if teacher is None else networks[teacher].maps
        seen.append(_describe_maps(network.maps, index, of_teacher, image, box))
    label = image[1]
    data = {
        "name": f"image {number}",
        "label": label,
        "box": _box_in_percent(box, pixels.shape),
        # The share of a uniform map.
        "chance": share_in_box(pixels[..., 0] * 0 + 1, box, pixels.shape),
        "seen": seen,
    }
    return BrowserImage(image_address(pixels), label, classify(networks, image)[0], data)


def _describe_maps(
    maps: StoredMaps,
    k: int,
    teacher: StoredMaps | None,
    image: tuple[bytes, str],
    box: np.ndarray,
) -> dict[str, Any]:
    """The prediction and the maps of one network for one image."""
    stages = []
    for s, stage_maps in enumerate(maps.maps):
        size = map_size(stage_maps[k])
        stage: dict[str, Any] = {
            "map": heat_address(map_colours(stage_maps[k], *size)),
            "maximum": float(finite_map(stage_maps[k]).max()),
            "inside": share_in_box(stage_maps[k], box, maps.images.shape[1:]),
        }
        if teacher is not None and (t := teacher.index_of.get(image)) is not None:
            peer = counterpart(maps, s, teacher)
            if peer is not None:
                stage |= _describe_difference(stage_maps[k], teacher.maps[peer][t])
        stages.append(stage)
    answer, label = maps.predictions[k], maps.labels[k]
    is_correct = answer == label if answer and label else None
    return {"answer": answer, "correct": is_correct, "stages": stages}


def _describe_difference(student: np.ndarray, teacher: np.ndarray) -> dict[str, Any]:
    """The student's map minus the teacher's, each divided by its norm, at the smaller size."""
    import numpy as np

    size = min(student.shape[0], teacher.shape[0]), min(student.shape[1], teacher.shape[1])
    difference = pooled_map(student, *size) - pooled_map(teacher, *size)
    limit = float(np.abs(difference).max())
    colours = difference_colours(difference, limit, *map_size(difference))
    return {
        "difference": heat_address(colours),
        "limit": limit,
        "distance": float(np.linalg.norm(difference)),
    }


def _box_in_percent(box: np.ndarray, shape: tuple[int, ...]) -> list[float] | None:
    """Left, top, width and height in percent of the image; None if the box is unknown."""
    x0, y0, x1, y1 = (float(side) for side in box)
    if x1 <= x0 or y1 <= y0:
        return None
    height, width = shape[:2]
    sides = (x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height)
    return [round(100 * side, 3) for side in sides]
