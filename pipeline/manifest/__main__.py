"""``python -m pipeline.manifest``: create a manifest from a folder, a CSV or WebDataset tars."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipeline.core.cli import ErrorOutput, command_parser, print_showable, run_command, run_process

EXAMPLES = """\
examples:
  python -m pipeline.manifest folder ~/Pictures photos.parquet
  python -m pipeline.manifest csv products.csv products.parquet --image file --id sku
  python -m pipeline.manifest tar train-*.tar train.parquet
exit codes: 0 done, 2 no manifest can be made of the input, 75 interrupted: run it again, 1 anything else
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, write the manifest, print its rows; return the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _build(options), ErrorOutput("interrupted; nothing was written"))


def _build(options: argparse.Namespace) -> None:
    from pipeline.manifest import build
    from pipeline.manifest.folder import LeftOut

    left_out = LeftOut()
    if options.kind == "folder":
        rows = build.from_folder(options.folder, options.out, left_out=left_out, every=options.all)
    elif options.kind == "csv":
        rows = build.from_csv(options.csv, options.out, image=options.image, id=options.id, root=options.root)
    else:
        rows = build.from_tars(options.tars, options.out)
    if str(left_out):
        print_showable(f"{options.folder}: {left_out}")
    print(f"{options.out}: {rows:,} rows; next: python -m pipeline.run manifest.path={options.out} output.dir=...")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python -m pipeline.manifest", "Make a Parquet manifest for pipeline.run.", EXAMPLES)
    kinds = parser.add_subparsers(dest="kind", required=True)
    folder = kinds.add_parser("folder", help="every image below a folder; ids are relative paths")
    folder.add_argument("folder", help="the folder of the images, at any depth; also s3:// and the like")
    folder.add_argument("--all", action="store_true", help="take every file, whatever its name is")
    csv = kinds.add_parser("csv", help="a CSV with a header; all columns are kept")
    csv.add_argument("csv", help="the file, or a TSV; its columns travel with manifest.keep")
    csv.add_argument("--image", default="path", help="the column of image paths (default: path)")
    csv.add_argument("--id", help="the column of ids (default: id, or else the image paths)")
    csv.add_argument("--root", help="where relative paths start (default: the folder of the CSV)")
    tar = kinds.add_parser("tar", help="WebDataset tars; images stay where they are")
    tar.add_argument("tars", nargs="+", help="plain tars, not compressed ones; also 's3://bucket/{00000..00999}.tar'")
    for kind in (folder, csv, tar):
        kind.add_argument("out", help="the Parquet file to write")
    return parser


if __name__ == "__main__":
    run_process(main)
