"""Damage to the files of a finished dataset."""

from __future__ import annotations

from pathlib import Path


def part_of(output: Path, shard: int) -> Path:
    """The part of a shard."""
    return next(output.glob(f"part-{shard:05d}-*"))


def commit_of(output: Path, shard: int) -> Path:
    """The commit of a shard, which may not exist."""
    return output / "_commits" / f"{shard:05d}.json"


def truncate(path: Path, size: int = -10) -> None:
    """Keep the first bytes: so many, or all but so many."""
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path) -> None:
    """Change a bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
