"""Label files as people write them: the right labels, or a message with the file, the line and the way out."""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import PromptsConfig, ServeConfig
from pipeline.core.errors import PromptsError
from pipeline.models.label_files import LabelSet, read_labels
from pipeline.serve.errors import Refused

TEMPLATES = ["a photo of a {}", "a {}"]
TWO = LabelSet(("cat", "dog"), (("a photo of a cat", "a cat"), ("a photo of a dog", "a dog")))
OWN = LabelSet(("cat", "dog"), (("a tabby, striped", "a kitten"), ("a photo of a dog", "a dog")))


def read(path: Path, content: str | bytes) -> LabelSet:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_labels(PromptsConfig(path=str(path), templates=TEMPLATES))


def read_table(path: Path, columns: dict[str, Any]) -> LabelSet:
    pq.write_table(pa.table(columns), path)
    return read_labels(PromptsConfig(path=str(path), templates=TEMPLATES))


# YAML.


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("[cat, dog]", TWO),
        ("labels: [cat, dog]", TWO),
        ("labels:\n- cat\n- dog\n", TWO),
        ("labels:\n  cat:\n  dog:\n", TWO),
        ("{cat: , dog: }", TWO),
        ('{"labels": {"cat": ["a tabby, striped", "a kitten"], "dog": null}}', OWN),
        ("cat: ['a tabby, striped', a kitten]\ndog:\n", OWN),
        ("- cat # a comment\n- 'dog'\n", TWO),
        ("﻿- cat\n- dog\n", TWO),
        ("- cat\r\n- dog\r\n", TWO),
        ("- &a cat\n- dog\n", TWO),
        ("cat: ['a big {}']\ndog: 'a {}, a {}'\n", LabelSet(("cat", "dog"), (("a big cat",), ("a dog, a dog",)))),
        ("- 'no'\n- '1'\n", LabelSet(("no", "1"), (("a photo of a no", "a no"), ("a photo of a 1", "a 1")))),
    ],
)
def test_a_yaml_file_gives_the_labels_that_a_person_reads(content: str, wanted: LabelSet, tmp_path: Path) -> None:
    assert read(tmp_path / "l.yaml", content) == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- cat\n- no\n", "line 2: label 2 is False.*quote"),
        ("- cat\n- 1\n", "line 2: label 2 is 1;"),
        ("- cat\n- 1.5\n", "line 2: label 2 is 1.5;"),
        ("- cat\n- 2024-01-01\n", r"line 2: label 2 is datetime.date\(2024, 1, 1\).*dates"),
        ("- cat\n- 2024-13-45\n", "line 2: label 2 is 2024-13-45;"),
        ("- cat\n- ~\n", "line 2: label 2 is None"),
        ("- cat\n-\n", "line 2: label 2 is None"),
        ("- cat\n- [dog]\n", "line 2: label 2 is a sequence"),
        ("- cat\n- name: dog\n", "line 2: label 2 is a mapping"),
        ("- cat\n- ''\n", "line 2: label 2 is ''"),
        ("- cat\n- !dog x\n", "not YAML: the tag !dog is not read(?s:.*)line 2"),
        ("cat: a cat\nno: a dog\n", "line 2: label 2 is False"),
        ("0: cat\n1: dog\n", "line 1: label 1 is 0"),
        ("cat: a cat\ndog: a dog\ncat: a tabby\n", r"'cat' stands there twice \(line 1 and line 3\)"),
        ("labels:\n  cat: a cat\n  cat: a dog\n", r"'cat' stands there twice \(line 2 and line 3\)"),
        ("- cat\n- dog\n- cat\n", r"'cat' stands there twice \(line 1 and line 3\)"),
        ("cat: [a cat, 3]\n", "line 1: the prompt of 'cat' is 3"),
        ("cat: [a cat, ]\ndog: [a dog, ~]\n", "line 2: an empty prompt in the list of 'dog'"),
        ("cat: {size: big}\n", "the prompt of 'cat' is a mapping"),
        ("cat: []\n", "the prompt of 'cat' is a sequence"),
        ("labels: cat\n", "labels is 'cat'; wanted a list"),
        ("labels:\n", "labels is ''; wanted a list"),
        ("labels: [cat]\ntemplates: ['{}']\n", r"keys of the config \(labels, templates\)"),
        ("prompts:\n  labels: [cat]\n", r"keys of the config \(prompts\)"),
        ("- cat\n---\n- dog\n", "not YAML"),
        ("<<: {cat: x}\n", "not YAML: the tag .*merge is not read"),
        ("", "no labels"),
        ("labels: []\n", "no labels"),
        ("cat", "wanted a list"),
        ("- cat\n\t- dog\n", "not YAML"),
        ("- \x00\n", "NUL"),
    ],
)
def test_what_yaml_reads_as_something_else_is_refused_with_the_line(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match=message) as caught:
        read(tmp_path / "l.yaml", content)
    assert "l.yaml" in str(caught.value)


def test_one_label_with_several_prompts_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(tmp_path / "l.yaml", "names: [cat, dog]\n")
    assert "one label, 'names', with 2 prompts" in caplog.text


# CSV.


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("label\ncat\ndog\n", TWO),
        ("label\n\ncat\n\ndog\n\n", TWO),
        ("label,prompt\ncat,\ndog,\n", TWO),
        ("id,label\n1,cat\n2,dog\n", TWO),
        ('label,prompt\ncat,"a tabby, striped"\ncat,a kitten\ndog,\n', OWN),
        ('label, prompt\ncat, "a tabby, striped"\ncat, a kitten\ndog, \n', OWN),
        ('prompt,label\n"a tabby, striped",cat\na kitten,cat\n,dog\n', OWN),
        ("label ,prompt\ncat,a {}\ndog,the {}\n", LabelSet(("cat", "dog"), (("a cat",), ("the dog",)))),
        ("label\ncat\ndog\n".encode("utf-16"), TWO),
        (b"\xfe\xff" + "label\r\ncat\r\ndog\r\n".encode("utf-16-be"), TWO),
        ("\ufefflabel\ncat\ndog\n".encode(), TWO),
        ('"label"\n"cat"\n"dog"\n', TWO),
        ("label\rcat\rdog\r", TWO),
    ],
)
def test_a_csv_file_gives_the_labels_that_a_person_reads(
    content: str | bytes, wanted: LabelSet, tmp_path: Path
) -> None:
    assert read(tmp_path / "l.csv", content) == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("label,prompt\ncat,a cat\ndog,a red, big dog\n", "line 3: 3 values, and the header has 2.*double quotes"),
        ("label\ncat\na dog, red\n", "line 3: 2 values, and the header has 1"),
        ("label,prompt\ncat,a cat\ndog\n", "line 3: 1 values, and the header has 2"),
        ("label,prompt\n,a cat\n", "line 2: label 1 is ''"),
        ("label,prompt\n,\n", "line 2: label 1 is ''"),
        ("label,prompt\ncat,   \n", "line 2: the prompt of 'cat' is '   '"),
        ("label,prompts\ncat,a cat\n", "the column 'prompts' is not read; call it 'prompt'"),
        ("label,Prompt\ncat,a cat\n", "the column 'Prompt' is not read; call it 'prompt'"),
        ("labels\ncat\n", "no column 'label'; its columns are labels"),
        ("label,label\ncat,dog\n", "the column 'label' stands there twice"),
        ("label,prompt,prompt\ncat,x,y\n", "the column 'prompt' stands there twice"),
        ("label;prompt\ncat;a cat\n", "separate its columns by commas"),
        ("label\tprompt\ncat\ta cat\n".encode("utf-16"), "separate its columns by commas"),
        ("label\nchat\nétoile\n".encode("latin-1"), "line 3: not UTF-8 .*save the file as UTF-8"),
        ("label\ncat\n".encode("utf-16-le"), "NUL"),
        ("label\ncat\n".encode("utf-16") + b"x", "not UTF-16"),
        ('label,prompt\ncat,"a cat\ndog,a dog\n', "not CSV"),
        ('label,prompt\ncat,"a" cat\n', "not CSV"),
        ("label,prompt\ncat,a cat\ncat,\n", r"'cat' stands there twice \(line 2 and line 3\)"),
        ("label,prompt\ncat,\ncat,a cat\n", r"'cat' stands there twice \(line 2 and line 3\)"),
        ("label\ncat\ndog\ncat\n", r"'cat' stands there twice \(line 2 and line 4\)"),
        ("cat\ndog\n", "no column 'label'; its columns are cat"),
        ("", "no labels"),
    ],
)
def test_a_csv_file_that_reads_wrongly_is_refused_with_the_line(
    content: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(PromptsError, match=message) as caught:
        read(tmp_path / "l.csv", content)
    assert "l.csv" in str(caught.value)


def test_columns_that_are_not_read_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(tmp_path / "l.csv", "label,description\ncat,a small cat\n")
    assert "only 'label' is read, not description" in caplog.text


# Parquet.


@pytest.mark.parametrize(
    "columns",
    [
        {"label": ["cat", "dog"]},
        {"label": ["cat", "dog"], "prompt": [None, None]},
        {"label": ["cat", "dog"], "prompt": pa.array([None, []], pa.list_(pa.string()))},
        {"label": pa.array(["cat", "dog"]).dictionary_encode()},
        {"label": pa.array(["cat", "dog"], pa.large_string())},
        {"label": pa.array(["cat", "dog"], pa.string_view()), "id": [1, 2]},
    ],
)
def test_a_parquet_file_gives_its_labels_in_every_encoding(columns: dict[str, Any], tmp_path: Path) -> None:
    assert read_table(tmp_path / "l.parquet", columns) == TWO


def test_a_list_of_prompts_in_parquet_is_averaged(tmp_path: Path) -> None:
    columns = {"label": ["cat", "dog"], "prompt": [["a tabby, striped", "a kitten"], None]}
    assert read_table(tmp_path / "l.pq", columns) == OWN


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": ["cat", None]}, "row 1: label 2 is None"),
        ({"label": [1, 2]}, "row 0: label 1 is 1"),
        ({"label": [True]}, "row 0: label 1 is True"),
        ({"label": [b"cat"]}, "row 0: label 1 is b'cat'"),
        ({"label": [datetime.date(2024, 1, 1)]}, "row 0: label 1 is datetime.date"),
        ({"label": ["cat"], "prompt": [float("nan")]}, "row 0: the prompt of 'cat' is nan"),
        ({"label": ["cat"], "prompt": [["a cat", None]]}, "'cat'"),
        ({"label": ["cat"], "prompts": ["a cat"]}, "call it 'prompt'"),
        ({"text": ["cat"]}, "no column 'label'; its columns are text"),
        ({"label": pa.array([], pa.string())}, "no labels"),
    ],
)
def test_a_parquet_file_that_holds_no_texts_is_refused_with_the_row(
    columns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PromptsError, match=message):
        read_table(tmp_path / "l.parquet", columns)


# Labels that nobody can tell apart.

SAME_NAMES = [
    ("red circle", "red circle "),
    ("caf\u00e9", "cafe\u0301"),
    ("\u212bngstrom", "\u00c5ngstrom"),
    ("a", "\ta"),
]


def written(form: str, folder: Path, one: str, other: str) -> LabelSet:
    if form == "config":
        return read_labels(PromptsConfig(labels=[one, "dog", other]))
    if form == "yaml":
        return read(folder / "l.yaml", f'- "{one}"\n- dog\n- "{other}"\n'.replace("\t", "\\t"))
    if form == "csv":
        return read(folder / "l.csv", f'label\n"{one}"\ndog\n"{other}"\n')
    return read_table(folder / "l.parquet", {"label": [one, "dog", other]})


@pytest.mark.parametrize(("one", "other"), SAME_NAMES)
@pytest.mark.parametrize(
    ("form", "places"),
    [
        ("config", ("[0]", "[2]")),
        ("yaml", ("line 1", "line 3")),
        ("csv", ("line 2", "line 4")),
        ("parquet", ("row 0", "row 2")),
    ],
)
def test_labels_that_differ_in_spaces_or_unicode_form_only_are_refused(
    form: str, places: tuple[str, str], one: str, other: str, tmp_path: Path
) -> None:
    with pytest.raises(PromptsError, match=r"differ in spaces or in the form of their Unicode.*only") as caught:
        written(form, tmp_path, one, other)
    assert f"{one!r} ({places[0]}) and {other!r} ({places[1]})" in str(caught.value)


@pytest.mark.parametrize(
    "content", ["cat: a photo\ndog: a photo\n", "cat: [a, b]\ndog: [b, a]\n", "cat: an animal\ndog: 'an animal '\n"]
)
def test_labels_with_the_same_prompts_are_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match=r"'cat' \(line 1\) and 'dog' \(line 2\) have the same prompts"):
        read(tmp_path / "l.yaml", content)


def test_a_template_that_is_not_filled_makes_all_labels_the_same() -> None:
    with pytest.raises(PromptsError, match=r"'cat' .*and 'dog' .*same prompts \('a photo of a'\).*template with \{\}"):
        read_labels(PromptsConfig(labels=["cat", "dog"], templates=["a photo of a"]))
    assert read_labels(PromptsConfig(labels=["cat", "dog"], templates=["a photo", "{}"])).names == ("cat", "dog")


@pytest.mark.parametrize(("one", "other"), [*SAME_NAMES, ("cat", "cat")])
def test_a_request_with_labels_that_nobody_can_tell_apart_is_refused(one: str, other: str) -> None:
    pytest.importorskip("python_multipart", reason="needs the extra serve")
    from pipeline.serve.requests import PredictRequest, read_request

    body = {"images": [{"data": ""}], "labels": [one, "dog", other]}
    with pytest.raises(Refused, match=r"Unicode form only|is a duplicate") as caught:
        read_request(PredictRequest, "application/json", json.dumps(body).encode(), ServeConfig())
    assert caught.value.status == 422
