"""Untrusted manifests, checkpoints and config files are data: they run no code and open no connection."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config import compose
from pipeline.config.compose import check_overrides, register
from pipeline.config.hydra_guard import FREE, check_files
from pipeline.config.schema import Config, ImagesConfig, ModelConfig, PromptsConfig
from pipeline.config.validate import check
from pipeline.core.errors import ModelError, PromptsError
from pipeline.engine.demo.folder import jpeg
from pipeline.engine.demo.scenes import sample
from pipeline.job.main import run_job
from pipeline.manifest.manifest import open_manifest
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.hub import DEMO_FOLDER
from pipeline.models.label_files import read_labels
from tests.jobs import config_for
from tests.servers import answer, drip, moved, serve
from tests.test_run import run


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A folder that exists once untrusted code has run."""
    return tmp_path / "marker"


# A job over http.


def test_a_job_over_http_writes_what_one_from_files_writes_and_connects_nowhere_else(tmp_path: Path) -> None:
    photos = {f"{i}.jpg": jpeg(sample(11, i), 64, 64) for i in range(12)}
    (tmp_path / "photos").mkdir()
    for name, data in photos.items():
        (tmp_path / "photos" / name).write_bytes(data)
    pages = {f"/{name}": answer(200, data) for name, data in photos.items()}
    with serve({"/latest/meta-data": answer(200, b"secret")}) as inner, serve(pages) as server:
        server.pages |= {
            "/secret": answer(403),
            "/moved": moved("/0.jpg"),
            "/inward": moved(f"{inner.url}/latest/meta-data"),
            "/metadata": moved("http://169.254.169.254/latest/meta-data"),
            "/file": moved("file:///etc/hostname"),
            "/slow": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", b"x"),
            "/text": answer(200, b"no picture"),
        }
        bad = {
            f"{server.url}/nothing.jpg": "not_found",
            f"{server.url}/secret": "permission",
            f"{server.url}/inward": "address_not_allowed",
            f"{server.url}/metadata": "address_not_allowed",
            f"{server.url}/file": "scheme_not_allowed",
            f"{server.url}/slow": "timeout",
            f"{server.url}/text": "not_an_image",
            f"{inner.url}/latest/meta-data": "address_not_allowed",
            "http://169.254.169.254/latest/meta-data": "address_not_allowed",
            f"ftp://{inner.place}/x": "scheme_not_allowed",
            "../secret.jpg": "outside_root",
            "file:///etc/hostname": "outside_root",
        }
        paths = [f"{server.url}/{name}" for name in photos] + [f"{server.url}/moved", *bad]
        write(tmp_path / "web.parquet", paths)
        web = config_for(
            tmp_path / "web.parquet",
            tmp_path / "web",
            manifest={"image": "path", "keep": [], "root": str(tmp_path / "photos")},
            images={"schemes": ["file", "http"], "private_hosts": [server.place]},
            loader={"read_seconds": 0.5, "isolation": "none"},
            errors={"max_fraction": 1.0},
        )
        run_job(web)
        assert inner.connections == 0
    write(tmp_path / "files.parquet", [*photos, "0.jpg"])
    run_job(
        config_for(
            tmp_path / "files.parquet",
            tmp_path / "files",
            manifest={"image": "path", "keep": [], "root": str(tmp_path / "photos")},
            loader={"isolation": "none"},
        )
    )
    rows, wanted = pq.read_table(tmp_path / "web").to_pylist(), pq.read_table(tmp_path / "files").to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 13 + list(bad.values())
    for row, other in zip(rows, wanted, strict=False):
        assert row["embedding"] == pytest.approx(other["embedding"], abs=1e-6)
        assert row["label"] == other["label"]
    assert all(row["error"] for row in rows[13:])


def write(path: Path, paths: list[str]) -> None:
    pq.write_table(pa.table({"id": list(range(len(paths))), "path": paths}), path)


def test_a_manifest_s_pickled_types_stay_bytes(tmp_path: Path, marker: Path) -> None:
    code = pickle.dumps(Evil(marker), protocol=0).decode("latin-1")
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": code}
    schema = pa.schema([pa.field("id", pa.int64()), pa.field("path", pa.string(), metadata=metadata)])
    table = pa.table({"id": [1], "path": ["a.jpg"]}, schema=schema).replace_schema_metadata({"pandas": code})
    pq.write_table(table, tmp_path / "m.parquet")
    config = config_for(tmp_path / "m.parquet", tmp_path / "out", manifest={"image": "path", "keep": []}).manifest
    assert open_manifest(config).image_kind == "path"
    assert not marker.exists()


# A checkpoint.


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A local folder with the demo's files."""
    return Path(shutil.copytree(DEMO_FOLDER, tmp_path / "copy"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_pickle_beside_or_in_place_of_the_weights_is_never_read(copy: Path, marker: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    open_checkpoint(ModelConfig(name=str(copy)))
    (copy / "model.safetensors").rename(copy / "x.safetensors")
    index = {"metadata": {}, "weight_map": {"logit_scale": "pytorch_model.bin", "other": "x.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names pytorch_model.bin; only"):
        open_checkpoint(ModelConfig(name=str(copy)))
    index["weight_map"] = {"logit_scale": "../copy/x.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names \.\./copy/x.safetensors; only"):
        open_checkpoint(ModelConfig(name=str(copy)))
    (copy / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="not an index of weights"):
        open_checkpoint(ModelConfig(name=str(copy)))
    (copy / "x.safetensors").unlink()
    torch.save({"logit_scale": Evil(marker)}, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*.safetensors in .*; other formats can run code"):
        open_checkpoint(ModelConfig(name=str(copy)))
    assert not marker.exists()


def test_a_checkpoint_s_own_modules_are_never_imported(
    copy: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *arguments: pytest.fail("a prompt asks whether to run the code"))
    (copy / "code.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Own: pass\n")
    change(copy / "config.json", auto_map={"AutoConfig": "code.Own", "AutoModel": "code.Own"})
    change(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Own", "code.Own"]})
    change(copy / "preprocessor_config.json", auto_map={"AutoImageProcessor": "code.Own"})
    open_checkpoint(ModelConfig(name=str(copy)))
    open_checkpoint(ModelConfig(name=str(copy), weights="random"))
    assert not marker.exists()


@pytest.mark.parametrize("part", [None, "vision_config"])
def test_a_kernel_from_the_hub_is_refused(copy: Path, part: str | None) -> None:
    wish = {"attn_implementation": "somebody/kernel"}
    change(copy / "config.json", **({part: wish} if part else wish))
    with pytest.raises(ModelError, match="attn_implementation='somebody/kernel' names code on the hub"):
        open_checkpoint(ModelConfig(name=str(copy)))


# Config files.


def options(**given: Any) -> Namespace:
    names = ("config_path", "config_name", "config_dir", "experimental_rerun")
    return Namespace(**{"overrides": [], "multirun": False, **dict.fromkeys(names), **given})


HEAD = "defaults: [config, _self_]\n"
FILES = {
    "callback": HEAD + "hydra: {callbacks: {x: {_target_: os.mkdir, path: MARKER}}}",
    "launcher": HEAD + "hydra: {launcher: {_target_: os.mkdir}}",
    "sweeper": HEAD + "hydra: {sweeper: {_target_: os.mkdir}}",
    "launcher option": "defaults: [config, override hydra/launcher: evil, _self_]",
    "callback in a group": "defaults: [config, override model: evil, _self_]",
    "handler": HEAD + "hydra: {job_logging: {handlers: {x: {(): os.mkdir, path: MARKER}}}}",
    "class": HEAD + "hydra: {hydra_logging: {handlers: {x: {class: os.mkdir, path: MARKER}}}}",
    "file of the log": HEAD + "hydra: {job_logging: {handlers: {x: {class: logging.FileHandler, filename: MARKER}}}}",
    "logging option": "defaults: [config, override hydra/job_logging: evil, _self_]",
    "name of the log": HEAD + "hydra: {job: {name: ../x}}",
    "environment": HEAD + "hydra: {job: {env_set: {LD_PRELOAD: MARKER}}}",
    "mode": HEAD + "hydra: {mode: MULTIRUN, sweeper: {params: {model: evil}}}",
    "search path": HEAD + "hydra: {searchpath: ['pkg://evil_package']}",
    "constructor": HEAD + "output: {dir: !!python/object/apply:os.mkdir [MARKER]}",
    "new": HEAD + "output: {dir: !!python/object/new:os.mkdir [MARKER]}",
    "name": HEAD + "output: {dir: !!python/name:os.mkdir ''}",
    "no defaults": "hydra: {callbacks: {x: {_target_: os.mkdir, path: MARKER}}}",
    "no mapping": "[1, 2]",
    "no yaml": "a: [",
    "target in a group": HEAD + "model: {_target_: os.mkdir, path: MARKER}",
}


@pytest.fixture
def mine(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An untrusted folder of config files."""
    folder = tmp_path / "mine"
    for name in ("model", "hydra/launcher", "hydra/job_logging", "package/evil_package"):
        (folder / name).mkdir(parents=True)
    for name, text in FILES.items():
        (folder / f"{name}.yaml").write_text(text.replace("MARKER", str(marker)))
    callback = f"callbacks: {{x: {{_target_: os.mkdir, path: {marker}}}}}"
    (folder / "model" / "evil.yaml").write_text(f"# @package _global_\nmodel: {{name: demo}}\nhydra:\n  {callback}\n")
    (folder / "hydra" / "launcher" / "evil.yaml").write_text(f"_target_: os.mkdir\npath: {marker}\n")
    (folder / "hydra" / "job_logging" / "evil.yaml").write_text(f"(): os.mkdir\npath: {marker}\n")
    (folder / "package" / "evil_package" / "__init__.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    monkeypatch.syspath_prepend(str(folder / "package"))
    register()
    return folder


@pytest.mark.parametrize("name", FILES)
def test_a_config_file_that_names_code_is_a_problem_and_runs_none(mine: Path, marker: Path, name: str) -> None:
    assert check_files(options(config_dir=str(mine), config_name=name))
    assert not marker.exists()


def test_a_folder_in_place_of_the_package_s_own_is_no_way_around(mine: Path, marker: Path) -> None:
    for name in ("no defaults", "search path", "constructor"):
        assert check_files(options(config_path=str(mine), config_name=name)), name
    assert not marker.exists()


@pytest.mark.slow
def test_config_files_that_set_values_and_folders_are_fine(mine: Path) -> None:
    texts = {
        "values": HEAD + "manifest: {demo_scenes: 3}",
        "folders": HEAD + "hydra: {run: {dir: x}, sweep: {dir: x, subdir: y}, output_subdir: z, verbose: true}",
        "logging": "defaults: [config, override hydra/job_logging: stdout, _self_]",
        "own defaults": "defaults: [schema, {model: demo}, _self_]\nhydra: {run: {dir: .}}",
    }
    for name, text in texts.items():
        (mine / f"{name}.yaml").write_text(text)
        assert check_files(options(config_dir=str(mine), config_name=name)) == [], name
    assert check_files(options()) == []
    assert check_files(options(config_dir=str(mine))) == []
    assert check_files(options(config_name="config", overrides=["model=demo", "hydra.verbose=true"])) == []


@pytest.mark.parametrize(
    "given",
    [
        {"experimental_rerun": "config.pickle"},
        {"config_name": "config", "multirun": True},
        {"config_name": "nothing"},
        {"config_path": "pkg://evil_package"},
        {"config_path": "conf"},
        {"config_dir": "/no/such/folder"},
        {"config_dir": "pkg://evil_package"},
    ],
)
def test_options_that_could_run_code_or_lead_nowhere_are_problems(mine: Path, marker: Path, given: Any) -> None:
    assert len(check_files(options(**given))) == 1
    assert not marker.exists()


@pytest.mark.parametrize(
    "argument",
    [
        "hydra.callbacks.x._target_=os.mkdir",
        "+hydra.callbacks.x={_target_:os.mkdir,path:MARKER}",
        "hydra.launcher._target_=os.mkdir",
        "hydra.sweeper._target_=os.mkdir",
        "hydra/launcher=joblib",
        "hydra/sweeper=evil",
        "+hydra/callbacks=evil",
        "hydra/job_logging=../../evil",
        "hydra/job_logging@hydra.launcher=none",
        "++hydra.job_logging.handlers.x={'()':os.mkdir}",
        "hydra.searchpath=[pkg://evil_package]",
        "hydra.job.env_set={LD_PRELOAD:x}",
        "hydra.mode=MULTIRUN",
        "hydra={callbacks:{x:{_target_:os.mkdir}}}",
        "~hydra.launcher",
        "hydra.run.dir=a,b",
        "model._target_=os.mkdir",
        "+model={_target_:os.mkdir}",
        "+_target_=os.mkdir",
        "model=../../mine/model/evil",
        "output.dir={_target_:os.mkdir}",
        "parity.top1={_target_:0.5}",
    ],
)
@pytest.mark.parametrize("sweep", [False, True])
def test_an_override_that_names_code_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, argument: str, *, sweep: bool
) -> None:
    # Its own problem, not one of the config that the rest composes.
    monkeypatch.setattr(compose, "read_config", lambda composed: (Config(), []))
    assert check_overrides([argument], sweep=sweep)


def test_a_sweep_does_not_lead_out_of_its_group() -> None:
    assert check_overrides(["model=demo,../../mine/model/evil"], sweep=True)
    assert check_overrides(["model=choice(demo,/tmp/evil)"], sweep=True)
    assert check_overrides(["+evil=../../x,demo"], sweep=True)
    assert check_overrides(["model=glob(*)"], sweep=True) == []


@pytest.mark.parametrize("key", FREE)
def test_folders_and_verbosity_of_hydra_are_free(key: str) -> None:
    assert check_overrides([f"{key}=true"]) == []


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("--config-dir", "mine", "--config-name", "callback"), marks=pytest.mark.slow),
        ("--config-dir", "mine", "--config-name", "handler", "--cfg", "hydra"),
        ("-sc", "--config-dir", "mine", "--config-name", "search path", "install=bash"),
        ("-sc", "install=bash", "--experimental-rerun", "config.pickle"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_command_itself_runs_no_untrusted_code(mine: Path, marker: Path, arguments: tuple[str, ...]) -> None:
    (mine.parent / "config.pickle").write_bytes(pickle.dumps(Evil(marker)))
    done = run(mine.parent, *arguments)
    assert done.returncode == 2
    assert "error: the config has" in done.stderr
    assert "can run code" in done.stderr
    assert not marker.exists()


def test_a_file_without_the_schema_is_held_to_it_all_the_same(mine: Path, marker: Path) -> None:
    (mine / "bare.yaml").write_text(
        f"model: {{name: demo, _target_: os.mkdir, path: {marker}}}\nhydra: {{run: {{dir: .}}}}"
    )
    done = run(mine.parent, "--config-dir", "mine", "--config-name", "bare")
    assert done.returncode == 2
    assert "_target_" in done.stderr
    assert not marker.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [MARKER]", "!!python/object/new:os.mkdir [MARKER]"])
def test_labels_are_yaml_without_constructors(tmp_path: Path, marker: Path, tag: str) -> None:
    (tmp_path / "labels.yaml").write_text(f"- {tag.replace('MARKER', str(marker))}\n")
    with pytest.raises(PromptsError, match="not YAML"):
        read_labels(PromptsConfig(path=str(tmp_path / "labels.yaml")))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("schemes", ["file", "http", "https", "s3"], ["HTTP", "http://", "", "zip", "simplecache"]),
        (
            "private_hosts",
            ["images", "10.0.0.5", "images.internal:8080", "[::1]:80", "[fd00::5]"],
            ["http://images", "images/x", "*", "a:0", "a:99999", "10.0.0.0/8", "", "::1"],
        ),
    ],
)
def test_lists_of_schemes_and_hosts_hold_names_only(key: str, good: list[str], bad: list[str]) -> None:
    for values, wanted in ((good, []), (bad, bad)):
        problems = check(replace(Config(), images=replace(ImagesConfig(), **{key: values})))
        assert [problem.value for problem in problems] == wanted
