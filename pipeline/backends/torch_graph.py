"""Work on tensors of static shapes as one CUDA graph: captured once, then replayed with one launch for each batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

import torch

from pipeline.backends.devices import out_of_memory
from pipeline.core.errors import BackendUnavailable, NumericalError

Tensors: TypeAlias = tuple[torch.Tensor, ...]
Work: TypeAlias = Callable[..., Tensors]
# Captures work on static inputs: a function that does it again, and the tensors that its results lie in.
Capture: TypeAlias = Callable[[Work, Tensors], tuple[Callable[[], None], Tensors]]
# Calls on the stream of the capture before it, in which libraries choose their kernels and allocate their workspaces.
WARM_UP = 2
# Deviation of a replayed result from the one of the same kernels that are launched one by one.
TOLERANCE = 1e-3
# CUDA captures one graph at a time in a process.
_capturing = threading.Lock()


class Replay:
    """Work that is captured at the shapes of ``example``, and replayed with other values.

    Each call copies its inputs to where the graph reads them. One graph for each buffer of the loader would save this
    copy, which takes 0.1 of the 35 ms of a batch of 1,024 (an estimate for an H100), and cost a capture for each.

    Args:
        work: takes tensors and returns tensors, whose shapes follow from those of the inputs; it neither waits for the
            device nor reads a value. What it uses besides its inputs must stay where it is as long as this object.
        example: inputs, with which the captured work is compared with the work itself.
        capture: by default :func:`cuda_graph`.

    Raises:
        BackendUnavailable: the work cannot be captured.
        NumericalError: the captured work gives another result.
    """

    @torch.inference_mode()
    def __init__(self, work: Work, example: Tensors, capture: Capture | None = None) -> None:
        self._inputs = tuple(given.clone() for given in example)
        # Before the capture, beside whose memory there may be no room for this.
        wanted = tuple(result.clone() for result in work(*self._inputs))
        self._replay, self._results = (capture or cuda_graph)(work, self._inputs)
        self._replay()
        for result, other in zip(self._results, wanted, strict=True):
            if not torch.allclose(result.double(), other.double(), rtol=0, atol=TOLERANCE, equal_nan=True):
                raise NumericalError(
                    "the captured CUDA graph gives another result than the same work without it: take "
                    "backend.cuda_graph=false, and report this"
                )

    @torch.inference_mode()
    def __call__(self, *inputs: torch.Tensor) -> Tensors:
        """Results for ``inputs``; the next call writes over them.

        Raises:
            ValueError: an input has another shape or type than that of the example.
        """
        for given, static in zip(inputs, self._inputs, strict=True):
            if given.shape != static.shape or given.dtype != static.dtype:
                raise ValueError(
                    f"a CUDA graph for {static.dtype} {tuple(static.shape)} got {given.dtype} {tuple(given.shape)}"
                )
            static.copy_(given)
        self._replay()
        return self._results


def cuda_graph(work: Work, inputs: Tensors) -> tuple[Callable[[], None], Tensors]:
    """Capture ``work`` on ``inputs`` as a CUDA graph; other threads may go on using the device.

    Raises:
        BackendUnavailable: the work cannot be captured.
        torch.OutOfMemoryError: the device has no memory for it.
    """
    device = inputs[0].device
    graph = torch.cuda.CUDAGraph()
    failed: Exception | None = None
    with _capturing:
        # Warmed up on the stream of the capture: a workspace belongs to a stream, and should not come from the memory
        # of the graph.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        # Also around the capture, which does not restore the stream where it fails.
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                work(*inputs)
            try:
                # In the mode that is the default, what other threads allocate meanwhile would break the capture.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    try:
                        results = work(*inputs)
                    except Exception as error:
                        failed = error
                        raise
            except Exception as error:
                # Of work that failed, the end of the capture may hide the reason.
                reason = failed or error
                if out_of_memory(reason):
                    raise reason from None
                words = (str(reason).splitlines() or [type(reason).__name__])[0]
                raise BackendUnavailable(
                    f"this model cannot be captured as a CUDA graph on {torch.cuda.get_device_name(device)} "
                    f"({words}): take backend.cuda_graph=false, or a smaller "
                    "loader.batch_size if its memory is nearly full"
                ) from reason
        torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay, results
