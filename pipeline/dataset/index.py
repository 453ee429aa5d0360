"""An index for approximate search, kept within the dataset and good for exactly its ``_SUCCESS``.

FAISS, as it is kept up and comes as wheels for every Python here: an inverted file (Jegou et al. 2011) with vectors in
16 bits. How many of its lists are read per query is measured when it is built: as few as give the recall wanted.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ArtifactError, ConfigError, ModelError, Problem, StorageError, install_hint
from pipeline.dataset.dataset import Dataset, vectors_of
from pipeline.dataset.search import Found, nearest, rescore, without
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import explained

FOLDER = "_index"
CARD = f"{FOLDER}/index.json"
VERSION = 1
# Lists: 4 * sqrt(rows) is FAISS's own advice, and 39 rows to train each are the least that it takes without a warning.
LISTS, LEAST, TRAINED = 16_384, 39, 64
# Recall is measured on so many queries, at so many neighbours, and is to be at least this.
QUERIES, NEIGHBOURS, RECALL = 200, 10, 0.95
# Candidates for each place; their order is that of the stored embeddings.
WIDER = 4
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IndexCard:
    """What an index is: of which dataset, its settings, its file, and its recall against the exact search.

    ``recall`` is the share of the exact 10 nearest rows that were found, by kind of query: ``rows`` are embeddings of
    the dataset (each without itself), ``texts`` its labels. ``lists_read`` (of ``lists``) is what gave it.
    """

    version: int
    dataset: Mapping[str, str]
    vectors: int
    lists: int
    lists_read: int
    recall: Mapping[str, float]
    queries: Mapping[str, int]
    library: str
    file: str
    size: int
    seconds: float


def faiss_or_told(option: str) -> Any:
    """The module, or an error that says how to get it; ``option`` is what asked for it."""
    try:
        import faiss
    except ImportError as error:
        allowed = f"faiss-cpu is not installed ({error})"
        raise ConfigError([Problem(option, "faiss", allowed, install_hint("search"))]) from error
    return faiss


def build_index(dataset: Dataset, texts: Callable[[], NDArray[np.float32] | None]) -> IndexCard:
    """Build, measure and publish the index of a dataset, in place of an older one.

    Reads every embedding twice. The index is in memory while it is built: 2 bytes for every number of an embedding.

    Args:
        dataset: of which rows.
        texts: asked for embeddings of texts, ``[N, D]``, to measure with as well; None where there are none.

    Raises:
        ConfigError: FAISS is not installed.
        ArtifactError: no row has an embedding.
    """
    faiss, began, count = faiss_or_told("--build-index"), time.time(), dataset.vectors
    if not count:
        raise ArtifactError(f"{dataset.url}: no row has an embedding, so there is nothing to index")
    lists = max(1, min(LISTS, int(4 * count**0.5), count // LEAST))
    index = faiss.index_factory(dataset.dim, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    log.info("%s: %d embeddings in %d lists", dataset.url, count, lists)
    index.train(spread(dataset, min(count, TRAINED * lists))[0])
    for numbers, vectors in _vectors(dataset):
        index.add_with_ids(vectors, numbers)
    own, numbers = spread(dataset, min(count, QUERIES))
    queries = {"rows": own}
    try:
        worded = texts()
    except ModelError as error:
        log.warning("recall is measured for rows alone: %s", error)
        worded = None
    if worded is not None and len(worded):
        queries["texts"] = worded[:: max(1, len(worded) // QUERIES)][:QUERIES]
    truths = {"rows": [without(found, row, NEIGHBOURS) for found, row in
                       zip(nearest(dataset, own, NEIGHBOURS + 1), numbers.tolist(), strict=True)]}  # fmt: skip
    if "texts" in queries:
        truths["texts"] = nearest(dataset, queries["texts"], NEIGHBOURS)
    read, recall = _fewest(index, lists, queries, truths, numbers)
    storage = dataset.storage
    with storage.staged() as staged:
        with explained(str(staged.path), needed=count * dataset.dim * 2):
            faiss.write_index(index, str(staged.path))
        size = staged.path.stat().st_size
        name = f"{FOLDER}/{dataset.fingerprint['success'][:16]}.faiss"
        staged.publish(name, replace=True)
    card = IndexCard(
        version=VERSION,
        dataset=dataset.fingerprint,
        vectors=count,
        lists=lists,
        lists_read=read,
        recall=recall,
        queries={kind: len(each) for kind, each in queries.items()},
        library=f"faiss {faiss.__version__}",
        file=name,
        size=size,
        seconds=round(time.time() - began, 2),
    )
    storage.write(CARD, (json.dumps(asdict(card), indent=2) + "\n").encode())
    for other in storage.sizes(FOLDER):
        if other.endswith(".faiss") and f"{FOLDER}/{other}" != name:
            storage.remove(f"{FOLDER}/{other}")
    return card


def read_card(dataset: Dataset) -> IndexCard:
    """The card of the dataset's index.

    Raises:
        ArtifactError: there is none, or it is of another state of the dataset.
    """
    build = f"python -m pipeline.search {dataset.url} --build-index"
    data = dataset.storage.read(CARD)
    if data is None:
        raise ArtifactError(f"{dataset.url}: has no index; {build} makes one, and without --index the search is exact")
    try:
        card = IndexCard(**json.loads(data))
        fits = card.version == VERSION and dict(card.dataset) == dataset.fingerprint
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{dataset.url}/{CARD}: not readable ({error}); {build} makes it anew") from error
    if not fits:
        raise ArtifactError(f"{dataset.url}: its index is of another state of the dataset; {build} makes it anew")
    if dataset.storage.size(card.file) != card.size:
        raise ArtifactError(f"{dataset.url}/{card.file}: missing or torn; {build} makes it anew")
    return card


def search_index(dataset: Dataset, query: NDArray[np.float32], count: int) -> Found:
    """About the ``count`` nearest rows; scores and order are those of the stored embeddings.

    Raises:
        ArtifactError: there is no index that fits.
        ConfigError: FAISS is not installed.
    """
    faiss, card = faiss_or_told("--index"), read_card(dataset)
    index = _open(faiss, dataset, card)
    index.nprobe = card.lists_read
    rows = index.search(query[None], min(card.vectors, WIDER * count))[1][0]
    return rescore(dataset, rows[rows >= 0], query, count)


def _open(faiss: Any, dataset: Dataset, card: IndexCard) -> Any:
    storage = dataset.storage
    try:
        if isinstance(storage, LocalStorage):
            # Mapped: only the lists that are looked at are read.
            return faiss.read_index(str(storage.root / card.file), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        data = storage.read(card.file)
        if data is None:
            raise StorageError(f"{storage.url}/{card.file}: missing")
        return faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
    except (RuntimeError, MemoryError) as error:
        build = f"python -m pipeline.search {dataset.url} --build-index"
        raise ArtifactError(
            f"{storage.url}/{card.file}: FAISS cannot read it ({error}); {build} makes it anew"
        ) from error


def _fewest(
    index: Any,
    lists: int,
    queries: Mapping[str, NDArray[np.float32]],
    truths: Mapping[str, list[Found]],
    numbers: NDArray[np.int64],
) -> tuple[int, dict[str, float]]:
    """As few lists as give the recall wanted for every kind of query, and that recall."""
    read = 1
    while True:
        index.nprobe = read
        recall = {}
        for kind, vectors in queries.items():
            found = index.search(vectors, WIDER * NEIGHBOURS)[1]
            hits = [len(np.intersect1d(rows, truth.rows)) / max(1, len(truth.rows))
                    for rows, truth in zip(found, truths[kind], strict=True)]  # fmt: skip
            recall[kind] = round(float(np.mean(hits)), 4)
        log.info("%d of %d lists read: recall %s", read, lists, recall)
        if read == lists or min(recall.values()) >= RECALL:
            return read, recall
        read = min(lists, 2 * read)


def _vectors(dataset: Dataset) -> Generator[tuple[NDArray[np.int64], NDArray[np.float32]], None, None]:
    """Row numbers and float32 embeddings of every part."""
    for commit, table in zip(dataset.commits, dataset.stream(["embedding"]), strict=True):
        stored, rows = vectors_of(table["embedding"])
        yield rows + dataset.starts[commit.shard], np.ascontiguousarray(stored, dtype=np.float32)


def spread(dataset: Dataset, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """``count`` embeddings spread evenly over the dataset, and the numbers of their rows."""
    wanted = np.arange(count, dtype=np.int64) * dataset.vectors // count
    seen, rows, vectors = 0, [], []
    for numbers, part in _vectors(dataset):
        here = wanted[(wanted >= seen) & (wanted < seen + len(part))] - seen
        rows.append(numbers[here])
        vectors.append(part[here])
        seen += len(part)
    return np.concatenate(vectors), np.concatenate(rows)
