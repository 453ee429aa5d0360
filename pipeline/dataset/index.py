"""A FAISS index for approximate search, stored in the dataset and valid for its current ``_SUCCESS`` only.

It is an inverted file (Jegou et al. 2011) with vectors in 16 bits. The number of lists to read per query is measured
when it is built: the smallest that gives the wanted recall.
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
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.search import Found, nearest, rescore, without
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import explained

FOLDER = "_index"
CARD = f"{FOLDER}/index.json"
VERSION = 1
# Lists: FAISS advises 4 * sqrt(rows), and warns below 39 training rows for each list.
LISTS, LEAST, TRAINED = 16_384, 39, 64
# Recall is measured on this many queries and neighbours, and must be at least RECALL.
QUERIES, NEIGHBOURS, RECALL = 200, 10, 0.95
# Candidates per result row; they are ranked by the stored embeddings.
WIDER = 4
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IndexCard:
    """Metadata of an index: the dataset, the settings, the file, and the recall against the exact search.

    ``recall`` is the share of the exact 10 nearest rows that were found, by kind of query: ``rows`` are embeddings of
    the dataset (each without itself), ``texts`` its labels. It was measured with ``lists_read`` of ``lists``.
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


def import_faiss(option: str) -> Any:
    """Import FAISS.

    Raises:
        ConfigError: it is not installed; the message names ``option``, which needs it.
    """
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
        dataset: the dataset to index.
        texts: returns embeddings of texts, ``[N, D]``, to measure recall with as well, or None.

    Raises:
        ConfigError: FAISS is not installed.
        ArtifactError: no row has an embedding.
    """
    faiss, began, count = import_faiss("--build-index"), time.time(), dataset.vectors
    if not count:
        raise ArtifactError(f"{dataset.url}: no row has an embedding, so there is nothing to index")
    lists = lists_for(count)
    index = faiss.index_factory(dataset.dim, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    log.info("%s: %d embeddings in %d lists", dataset.url, count, lists)
    index.train(spread(dataset, min(count, TRAINED * lists))[0])
    for numbers, vectors in _vectors(dataset):
        index.add_with_ids(vectors, numbers)
    queries, truths = _queries(dataset, texts)
    read, recall = _fewest_lists(index, lists, queries, truths)
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


def lists_for(vectors: int) -> int:
    """The number of lists of an inverted file over this many vectors."""
    return max(1, min(LISTS, int(4 * vectors**0.5), vectors // LEAST))


def read_card(dataset: Dataset) -> IndexCard:
    """Read the metadata of the dataset's index.

    Raises:
        ArtifactError: there is no index, or it was built for another state of the dataset.
    """
    build = f"python -m pipeline.search {dataset.url} --build-index"
    data = dataset.storage.read(CARD)
    if data is None:
        raise ArtifactError(f"{dataset.url}: has no index; {build} builds one; without --index the search is exact")
    try:
        card = IndexCard(**json.loads(data))
        fits = card.version == VERSION and dict(card.dataset) == dataset.fingerprint
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{dataset.url}/{CARD}: not readable ({error}); {build} rebuilds it") from error
    if not fits:
        raise ArtifactError(f"{dataset.url}: its index is of another state of the dataset; {build} rebuilds it")
    if dataset.storage.size(card.file) != card.size:
        raise ArtifactError(f"{dataset.url}/{card.file}: missing or torn; {build} rebuilds it")
    return card


def search_index(dataset: Dataset, query: NDArray[np.float32], count: int) -> Found:
    """The ``count`` nearest rows, approximately; scores and order are those of the stored embeddings.

    Raises:
        ArtifactError: there is no valid index.
        ConfigError: FAISS is not installed.
    """
    index = OpenedIndex.of(dataset)
    return rescore(dataset, index.search(query, min(index.card.vectors, WIDER * count)).rows, query, count)


@dataclass(frozen=True, slots=True)
class OpenedIndex:
    """The index of a dataset; a local one is memory-mapped, so that only the lists that a query needs are read."""

    card: IndexCard
    faiss: Any

    @classmethod
    def of(cls, dataset: Dataset) -> OpenedIndex:
        """Open it.

        Raises:
            ArtifactError, ConfigError: see :func:`search_index`.
        """
        faiss, card = import_faiss("--index"), read_card(dataset)
        index = _open(faiss, dataset, card)
        index.nprobe = card.lists_read
        return cls(card, index)

    def search(self, query: NDArray[np.float32], count: int) -> Found:
        """The ``count`` nearest rows, approximately; scores are of embeddings in 16 bits."""
        scores, rows = (found[0] for found in self.faiss.search(query[None], min(self.card.vectors, count)))
        return Found(rows[rows >= 0], scores[rows >= 0].astype(np.float64))


def _open(faiss: Any, dataset: Dataset, card: IndexCard) -> Any:
    storage = dataset.storage
    try:
        if isinstance(storage, LocalStorage):
            return faiss.read_index(str(storage.root / card.file), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        data = storage.read(card.file)
        if data is None:
            raise StorageError(f"{storage.url}/{card.file}: missing")
        return faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
    except (RuntimeError, MemoryError) as error:
        build = f"python -m pipeline.search {dataset.url} --build-index"
        raise ArtifactError(
            f"{storage.url}/{card.file}: FAISS cannot read it ({error}); {build} rebuilds it"
        ) from error


def _queries(
    dataset: Dataset, texts: Callable[[], NDArray[np.float32] | None]
) -> tuple[dict[str, NDArray[np.float32]], dict[str, list[Found]]]:
    """Queries to measure recall with, by kind, and their exact results."""
    rows, numbers = spread(dataset, min(dataset.vectors, QUERIES))
    queries = {"rows": rows}
    exact = nearest(dataset, rows, NEIGHBOURS + 1)
    truths = {"rows": [without(found, row, NEIGHBOURS) for found, row in zip(exact, numbers.tolist(), strict=True)]}
    try:
        vectors = texts()
    except ModelError as error:
        log.warning("recall is measured for rows alone: %s", error)
        vectors = None
    if vectors is not None and len(vectors):
        queries["texts"] = vectors[:: max(1, len(vectors) // QUERIES)][:QUERIES]
        truths["texts"] = nearest(dataset, queries["texts"], NEIGHBOURS)
    return queries, truths


def _fewest_lists(
    index: Any, lists: int, queries: Mapping[str, NDArray[np.float32]], truths: Mapping[str, list[Found]]
) -> tuple[int, dict[str, float]]:
    """The fewest lists, by powers of two, that give the wanted recall for every kind of query, and that recall."""
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
    for commit, table in zip(dataset.commits, dataset.stream([dataset.column]), strict=True):
        vectors, rows = dataset.form.load(table[dataset.column])
        yield rows + dataset.starts[commit.shard], np.ascontiguousarray(vectors)


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
