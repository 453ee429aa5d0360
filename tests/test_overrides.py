"""Problems of the command line are reported all at once, with what is allowed and the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from pipeline.config.compose import check_overrides, compose_config, groups, register, to_config
from pipeline.config.schema import Config, conf_dir, value_of
from pipeline.config.validate import known_keys
from pipeline.core.errors import ConfigError, Problem

MODELS = ", ".join(groups(conf_dir())["model"])


def problems_of(*arguments: str, sweep: bool = False) -> list[Problem]:
    return check_overrides(list(arguments), sweep=sweep)


def config_of(*arguments: str) -> Config:
    assert problems_of(*arguments) == []
    register()
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return to_config(compose("config", overrides=list(arguments)))


def test_a_typo_in_any_key_gets_that_key_as_a_hint() -> None:
    wanted = [Problem(f"{key}z", "1", "there is no such key", f"did you mean {key}?") for key in known_keys()]
    assert problems_of(*(f"{key}z=1" for key in known_keys())) == wanted


def test_a_typo_in_any_group_gets_that_group_as_a_hint() -> None:
    names = list(groups(conf_dir()))
    allowed = f"there is no such group; groups: {', '.join(names)}"
    wanted = [Problem(f"{name}z", "default", allowed, f"did you mean {name}?") for name in names]
    assert problems_of(*(f"{name}z=default" for name in names)) == wanted


def test_a_typo_in_any_option_gets_that_option_as_a_hint() -> None:
    pairs = [(name, options, option) for name, options in groups(conf_dir()).items() for option in options]
    wanted = [
        Problem(name, f"{option}z", f"must be one of {', '.join(options)}", f"did you mean {option}?")
        for name, options, option in pairs
    ]
    assert problems_of(*(f"{name}={option}z" for name, _, option in pairs)) == wanted


WRONG = [
    ("loader.batch_size=abc", "loader.batch_size = 'abc': must be a whole number"),
    ("loader.batch_size=1.5", "loader.batch_size = 1.5: must be a whole number"),
    ("loader.batch_size=null", "loader.batch_size = None: must be a whole number"),
    ("loader.batch_size=[1,2]", "loader.batch_size = [1, 2]: must be a whole number"),
    ("errors.max_fraction=few", "errors.max_fraction = 'few': must be a number"),
    ("labels.threshold=high", "labels.threshold = 'high': must be a number, or null"),
    ("report.html=maybe", "report.html = 'maybe': must be true or false"),
    ("output.dir=[a]", "output.dir = ['a']: must be text"),
    ("manifest.path={a:1}", "manifest.path = {'a': 1}: must be text, or null"),
    (
        "prompts.labels=cat",
        "prompts.labels = 'cat': must be a list of texts, such as [a,b] (write prompts.labels=[cat])",
    ),
    ("manifest.keep=null", "manifest.keep = None: must be a list of texts, such as [a,b]"),
    (
        "prompts.labels=cat,dog",
        "prompts.labels = 'cat,dog': must be one value (a list: prompts.labels=[cat,dog]; one text with commas: "
        "'prompts.labels=\"cat,dog\"')",
    ),
    ("manifest.keep=[a,b", "manifest.keep = '[a,b': its brackets do not close; "),
    ("loader.batch_size", "the argument = 'loader.batch_size': has no key or no =; write GROUP=OPTION"),
    ("~loader.batch_size", "loader.batch_size = '~loader.batch_size': a key cannot be removed"),
    ("~model", "model = '~model': a key cannot be removed"),
    ("+loader.batch_size=8", "loader.batch_size = '+loader.batch_size=8': is in the config already (leave out the +)"),
    ("+loader.extra=8", "loader.extra = '8': there is no such key"),
    ("loader={batch_size:8}", "loader = '{batch_size:8}': must be one of default"),
    (
        "model=openai/whatever",
        f"model = 'openai/whatever': must be one of {MODELS} (for any other checkpoint: model=hub "
        "model.name=openai/whatever)",
    ),
    ("model=clip_vit_b23", f"model = 'clip_vit_b23': must be one of {MODELS} (did you mean clip_vit_b32?)"),
    ("parity.top1.int9=0.5", "parity.top1.int9 = '0.5': there is no such key (did you mean parity.top1.int8?)"),
    ("parity.top1={int9:0.5}", "parity.top1.int9 = '0.5': there is no such key (did you mean parity.top1.int8?)"),
    ("parity.top1.int8=much", "parity.top1.int8 = 'much': must be a number"),
    ("parity.top1=1", "parity.top1 = 1: must be numbers by name, such as {int8:0.99}"),
    ("a.b.c=1", "a.b.c = '1': there is no such key (python -m pipeline.run --cfg job prints all keys)"),
]


@pytest.fixture(scope="module")
def explained() -> dict[str, str]:
    arguments = [argument for argument, _ in WRONG]
    return dict(zip(arguments, map(str, problems_of(*arguments)), strict=True))


@pytest.mark.parametrize(("argument", "text"), WRONG)
def test_a_wrong_override_is_explained(explained: dict[str, str], argument: str, text: str) -> None:
    assert explained[argument].startswith(text)


def test_all_problems_come_at_once_those_of_good_overrides_included() -> None:
    found = problems_of(
        "modle=demo", "loader.batch_sise=8", "loader.workers=abc", "loader.prefetch=0", "backend.precision=bf61", "x=[",
        "model=hub",
    )  # fmt: skip
    assert {problem.key for problem in found} == {
        "modle", "loader.batch_sise", "loader.workers", "loader.prefetch", "backend.precision", "x", "model.name",
    }  # fmt: skip
    assert len(found) == 7


GOOD = [
    ("manifest.keep=[a,b]", ["a", "b"]),
    ("manifest.keep=[]", []),
    ("manifest.keep=['a.b','c d']", ["a.b", "c d"]),
    ("prompts.labels=[cat,dog]", ["cat", "dog"]),
    ("prompts.labels=[ cat , dog ]", ["cat", "dog"]),
    ("prompts.labels=[grey cat,hot dog]", ["grey cat", "hot dog"]),
    ("prompts.labels=['salt, pepper',\"it's\"]", ["salt, pepper", "it's"]),
    ("prompts.labels=['say \"hi\"','it\\'s']", ['say "hi"', "it's"]),
    ("prompts.labels=[1,2.5,007]", ["1", "2.5", "007"]),
    ("prompts.labels=['größe','猫','🐈']", ["größe", "猫", "🐈"]),
    ("prompts.templates=['a photo of a {}, a type of pet']", ["a photo of a {}, a type of pet"]),
    ("output.dir=s3://bucket/a-b_c/run", "s3://bucket/a-b_c/run"),
    ('output.dir="/data/run=1"', "/data/run=1"),
    ("output.dir='/photos of 2024/[x]'", "/photos of 2024/[x]"),
    ("manifest.path=/photos/part-*.parquet", "/photos/part-*.parquet"),
    ("manifest.path=null", None),
    ("manifest.path=2024", "2024"),
    ("labels.threshold=0", 0.0),
    ("labels.threshold=null", None),
    ("report.html=false", False),
    ("++loader.batch_size=8", 8),
]


def key_of(argument: str) -> str:
    return argument.lstrip("+").split("=", 1)[0]


@pytest.fixture(scope="module")
def values() -> dict[str, object]:
    """The value that each good override gives; a composition, which takes a while, has one override of each key."""
    found, left = {}, [argument for argument, _ in GOOD]
    while left:
        taken = {key_of(argument): argument for argument in left}
        config = config_of(*{"manifest.path": "manifest.path=m.parquet", **taken}.values())
        found |= {argument: value_of(config, key) for key, argument in taken.items()}
        left = [argument for argument in left if argument not in found]
    return found


@pytest.mark.parametrize(("argument", "value"), GOOD)
def test_a_good_override_arrives_as_it_was_meant(values: dict[str, object], argument: str, value: object) -> None:
    assert values[argument] == value


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("prompts.labels=[größe]", 'write \'prompts.labels=["...","..."]\''),
        ("output.dir=/data/run=1", "write 'output.dir=\"/data/run=1\"'"),
        ("output.dir=~/photos", "write 'output.dir=\"~/photos\"'"),
        ("manifest.path=/图/m.parquet", "write 'manifest.path=\"/图/m.parquet\"'"),
    ],
)
def test_a_text_that_hydra_cannot_read_unquoted_has_a_hint_with_quotes(argument: str, hint: str) -> None:
    (problem,) = problems_of(argument)
    assert problem.hint == hint


@pytest.mark.parametrize("argument", ["hydra.run.dir=x", "hydra/job_logging=none", "hydra.verbose=true"])
def test_settings_of_hydra_are_left_to_hydra(argument: str) -> None:
    assert problems_of(argument) == []


def test_a_sweep_may_give_a_key_several_values() -> None:
    assert problems_of("model=demo,clip_vit_b32", "loader.batch_size=8,16", sweep=True) == []
    assert [problem.key for problem in problems_of("loader.batch_size=8,16", "modle=demo", sweep=True)] == ["modle"]


def test_groups_are_the_folders_and_options_the_files(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("model/b.yaml", "model/a.yaml", "model/notes.txt", "config.yaml"):
        (tmp_path / name).write_text("")
    assert groups(tmp_path) == {"model": ["a", "b"]}


def test_other_commands_compose_the_same_config() -> None:
    config = compose_config(["backend=onnx_int8", "parity.top1.int8=0.5", "parity.mean_cosine={int8:0.25,fp8:0.5}"])
    assert (config.backend.name, config.parity.top1["int8"]) == ("onnx_int8", 0.5)
    assert config.parity.mean_cosine == {**Config().parity.mean_cosine, "int8": 0.25, "fp8": 0.5}
    with pytest.raises(ConfigError) as caught:
        compose_config(["modle=demo", "loader.batch_size=0"])
    assert [problem.key for problem in caught.value.problems] == ["modle", "loader.batch_size"]
