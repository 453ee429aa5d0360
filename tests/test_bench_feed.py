"""The benchmark of what feeds a GPU: its figures are there, and only JSON is on standard output."""

from __future__ import annotations

import json
import os

import pytest

from pipeline.bench import __main__ as bench
from pipeline.bench import feed

FIGURES = {"images_per_second", "driver_core_us_per_image"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "feeders",
    [
        pytest.param(
            0,
            marks=pytest.mark.skipif(
                os.environ.get("PIPELINE_TEST_SLOW") != "1", reason="PIPELINE_TEST_SLOW=1 runs it"
            ),
        ),
        1,
    ],
)
def test_every_figure_is_measured(
    feeders: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "SHARD", 1024)
    monkeypatch.setattr(feed, "LAUNCH_SECONDS", 0.1)
    assert bench.main(["feed", "--rows", "2048", "--feeders", str(feeders)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["feeders"] == feeders
    for source in ("files", "bytes"):
        assert set(found[source]) == {*FIGURES, "feeder_core_us_per_image", "batches_alone"}
        assert set(found[source]["batches_alone"]) == FIGURES
        assert all(found[source][name] > 0 for name in FIGURES)
        # Core time of another process is counted there.
        assert (found[source]["feeder_core_us_per_image"] > 0) == (feeders > 0)
    assert found["launches"]["launch_slowdown"] > 0
    assert found["launches"]["images_per_second"] > 0


def test_wrong_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["feed", "--rows", "1", "--feeders", "-1", "--rate", "0"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    for name in ("--rows", "--feeders", "--rate"):
        assert name in said.err
