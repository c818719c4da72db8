"""`bench data`: its table, and the JPEGs that it reads."""

from dataclasses import replace

import pytest
from PIL import Image
from rich.console import Console

import attention_transfer as at
from attention_transfer.bench import data


def test_the_table(tmp_path, monkeypatch, small, read_rows):
    monkeypatch.setattr(data, "available_cores", lambda: 1)
    monkeypatch.setattr(data, "PHOTOGRAPHS", 3)
    data.run(replace(small, steps=2), Console(quiet=True), tmp_path / "d.json")
    rows, result = read_rows(tmp_path / "d.json", "data")
    assert list(rows) == ["authors", "resident", "loader authors 224", "loader torchvision 224"]
    assert rows["loader authors 224"]["times_authors"] == 1
    assert result["notes"] == ["3 JPEGs, 1 cores"]


def test_without_a_folder_the_photographs_are_cropped():
    with data.jpeg_files(None) as files:
        assert len(files) == data.PHOTOGRAPHS and Image.open(files[0]).size == (500, 375)
    assert not files[0].exists()


@pytest.mark.parametrize("folder", ["", "none"])
def test_a_folder_without_jpegs_is_an_error(tmp_path, folder):
    expected = pytest.raises(at.UserError, match="expected a folder with JPEGs")
    with expected, data.jpeg_files(str(tmp_path / folder)):
        pass
