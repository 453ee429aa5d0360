"""From a reference to pixels: read here, decoded in a process that may crash, or in this one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from pipeline.core.failpoints import failpoint
from pipeline.core.records import Failure, ImageRef, Pixels, PreprocessSpec, Stage
from pipeline.images.decode import EXACT, Decoder
from pipeline.images.pool.pool import Decoders, GiveBack
from pipeline.images.pool.processes import Abandoned, never
from pipeline.images.pool.protocol import CHUNK
from pipeline.images.sources.source import Source
from pipeline.images.sources.spans import Member

if TYPE_CHECKING:
    from pipeline.images.gpu.decoder import NvidiaDecoder

# Encoded bytes that are read before they are decoded: a request of photos, but not of files of images.max_bytes.
HELD = 32 * 2**20
Timer = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class PixelReader:
    """From references to pixels, or to the failures that stopped them; safe to use from many threads.

    Without ``decoders`` it decodes in the thread that calls. What ``gpu`` takes, it decodes there. Use it as a context
    manager: it closes its decoders, unless they are ``shared``.
    """

    source: Source
    decoder: Decoder
    spec: PreprocessSpec
    decoders: Decoders | None = None
    gpu: NvidiaDecoder | None = None
    shared: bool = False

    def __enter__(self) -> PixelReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the decoder processes, unless another reader has them."""
        if self.decoders is not None and not self.shared:
            self.decoders.close()

    @property
    def chunk(self) -> int:
        """Number of images that are read together."""
        return CHUNK if self.gpu is None else self.gpu.chunk

    def exact(self) -> PixelReader:
        """The same by the decoder ``exact``, with which the others are compared, in the same processes."""
        return replace(self, decoder=replace(self.decoder, kind=EXACT), gpu=None, shared=True)

    def by(self, kind: str, *, spec: PreprocessSpec | None = None) -> PixelReader:
        """The same by another decoder of the CPU, for pixels of another size if ``spec`` is given; close it too."""
        decoder = replace(self.decoder, kind=kind)
        decoders = None if self.decoders is None else self.decoders.like(decoder)
        return replace(self, decoder=decoder, decoders=decoders, gpu=None, shared=False, spec=spec or self.spec)

    def read(self, ref: ImageRef) -> Pixels | Failure:
        """Read, decode and preprocess one image."""
        [result] = self.read_all([ref], lambda stage, seconds: None)
        assert result is not None
        return result

    def read_all(
        self,
        refs: Sequence[ImageRef],
        timer: Timer,
        abandoned: Callable[[], bool] = never,
        known: Callable[[int, bytes], bool] | None = None,
        give_back: list[GiveBack] | None = None,
    ) -> list[Pixels | Failure | None]:
        """The same for several images, one result for each; never raises for a bad image.

        ``timer`` gets the seconds of reading and of decoding, the wait for a decoder included. ``known`` may say of an
        image's bytes, by its place in ``refs``, that they need not be decoded; its result is None. With ``give_back``,
        pixels may lie in memory of the decoders, see :meth:`Decoders.decode`.

        Raises:
            StorageError: images cannot be read, and it is no fault of theirs.
            DecoderUnavailable: no decoder process can be started, or the machine kills them.
            Abandoned: ``abandoned``, which is called often, became true.
        """
        results: list[Pixels | Failure | None] = [None] * len(refs)
        positions: list[int] = []
        encoded: list[bytes] = []
        held, started = 0, time.perf_counter()
        decode = partial(self._decode, timer=timer, abandoned=abandoned, give_back=give_back)
        for position, ref in enumerate(refs):
            if abandoned():
                raise Abandoned
            failpoint("read")
            data = ref.read(self.source) if isinstance(ref, Member) else self.source.read(ref)
            if isinstance(data, Failure):
                results[position] = data
            elif known is None or not known(position, data):
                positions.append(position)
                encoded.append(data)
                held += len(data)
            del data
            alone = self.decoders is None and self.gpu is None
            full = alone or len(encoded) == self.chunk or held >= HELD
            if (encoded and full) or position == len(refs) - 1:
                timer(Stage.READ, time.perf_counter() - started)
                if encoded:
                    for decoded, result in zip(positions, decode(encoded), strict=True):
                        results[decoded] = result
                positions, encoded, held, started = [], [], 0, time.perf_counter()
        return results

    def memory(self) -> dict[str, float]:
        """For the report: peak resident memory of the largest decoder process, in MiB."""
        peak = self.decoders.peak_rss() if self.decoders is not None else 0
        return {"peak_decoder_mib": round(peak / 2**20, 1)} if peak else {}

    def _decode(
        self,
        encoded: list[bytes],
        timer: Timer,
        abandoned: Callable[[], bool],
        give_back: list[GiveBack] | None,
    ) -> list[Pixels | Failure]:
        started = time.perf_counter()
        for data in encoded:
            failpoint("decode", data)
        if self.gpu is None:
            results = self._by_cpu(encoded, abandoned, give_back)
        else:
            there = self.gpu.decode(encoded)
            left = [data for data, rgb in zip(encoded, there, strict=True) if rgb is None]
            here = iter(self._by_cpu(left, abandoned, give_back))
            results = [next(here) if rgb is None else Pixels(rgb=rgb) for rgb in there]
        timer(Stage.DECODE, time.perf_counter() - started)
        for _ in results:
            failpoint("decoded")
        return results

    def _by_cpu(
        self, encoded: list[bytes], abandoned: Callable[[], bool], give_back: list[GiveBack] | None
    ) -> list[Pixels | Failure]:
        if self.decoders is None:
            return [self.decoder.pixels(data, self.spec) for data in encoded]
        results: list[Pixels | Failure] = []
        while encoded:
            some = encoded[:CHUNK]
            # Taken out, so that their memory is free once they are handed over.
            del encoded[:CHUNK]
            results += self.decoders.decode(some, self.spec, abandoned, give_back, exact=self.decoder.kind == EXACT)
        return results
