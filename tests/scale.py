"""The cost of a plan of 100 million rows: ``python -m tests.scale``; the page goes to ``jobs/results/scale.md``.

Every figure is of a process of its own: its CPU time, its wall time, and the most memory it ever held. The manifest is
real Parquet (ids of 20 characters, paths of about 60); the dataset of the resume has real commits and real, but tiny
parts, one inode for all of a kind, so that plans and commits are timed and not the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.scale_data import SHARD_ROWS, plan_of, write_dataset, write_manifest

ROOT = Path(__file__).resolve().parent.parent
ROWS = (1_000_000, 10_000_000, 100_000_000)


def _opened(manifest: str, id: str = "id") -> Any:
    from pipeline.config.schema import ManifestConfig
    from pipeline.manifest.manifest import open_manifest

    return open_manifest(ManifestConfig(path=manifest, id=id, shard_rows=SHARD_ROWS))


def measure_open(manifest: str) -> dict[str, Any]:
    """Find and open the files: footers, schemas, digests."""
    with measured() as figures:
        opened = _opened(manifest)
    return figures | {"rows": opened.rows, "files": len(opened.files)}


def measure_plan(manifest: str) -> dict[str, Any]:
    """Cut every shard and compare the plan with the one that is there."""
    from pipeline.dataset import plan
    from pipeline.dataset.plan import count_shards
    from pipeline.manifest.shards import cut
    from pipeline.storage.factory import open_storage

    opened = _opened(manifest)
    with tempfile.TemporaryDirectory() as folder, measured() as figures:
        shards = sum(1 for _ in cut(opened, SHARD_ROWS))
        assert shards == count_shards(opened.rows, SHARD_ROWS)
        wanted = plan_of(shards, opened.rows, SHARD_ROWS, {"manifest": opened.fingerprint})
        storage = open_storage(folder)
        assert plan.write_once(storage, wanted)
        assert plan.compare(storage, wanted)
    return figures | {"shards": shards, "plan_bytes": len(wanted.to_json())}


def measure_ids(manifest: str, id: str) -> dict[str, Any]:
    """Prove that no id is null or stands twice."""
    from pipeline.manifest.ids import check_ids

    opened = _opened(manifest, id)
    with measured() as figures:
        check_ids(opened)
    return figures


def measure_resume(folder: str) -> dict[str, Any]:
    """The steps of a resume: find finished shards, end the dataset; and ``verify``, ``collect``."""
    from pipeline.dataset import commits, plan, verify
    from pipeline.storage.factory import open_storage

    storage = open_storage(folder)
    wanted = plan.read(storage)
    assert wanted is not None
    figures: dict[str, Any] = {}
    with measured() as figures["find_done"]:
        done = commits.find_done(storage, wanted)
    assert len(done) == wanted.shards
    with measured() as figures["read_commits"]:
        settled = commits.read_commits(storage, wanted, known=done)
    with measured() as figures["finalize"]:
        commits.finalize(storage, wanted, settled)
    with measured() as figures["verify"]:
        assert verify.verify(storage).state == "healthy"
    with measured() as figures["collect"]:
        assert not verify.collect(storage, age=0, confirm=lambda: None)
    dataset = Path(folder)
    figures["commit_bytes"] = sum(path.stat().st_size for path in (dataset / "_commits").iterdir())
    figures["success_bytes"] = (dataset / "_SUCCESS").stat().st_size
    return figures


def measure_digest(size: str) -> dict[str, Any]:
    """SHA-256 of a part of the real size, as often as takes a while."""
    from pipeline.storage.factory import open_storage

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "part").write_bytes(os.urandom(int(size)))
        storage = open_storage(folder)
        storage.digest("part")
        with measured() as figures:
            for _ in range(20):
                storage.digest("part")
    return figures | {"mb_per_core_second": round(20 * int(size) / 1e6 / figures["cpu"])}


def measure_s3(shards: str) -> dict[str, Any]:
    """Requests and times of a resume in S3: moto's server on this machine, which is slower than S3 to answer."""
    from pipeline.dataset import commits, plan
    from pipeline.storage.base import Storage
    from pipeline.storage.factory import open_storage
    from tests.s3 import BUCKET, moto_server, pointed_at, proxy_to

    wanted, figures = int(shards), dict[str, Any]()
    with tempfile.TemporaryDirectory() as name, moto_server(Path(name, "log")) as server:
        folder = Path(name, "dataset")
        write_dataset(folder, wanted)

        def upload(path: Path) -> None:
            with storage.staged() as staged:
                staged.path.write_bytes(path.read_bytes())
                staged.publish(str(path.relative_to(folder)))

        def resume(
            storage: Storage, figures: dict[str, Any], count: Callable[[], int] = lambda: 0
        ) -> dict[str, tuple[int, int]]:
            prepared, begin = plan.read(storage), count()
            assert prepared is not None
            with measured() as figures["find_done"]:
                done = commits.find_done(storage, prepared, every_byte=False)
            assert len(done) == prepared.shards, f"{len(done)} of {prepared.shards}"
            middle = count()
            with measured() as figures["read_commits"]:
                commits.read_commits(storage, prepared, known=done)
            return {"find_done": (begin, middle), "read_commits": (middle, count())}

        with pointed_at(server):
            storage = open_storage(f"s3://{BUCKET}/dataset")
            files = [path for path in folder.rglob("*") if path.is_file()]
            # A job writes each commit after its part.
            for later in (False, True):
                with ThreadPoolExecutor(8) as pool:
                    list(pool.map(upload, (path for path in files if (path.parent.name == commits.FOLDER) is later)))
            resume(storage, figures)
        with proxy_to(server) as proxy, pointed_at(proxy.url):
            counted: dict[str, Any] = {}
            storage = open_storage(f"s3://{BUCKET}/dataset")
            for step, (begin, end) in resume(storage, counted, lambda: len(proxy.requests)).items():
                asked = [path for _, path, _ in proxy.requests[begin:end]]
                lists = sum("list-type" in path for path in asked)
                figures[step] |= {"lists": lists, "others": len(asked) - lists}
    return figures | {"shards": wanted}


@contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """Wall and CPU seconds of what happens within, and the peak of the process so far."""
    figures: dict[str, Any] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield figures
    figures["wall"], figures["cpu"] = round(time.perf_counter() - wall, 3), round(time.process_time() - cpu, 3)
    # What getrusage calls the peak is also that of the process which started this one.
    status = Path("/proc/self/status").read_text()
    figures["peak_mib"] = round(int(status.split("VmHWM:")[1].split()[0]) / 1024)


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "open": measure_open,
    "plan": measure_plan,
    "ids": measure_ids,
    "resume": measure_resume,
    "digest": measure_digest,
    "s3": measure_s3,
}


def child(name: str, *arguments: str) -> dict[str, Any]:
    """A measurement in a process of its own."""
    command = [sys.executable, "-m", "tests.scale", "--child", name, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(name, *arguments[-1:], found, file=sys.stderr, flush=True)
    return found


def simulate(rows: int, files: int, folder: Path) -> dict[str, Any]:
    """Measure one size; its files are removed."""
    manifest, dataset, shards = folder / "manifest", folder / "dataset", -(-rows // SHARD_ROWS)
    try:
        write_manifest(manifest, rows, files)
        found: dict[str, Any] = {"rows": rows, "files": files, "shards": shards}
        found["manifest_bytes"] = sum(path.stat().st_size for path in manifest.iterdir())
        for name, arguments in {"open": (), "plan": (), "string ids": ("id",), "integer ids": ("number",)}.items():
            found[name] = child("ids" if "ids" in name else name, str(manifest), *arguments)
        shutil.rmtree(manifest)
        write_dataset(dataset, shards)
        found["resume"] = child("resume", str(dataset))
        found["output_files"] = sum(1 for path in dataset.rglob("*") if path.is_file())
    finally:
        shutil.rmtree(manifest, ignore_errors=True)
        shutil.rmtree(dataset, ignore_errors=True)
    return found


def many_files(count: int, folder: Path) -> dict[str, Any]:
    """Open a manifest of so many files; they are links to one of 10,000 rows."""
    manifest = folder / "many"
    try:
        write_manifest(manifest, 10_000, 1)
        for number in range(1, count):
            os.link(manifest / "00000.parquet", manifest / f"{number:05d}.parquet")
        return child("open", str(manifest))
    finally:
        shutil.rmtree(manifest, ignore_errors=True)


def memory_of_jobs(sizes: Sequence[int], folder: Path) -> dict[str, Any]:
    """Peaks of whole jobs over tiny images, with an encoder that costs nothing."""
    from tests.test_memory import peak_mib, tiny_images

    folder.mkdir()
    peaks = {}
    for rows in sizes:
        manifest = tiny_images(folder / f"{rows}.parquet", rows)
        peaks[rows], _ = peak_mib(manifest, folder / str(rows))
    return {"about": "Jobs over PNG images of 12 x 12 pixels with a stub encoder", "peaks": peaks}


def main() -> int:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.scale", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--s3-shards", type=int, default=1000)
    parser.add_argument("--memory", type=int, nargs="*", default=(), help="rows of whole jobs, whose peak is taken")
    parser.add_argument("--output", type=Path, default=ROOT / "jobs" / "results" / "scale")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *arguments = options.child
        print(json.dumps(CHILDREN[name](*arguments)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        content: dict[str, Any] = {
            "machine": f"{os.cpu_count()} cores, {_processor()}",
            "versions": f"Python {platform.python_version()}, pyarrow {pa.__version__}",
            "command": " ".join(["python -m tests.scale", *sys.argv[1:]]),
            "digest": child("digest", str(SHARD_ROWS * 512 * 4)),
            "many files": many_files(10_000, folder),
            "s3": child("s3", str(options.s3_shards)),
            "memory": memory_of_jobs(options.memory, folder / "jobs") if options.memory else None,
            "sizes": [simulate(rows, min(options.files, rows), folder) for rows in options.rows],
        }
    from tests.scale_page import to_markdown

    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    options.output.with_suffix(".md").write_text(to_markdown(content))
    return 0


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    raise SystemExit(main())
