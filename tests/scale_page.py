"""The page of :mod:`tests.scale`: its figures, what follows from them, and what is only estimated."""

from __future__ import annotations

from typing import Any

SHARD_ROWS = 4096
# The embedding of a row, 512 numbers of four bytes; what else a part holds is little.
ROW_BYTES = 512 * 4
# A request of S3 from within its region, and a LIST of 1,000 names; what the client's processor takes is measured.
GET_SECONDS, LIST_SECONDS, REQUESTS = 0.025, 0.15, 16
# 100 million rows in shards of 4,096, and 5 billion with manifest.shard_rows=auto.
COUNTS = (24_415, 49_825)


def to_markdown(content: dict[str, Any]) -> str:
    """The whole page."""
    lines = [
        "# A plan of 100 million rows",
        "",
        f"{content['machine']}; {content['versions']}. Written by `{content['command']}`.",
        "",
        "Seconds are of the processor (wall times, of a machine that did other work meanwhile, are in the JSON), MiB",
        "the peak of a process that did this alone.",
        "",
        _table(content["sizes"]),
        "",
        _many(content["many files"]),
        "",
        *_bytes(content),
        "",
        *_s3(content),
    ]
    if memory := content.get("memory"):
        lines += ["", *_memory(memory)]
    return "\n".join(lines) + "\n"


def _table(sizes: list[dict[str, Any]]) -> str:
    head = " | ".join(f"{size['rows']:,} rows" for size in sizes)
    rows = {
        "shards": lambda size: f"{size['shards']:,}",
        "files of the manifest, MB": lambda size: f"{size['files']:,}, {size['manifest_bytes'] / 1e6:,.1f}",
        "open the manifest (footers, schemas, digests), s, MiB": lambda size: _figures(size["open"]),
        "no id twice: strings, s, MiB": lambda size: _figures(size["string ids"]),
        "no id twice: integers, s, MiB": lambda size: _figures(size["integer ids"]),
        "cut all shards, create and compare the plan, s, MiB": lambda size: _figures(size["plan"]),
        "`_plan.json` without the config, bytes": lambda size: f"{size['plan']['plan_bytes']:,}",
        "files of the output": lambda size: f"{size['output_files']:,}",
        "all commits, MB": lambda size: f"{size['resume']['commit_bytes'] / 1e6:,.2f}",
        "`_SUCCESS`, MB": lambda size: f"{size['resume']['success_bytes'] / 1e6:,.2f}",
        "resume: find what is done, without the bytes of the parts, s, MiB": lambda s: _figures(
            s["resume"]["find_done"]
        ),
        "all commits at the end, s, MiB": lambda size: _figures(size["resume"]["read_commits"]),
        "finalize, s, MiB": lambda size: _figures(size["resume"]["finalize"]),
        "`verify`, without the bytes of the parts, s, MiB": lambda size: _figures(size["resume"]["verify"]),
        "`verify --collect`, s, MiB": lambda size: _figures(size["resume"]["collect"]),
    }
    lines = [f"| | {head} |", "| --- |" + " ---: |" * len(sizes)]
    for name, cell in rows.items():
        lines.append(f"| {name} | " + " | ".join(map(cell, sizes)) + " |")
    return "\n".join(lines)


def _figures(found: dict[str, Any]) -> str:
    return f"{found['cpu']:.2f}, {found['peak_mib']}"


def _many(found: dict[str, Any]) -> str:
    return f"A manifest of {found['files']:,} files is opened in {_figures(found)} (s, MiB)."


def _bytes(content: dict[str, Any]) -> list[str]:
    speed = content["digest"]["mb_per_core_second"]
    lines = ["## The bytes of the parts", ""]
    for size in content["sizes"]:
        amount = size["rows"] * ROW_BYTES
        lines.append(
            f"- {size['rows']:,} rows of 512 float32 are {amount / 1e9:,.1f} GB; SHA-256 at {speed:,} MB/s a core "
            f"takes {amount / 1e6 / speed:,.0f} core seconds (and the disk must read as much)."
        )
    return [
        *lines,
        "",
        "A resume on a local disk reads every byte, spread over the cores. In S3 a part that is older than its commit,",
        "as the listing shows, is taken as it is: it was sent with its SHA-256, which S3 compared. Of another one, the",
        "digest that S3 kept is compared with the commit, or else it is read. `pipeline.verify` reads every byte.",
    ]


def _s3(content: dict[str, Any]) -> list[str]:
    found, shards = content["s3"], content["s3"]["shards"]
    lines = [
        "## S3",
        "",
        f"Requests were counted and processor time measured with {shards:,} shards on moto's server; the seconds are",
        f"estimates: {1000 * GET_SECONDS:.0f} ms for a request, {REQUESTS} at a time, {LIST_SECONDS} s for",
        "each LIST of 1,000 names, one after another, or the processor's time where that is longer. Bytes of parts are",
        "not counted.",
        "",
        "| | requests a shard | processor, ms a shard | shards | requests | estimated seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for step, title in {"find_done": "resume: find what is done", "read_commits": "all commits at the end"}.items():
        each = found[step]["others"] / found["shards"]
        cpu = found[step]["cpu"] / found["shards"]
        for count in COUNTS:
            pages = -(-count // 1000)
            lists = 2 * pages if step == "find_done" else pages * min(1, found[step]["lists"])
            requests = count * each + lists
            seconds = max(count * each * GET_SECONDS / REQUESTS, count * cpu) + lists * LIST_SECONDS
            cells = f"{each:.2f} | {1000 * cpu:.1f} | {count:,} | {requests:,.0f} | {seconds:,.0f}"
            lines.append(f"| {title} | {cells} |")
    return lines


def _memory(found: dict[str, Any]) -> list[str]:
    peaks = {int(rows): peak for rows, peak in found["peaks"].items()}
    least = peaks[min(peaks)]
    text = ", ".join(f"{rows:,} rows {peak:.1f} MiB ({peak / least - 1:+.1%})" for rows, peak in sorted(peaks.items()))
    return [
        "## Memory of a job",
        "",
        f"{found['about']}, peak of the job and its decoders: {text}.",
        "The check of the ids takes 8 bytes a row on top while it runs, and gives them back when it is done: in memory",
        "up to 67 million rows, in TMPDIR beyond.",
    ]
