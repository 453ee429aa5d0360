"""The YAML files agree with the schemas, and all problems of a config are reported at once."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from pipeline.config.choices import BACKENDS
from pipeline.config.compose import compose_config, groups, read_config, register, to_config
from pipeline.config.ranges import AUTO, DEFAULT
from pipeline.config.schema import (
    FORMATS,
    OUTPUT_COLUMNS,
    Config,
    LoaderConfig,
    ManifestConfig,
    conf_dir,
    nearest,
    value_of,
)
from pipeline.config.validate import AUTOMATIC, CHOICES, RANGES, check, known_keys
from pipeline.core.errors import ConfigError, Problem

OPTIONS = [(group, option) for group, options in groups(conf_dir()).items() for option in options]
# Keys without a default in an option, and a value for each.
OPEN = {
    ("model", "hub"): ["model.name=openai/clip-vit-base-patch32"],
    ("cluster", "address"): ["cluster.address=tcp://10.0.0.5:8786"],
    ("cluster", "slurm"): ["cluster.host=10.0.0.5"],
    ("cluster", "kubernetes"): ["cluster.kubernetes_image=me/clip"],
}


def composed(*overrides: str) -> DictConfig:
    register()
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def config_of(*overrides: str) -> Config:
    return to_config(composed(*overrides))


def changed(key: str, value: Any) -> Config:
    """A config with a manifest, and one value of any type that is not the default."""
    group, name = key.split(".")
    config = Config(manifest=ManifestConfig(path="m.parquet"))
    if key == "cluster.max_workers":
        # Other kinds have a number that is fixed.
        config = config.changed({"cluster.name": "slurm", "cluster.host": "10.0.0.1"})
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})


@functools.cache
def documented(group: str, option: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((conf_dir() / group / f"{option}.yaml").read_text())
    # The word stands for the number in the schema.
    if (group, content.get("batch_size")) == ("loader", DEFAULT):
        content["batch_size"] = LoaderConfig.batch_size
    return {key: 0 if value == AUTO and f"{group}.{key}" in AUTOMATIC else value for key, value in content.items()}


def test_every_group_of_the_schema_has_its_folder() -> None:
    assert sorted(groups(conf_dir())) == sorted(field.name for field in dataclasses.fields(Config))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_yaml_composes_with_the_rest(group: str, option: str) -> None:
    given = OPEN.get((group, option), [])
    # Hydra composes every option alike: test_api.py.
    config = compose_config([f"{group}={option}", *given])
    for key, value in documented(group, option).items():
        if value != "???" and not any(text.startswith(f"{group}.{key}=") for text in given):
            assert value_of(config, f"{group}.{key}") == value


def test_every_yaml_begins_with_a_comment() -> None:
    texts = {(group, option): (conf_dir() / group / f"{option}.yaml").read_text() for group, option in OPTIONS}
    assert [place for place, text in texts.items() if not text.startswith(("# ", "name: ???"))] == []


def test_the_defaults_of_the_yaml_files_are_those_of_the_dataclasses() -> None:
    assert config_of() == Config()
    assert check(Config()) == []


def test_every_key_stands_in_one_yaml_of_its_group() -> None:
    wrong, options_of = {}, groups(conf_dir())
    for key in known_keys():
        group, name = key.split(".")
        holders = [option for option in options_of[group] if name in documented(group, option)]
        if key == "images.formats":
            # The list is long, and stands in the schema with its reason.
            good = holders == []
        elif key in ("model.name", "backend.name", "images.decoder", "cluster.name"):
            good = holders == options_of[group]
        else:
            good = len(holders) == 1 and documented(group, holders[0])[name] == value_of(Config(), key)
        if not good:
            wrong[key] = {option: documented(group, option)[name] for option in holders}
    assert wrong == {}


def test_no_yaml_holds_a_key_that_the_schema_does_not_know() -> None:
    named = {f"{group}.{name}" for group, option in OPTIONS for name in documented(group, option)}
    assert named - set(known_keys()) == set()


def test_choices_and_ranges_are_of_keys_that_exist() -> None:
    assert {*CHOICES, *RANGES} <= set(known_keys())


def test_hub_needs_a_name_which_is_reported_with_all_other_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        config_of("model=hub", "loader.batch_size=0")
    assert caught.value.exit_code == 2
    assert caught.value.problems == (
        Problem("model.name", "???", "has no default; give a value", "such as model.name=openai/clip-vit-base-patch32"),
        Problem("loader.batch_size", 0, "must be a whole number from 1 to 65536, or auto"),
    )


def test_hub_with_a_name_takes_that_checkpoint() -> None:
    model = config_of("model=hub", "model.name=me/mine", "model.revision=v2").model
    assert (model.name, model.revision, model.weights) == ("me/mine", "v2", "pretrained")
    assert config_of("model=hub", "model.name=hf-hub:me/mine").model.name == "hf-hub:me/mine"


def test_a_value_that_points_nowhere_is_a_problem_and_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    config, problems = read_config(composed("output.dir=${oc.env:NO_SUCH_VARIABLE}", "manifest.keep=['${no.key}']"))
    assert {problem.key for problem in problems} == {"output.dir", "manifest.keep"}
    assert "NO_SUCH_VARIABLE" in "\n".join(map(str, problems))
    assert config == Config()


def test_a_value_may_point_at_another_or_at_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_FOLDER", "/jobs/7")
    config = config_of(
        "output.dir=${oc.env:JOB_FOLDER}", "manifest.path=${output.dir}/m", "prompts.labels=['${manifest.id}']"
    )
    assert (config.output.dir, config.manifest.path, config.prompts.labels) == ("/jobs/7", "/jobs/7/m", ["id"])


def test_the_config_is_frozen() -> None:
    config = config_of()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.loader.batch_size = 1  # type: ignore[misc]


@pytest.mark.parametrize("key", CHOICES)
def test_every_allowed_word_passes_and_a_typo_gets_the_nearest(key: str) -> None:
    for word in CHOICES[key]:
        config = changed(key, word)
        if key == "backend.precision":
            # Each backend has its own.
            able = next(name for name, info in BACKENDS.items() if word in (*info.precisions, "auto"))
            config = dataclasses.replace(config, backend=dataclasses.replace(config.backend, name=able))
        if key == "backend.quantization":
            config = dataclasses.replace(config, backend=dataclasses.replace(config.backend, name="onnx_int8"))
        assert not [problem for problem in check(config) if problem.key == key]
    word = CHOICES[key][0]
    (problem,) = check(changed(key, f"{word}x"))
    assert problem == Problem(key, f"{word}x", f"must be one of {', '.join(CHOICES[key])}", f"did you mean {word}?")


@pytest.mark.parametrize("key", RANGES)
def test_numbers_outside_their_range_are_refused(key: str) -> None:
    lowest, highest = RANGES[key]
    assert check(changed(key, lowest)) == []
    outside = [lowest - 1, float("nan"), *([highest + 1] if highest is not None else [])]
    for value in outside:
        (problem,) = check(changed(key, value))
        assert (problem.key, problem.value) == (key, value)
        words = f"must be from {lowest} to" if highest is not None else "must be at least"
        assert problem.allowed.startswith("must be a whole number from 1 to" if key in AUTOMATIC else words)
    if highest is not None:
        assert check(changed(key, highest)) == []


@pytest.mark.parametrize(
    ("backend", "precision", "hint"),
    [
        ("torch", "int8", "int8: backend=torch_int8 or onnx_int8"),
        ("onnx", "bf16", "bf16: backend=torch or torchscript"),
        ("tensorrt", "fp32", "fp32: backend=torch or torchscript or onnx"),
    ],
)
def test_a_precision_of_another_backend_is_refused_with_the_backends_that_have_it(
    backend: str, precision: str, hint: str
) -> None:
    (problem,) = check(config_with_backend(name=backend, precision=precision))
    assert problem.key == "backend.precision"
    assert problem.allowed == f"backend={backend} computes in {', '.join(BACKENDS[backend].precisions)}"
    assert problem.hint == hint


def config_with_backend(**values: str) -> Config:
    return dataclasses.replace(Config(), backend=dataclasses.replace(Config().backend, **values))


@pytest.mark.parametrize(
    ("key", "value", "able", "other"),
    [("compile", "default", "torch", "onnx"), ("quantization", "static", "onnx_int8", "torch_int8")],
)
def test_some_settings_are_for_one_backend_alone(key: str, value: str, able: str, other: str) -> None:
    assert check(config_with_backend(name=able, **{key: value})) == []
    (problem,) = check(config_with_backend(name=other, **{key: value}))
    assert problem.key == f"backend.{key}"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"int9": 0.5}, "parity.top1.int9 = 0.5: must be one of fp32, fp16, bf16, int8, fp8"),
        ({"int8": 1.5}, "parity.top1.int8 = 1.5: must be from 0 to 1"),
        ({"int8": float("nan")}, "parity.top1.int8 = nan: must be from 0 to 1"),
    ],
)
def test_limits_of_parity_have_a_precision_and_a_range(values: dict[str, float], text: str) -> None:
    config = changed("parity.top1", {**Config().parity.top1, **values})
    assert [str(problem) for problem in check(config)] == [text]
    (missing,) = check(changed("parity.top1", {k: v for k, v in Config().parity.top1.items() if k != "bf16"}))
    assert missing.key == "parity.top1.bf16"


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_devices_that_exist_somewhere_pass(device: str) -> None:
    assert check(changed("backend.device", device)) == []


@pytest.mark.parametrize(
    "device", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "auto:1", "cuda:0:1", "Cuda"], ids=repr
)
def test_devices_that_exist_nowhere_are_refused(device: str) -> None:
    (problem,) = check(changed("backend.device", device))
    assert (problem.key, problem.value) == ("backend.device", device)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("images.formats", ["JPEG", "JPG"], "'JPG': must be among AVIF"),
        ("images.formats", ["png"], "did you mean PNG?"),
        ("images.formats", [], "must name at least one of AVIF"),
        ("manifest.id", "", "must name a column"),
        ("manifest.image", "", "must name a column"),
        ("manifest.id", "label", "is the name of an output column"),
        ("manifest.keep", ["id"], "is already a column of manifest.id"),
        ("manifest.keep", ["a", "a"], "is already a column of manifest.keep"),
        ("manifest.path", "", "must name a file, a folder or a glob"),
        ("model.name", "", "must name a checkpoint"),
        ("output.dir", "", "must name a folder"),
        ("prompts.labels", ["cat", " "], "a label cannot be empty"),
        ("prompts.labels", ["cat", "dog", "cat"], "'cat': is given twice"),
        ("prompts.templates", [], "must hold at least one template"),
        ("prompts.templates", ["a photo"], "must hold {} exactly once"),
        ("prompts.templates", ["{} and {}"], "must hold {} exactly once"),
        ("labels.threshold", -0.1, "must be from 0 to 1, or null"),
        ("labels.threshold", float("nan"), "must be from 0 to 1, or null"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(key: str, value: Any, part: str) -> None:
    (problem,) = check(changed(key, value))
    assert problem.key == key
    assert part in str(problem)


@pytest.mark.parametrize("values", [{"keep": ["brand"]}, {"root": "/photos"}])
def test_what_belongs_to_a_manifest_needs_one(values: dict[str, Any]) -> None:
    (problem,) = check(Config(manifest=ManifestConfig(**values)))
    assert problem.key == "manifest.path"


@pytest.mark.parametrize("name", OUTPUT_COLUMNS)
def test_kept_columns_cannot_take_the_names_of_the_output(name: str) -> None:
    (problem,) = check(changed("manifest.keep", [name]))
    assert str(problem) == f"manifest.keep = {name!r}: is already a column of the output; leave it out"


def test_labels_come_from_the_config_or_from_a_file_but_not_from_both() -> None:
    config = dataclasses.replace(Config(), prompts=dataclasses.replace(Config().prompts, labels=["cat"], path="l.csv"))
    assert [problem.key for problem in check(config)] == ["prompts.path"]


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(
            "manifest.path=m",
            "loader.batch_size=0",
            "backend.precision=bf61",
            "labels.threshold=2",
            "manifest.keep=[label]",
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "the config has 4 problems:"
    assert sorted(line.split(" = ")[0] for line in lines[1:]) == [
        "  - backend.precision", "  - labels.threshold", "  - loader.batch_size", "  - manifest.keep",
    ]  # fmt: skip


def test_a_single_problem_is_counted_as_one() -> None:
    error = ConfigError([Problem("loader.batch_size", 0, "must be from 1 to 65536")])
    assert str(error) == "the config has a problem:\n  - loader.batch_size = 0: must be from 1 to 65536"


@pytest.mark.parametrize(("word", "hint"), [("batch_sise", "did you mean batch_size?"), ("zzz", "")])
def test_a_hint_is_given_only_if_something_is_near(word: str, hint: str) -> None:
    assert nearest(word, ["batch_size", "workers"]) == hint


def test_the_folder_of_yaml_files_belongs_to_the_package() -> None:
    assert conf_dir() == Path(__file__).resolve().parent.parent / "conf"
    assert len(set(FORMATS)) == len(FORMATS)
