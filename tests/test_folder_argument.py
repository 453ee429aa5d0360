"""``python -m pipeline.run FOLDER``: a folder, or an address, in the place of ``manifest.path``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pipeline.config.compose import compose_config, groups
from pipeline.config.options import read_options, take_folder
from pipeline.config.schema import Config, conf_dir
from pipeline.config.validate import known_keys
from pipeline.core.errors import Problem
from tests.forks import forks
from tests.jobs import scene

NAMES = [
    "photos", "my photos", "ü é", "a=b", "it's", 'say "hi"', "back\\slash", "end\\", 'x\\"y', "${oc.env:HOME}", "$HOME",
    "a,b", "[a]", "{a: 1}", "(x)", "a:b", "null", "true", "1e3", "@x", "*", "?", "#x", "~x", " leading",
]  # fmt: skip


def taken(*arguments: str) -> tuple[list[str], list[Problem]]:
    """The command line that Hydra reads, and the problems."""
    sys.argv = ["run", *arguments]
    options, problems = read_options([*groups(conf_dir()), *known_keys()])
    problems += take_folder(options)
    if not problems and not options.config_dir:
        assert sorted(options.overrides) == sorted(text for text in sys.argv[1:] if not text.startswith("-"))
    return sys.argv[1:], problems


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["run"])
    monkeypatch.chdir(tmp_path)


def config_of(*arguments: str) -> Config:
    found, problems = taken(*arguments)
    assert problems == []
    return compose_config(found)


@pytest.mark.parametrize(
    "how", ["{}", *(pytest.param(how, marks=pytest.mark.slow) for how in ("./{}", "{}/", "{folder}/{}"))]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_is_the_manifest(tmp_path: Path, name: str, how: str) -> None:
    (tmp_path / name).mkdir()
    argument = how.format(name, folder=tmp_path)
    if "=" in argument.partition("/")[0]:
        argument = f"./{argument}"
    config = config_of("model=demo", argument, "report.html=false")
    assert config.manifest.path == argument
    assert not config.report.html
    assert config.output.dir.startswith("outputs/")
    assert os.path.dirname(config.output.dir) == "outputs"


def test_the_output_is_named_after_the_folder_unless_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "My Photos").mkdir()
    assert config_of("My Photos").output.dir == "outputs/My_Photos"
    assert config_of(".").output.dir == f"outputs/{tmp_path.name}"
    assert config_of("My Photos", "output.dir=mine").output.dir == "mine"
    assert config_of("output.dir=mine", "My Photos/").output.dir == "mine"


@pytest.mark.parametrize(
    ("address", "output"),
    [
        ("s3://bucket/a/photos", "outputs/photos"),
        ("s3://bucket/photos/", "outputs/photos"),
        ("memory:///x", "outputs/x"),
        ("file:/a/my%20photos", "outputs/my_20photos"),
    ],
)
def test_an_address_is_the_manifest(address: str, output: str) -> None:
    config = config_of(address)
    assert (config.manifest.path, config.output.dir) == (address, output)


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "Pictures").mkdir()
    assert config_of("~/Pictures").manifest.path == str(tmp_path / "Pictures")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("photos", "more"), "names the images, and so does more"),
        (("photos", "manifest.path=x.parquet"), "names the images, and so does manifest.path=x.parquet"),
    ],
)
def test_two_manifests_are_one_problem(tmp_path: Path, arguments: tuple[str, ...], part: str) -> None:
    for name in ("photos", "more"):
        (tmp_path / name).mkdir()
    (problem,) = taken(*arguments)[1]
    assert part in str(problem)


def test_the_value_of_an_option_is_no_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "conf2").mkdir()
    assert taken("--config-dir", "conf2", "model=demo") == (["--config-dir", "conf2", "model=demo"], [])


@pytest.mark.parametrize("argument", ["model=demo", "photos", "manifest.path=photos", "hydra/job_logging=none"])
def test_what_is_no_folder_stays(argument: str) -> None:
    assert taken(argument) == ([argument], [])


@pytest.mark.slow
def test_the_command_embeds_a_folder(tmp_path: Path) -> None:
    (tmp_path / "my photos").mkdir()
    for number in range(3):
        (tmp_path / "my photos" / f"{number}.jpg").write_bytes(scene(number)[0])
    command = "python -m pipeline.run 'my photos' report.html=false report.progress=none"
    child = forks().start("tests.mistakes:typed", str(tmp_path), [command], [])
    assert child.wait() == 0, child.said()
    assert "my photos: 3 images, listed in outputs/my_photos.manifest.parquet" in child.said()
    assert (tmp_path / "outputs" / "my_photos" / "_SUCCESS").exists()
