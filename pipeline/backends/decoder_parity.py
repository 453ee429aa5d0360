"""The gate of the decoders: if a job decodes otherwise than ``exact``, some images are compared with the same ones
decoded exactly: all by their pixels, the furthest apart by their embeddings, by the encoder of the job or fp32."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from pipeline.backends.base import ImageEncoder
from pipeline.backends.compare import compare, in_words
from pipeline.backends.parity import Gate, embed_sample
from pipeline.config.schema import ParityConfig
from pipeline.core.errors import ParityError
from pipeline.core.records import Parity, Sample, TextBank

FILE = "_decoder_parity.json"
# Pictures that are decoded in both ways, and those of them, the furthest apart, that are embedded in both.
# Measured on 124 photos of 0.2 to 2 megapixels with the demo model: of 32 decoded by fast or scaled, one that was
# spoiled (channels swapped, moved by a pixel, brighter by eight levels, a corner lost) was among these eight in all of
# 4,551 draws in which it missed the limit. The others are 7 to 70 times nearer than the limit.
PICTURES, EMBEDDED = 32, 8
# Pictures of the first batches of a job that are enough, so that none are drawn beside them.
FEWEST = 2 * EMBEDDED
log = logging.getLogger(__name__)


def measure(encoder: ImageEncoder, sample: Sample, exact: Sample, bank: TextBank | None) -> Parity | None:
    """Compare up to ``PICTURES`` pictures that are in both samples, by their ids; None where no picture is.

    The figures are those of the ``EMBEDDED`` pictures whose pixels are furthest apart, and of all whose pixels are
    equal, which need no embedding.
    """
    places = {id: place for place, id in enumerate(exact.ids)}
    common = [(place, places[id]) for place, id in enumerate(sample.ids) if id in places]
    missing = len(sample.ids) + len(exact.ids) - 2 * len(common)
    if missing:
        log.warning("%d pictures of the sample could be read in one of two ways alone, and are not compared", missing)
    # Spread over the sample, as that is over the manifest.
    common = common[:: -(-len(common) // PICTURES) or 1]
    if not common:
        return None
    ids = tuple(sample.ids[place] for place, _ in common)
    ours = sample.pixels[[place for place, _ in common]]
    theirs = exact.pixels[[place for _, place in common]]
    apart = distances(ours, theirs)
    equal, order = apart == 0, apart.argsort(descending=True)
    differ = torch.zeros_like(equal)
    differ[order[:EMBEDDED]] = True
    differ &= ~equal
    # Any vector of length 1, as long as it is the same.
    vectors = torch.nn.functional.one_hot(torch.zeros(len(ids), dtype=torch.int64), encoder.dim).float()
    wanted = vectors.clone()
    if differ.any():
        chosen = tuple(id for id, other in zip(ids, differ.tolist(), strict=True) if other)
        if sample.vectors is not None and encoder.flexible:
            vectors[differ] = sample.vectors[[place for place, _ in common]][differ]
            wanted[differ] = embed_sample(encoder, Sample(ids=chosen, pixels=theirs[differ]), small=True)
        else:
            # Together: each alone would end in a batch that is not full, and in one of scales of its own.
            both = torch.cat([ours[differ], theirs[differ]])
            embedded = embed_sample(encoder, Sample(ids=chosen * 2, pixels=both), small=True)
            vectors[differ], wanted[differ] = embedded.chunk(2)
    known = differ | equal
    ids = tuple(id for id, other in zip(ids, known.tolist(), strict=True) if other)
    parity = compare(vectors[known], wanted[known], ids=ids, bank=bank)
    return parity if known.all() else replace(parity, screened=len(known))


def distances(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Distances of pictures, float32 ``[N]``: Euclidean ones of their pixels, divided by the contrast of ``theirs``.

    An embedding moves about in proportion to its pixels, and more if these are nearly alike.
    """
    wanted = theirs.flatten(1).float()
    apart: torch.Tensor = torch.linalg.vector_norm(ours.flatten(1).float() - wanted, dim=1)
    return apart / (wanted.std(dim=1) + 1)


def is_pending(encoder: ImageEncoder, decoder: str, gate: Gate) -> bool:
    """True if :func:`pass_gate` will have to measure: the output does not keep the figures of this job."""
    return decoder != "exact" and gate.recorded(FILE, encoder) is None


def pass_gate(
    encoder: ImageEncoder,
    decoder: str,
    sample: Callable[[], Sample | None],
    exact: Callable[[], Sample | None],
    gate: Gate,
) -> Parity | None:
    """The figures of ``images.decoder`` on this job: those that the output keeps, or measured now.

    None for ``exact``, with which the others are compared, and where there is nothing to compare.

    Args:
        encoder: the job's own, or fp32 on the same device.
        decoder: ``images.decoder``.
        sample: draws pictures of the job by this decoder; None where none that was tried can be read.
        exact: draws the same pictures by ``exact``; not called if the figures are known.
        gate: of the job.

    Raises:
        ParityError: the lowest cosine misses ``parity.decoder``.
    """
    if decoder == "exact":
        return None
    parity = gate.recorded(FILE, encoder)
    if parity is None:
        ours = sample()
        theirs = None if ours is None else exact()
        parity = None if ours is None or theirs is None else measure(encoder, ours, theirs, gate.bank)
        if parity is None:
            log.warning("images.decoder=%s is not compared with exact: no picture that was tried can be read", decoder)
            return None
        log.info("images.decoder=%s: %s", decoder, in_words(parity, than="exact"))
    hold(parity, decoder, gate.limits)
    return parity


def record(parity: Parity, encoder: ImageEncoder, gate: Gate) -> None:
    """Write the figures into the output, so that a resumed job finds them."""
    gate.record(FILE, encoder, parity)


def hold(parity: Parity, decoder: str, limits: ParityConfig) -> None:
    """Pass if the lowest cosine is at least the limit for ``decoder``.

    Raises:
        ParityError: with the figure, and the worst pictures.
    """
    wanted = limits.decoder[decoder]
    # Written so that NaN misses.
    if not parity.lowest_cosine >= wanted:
        worst = ", ".join(f"{id} ({cosine:.5f})" for id, cosine in parity.worst)
        raise ParityError(
            f"images.decoder={decoder} is too far from exact over {parity.images} images: parity.decoder.{decoder} "
            f"wants {wanted}, measured {parity.lowest_cosine:.6f}. The worst by cosine: {worst}. Take images=exact, or "
            "lower the limit if that is near enough for you"
        )
