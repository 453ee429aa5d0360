"""A head: a small model that predicts a column of a dataset from its embeddings, with its accuracy on held-out rows.

python jobs/analytics/train_head.py outputs/demo --truth truth --contains circle --out heads/circle.json
    writes heads/circle.json and heads/circle.safetensors, the probability that "circle" is in the column truth
python -m pipeline.relabel outputs/demo output.dir=outputs/demo-circle 'labels.heads=[heads/circle.json]'
    writes it as the column head_circle; a job does with the same override

Without --contains every value of the column is a class, and the head writes a column for each. Logistic regression, by
scikit-learn; rows without an embedding or a value are left out. pip install -c constraints.txt -e '.[analytics]'
"""

from __future__ import annotations

import argparse
import re

import numpy as np
from common import identifier, parts, start, vectors

from pipeline import PipelineError, save_head


def main(argv: list[str] | None = None) -> float:
    """Train, save and print; return the accuracy on the held-out rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a dataset's folder")
    parser.add_argument("--truth", required=True, metavar="COLUMN", help="a kept column with what is to be predicted")
    parser.add_argument("--contains", metavar="TEXT", help="predict only whether the column contains this text")
    parser.add_argument("--out", required=True, metavar="NAME.json", help="the head; NAME.safetensors lies beside it")
    parser.add_argument("--held-out", type=float, default=0.25, metavar="SHARE", help="rows for the accuracy [0.25]")
    parser.add_argument("--seed", type=int, default=0, help="of the rows that are held out [0]")
    args = parser.parse_args(argv)
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise SystemExit("scikit-learn is not installed: pip install -c constraints.txt -e '.[analytics]'") from None
    files = parts(args.dataset)
    rows, matrix, left_out = vectors(files, [identifier(files), args.truth])
    known = rows[args.truth].notna().to_numpy()
    truth, matrix = rows.loc[known, args.truth].astype(str).to_numpy(), matrix[known]
    if args.contains is not None:
        truth = np.char.find(truth.astype(str), args.contains) >= 0
    else:
        truth = np.array([re.sub(r"\W+", "_", each, flags=re.ASCII) for each in truth])
    if len(set(truth)) < 2:
        raise SystemExit(f"{args.truth}: all {len(truth):,} rows have one value, so there is nothing to predict")
    test = np.random.default_rng(args.seed).random(len(truth)) < args.held_out
    if not test.any() or len(set(truth[~test])) < len(set(truth)):
        raise SystemExit("too few rows: every value must be among those that are trained on, and some must be held out")
    model = LogisticRegression(max_iter=1000, C=100.0).fit(matrix[~test], truth[~test])
    accuracy = float((model.predict(matrix[test]) == truth[test]).mean())
    most = float((truth[test] == max(set(truth), key=list(truth[~test]).count)).mean())
    try:
        written = save_head(args.out, model, dataset=args.dataset)
    except PipelineError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{(~test).sum():,} rows trained on, {left_out + (~known).sum():,} left out")
    print(f"accuracy on {test.sum():,} held-out rows: {accuracy:.1%}; the commonest value alone: {most:.1%}")
    print(f"head: {written}")
    return accuracy


if __name__ == "__main__":
    start(main)
