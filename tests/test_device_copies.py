"""Copies of batches to a GPU: memory of feeders is pinned, and a buffer is not written over before it was read."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

from pipeline.engine.device_copies import DeviceCopies
from pipeline.images.pool.processes import Abandoned, nameless_file
from pipeline.images.pool.shared_memory import shared


@pytest.mark.gpu
def test_batches_in_shared_memory_are_pinned_and_copied_in_turn() -> None:
    shape, running = (3, 64, 96, 96, 3), threading.Event()
    with nameless_file(lasting=True) as file:
        os.ftruncate(file.fileno(), int(np.prod(shape)))
        memory = shared(file.fileno(), int(np.prod(shape))).reshape(shape)
        copies = DeviceCopies(shape[1:], 2, torch.device("cuda", 0))
        copies.pin(memory)
        assert torch.from_numpy(memory).is_pinned()
        sums = []
        for number in range(20):
            memory[number % 3] = number
            slot, pixels = copies.copy(torch.from_numpy(memory[number % 3]), running)
            # Read behind a pause, in which the next batches would come.
            torch.cuda._sleep(5_000_000)
            sums.append(pixels.double().mean())
            copies.release(slot)
        assert [float(each) for each in sums] == list(range(20))
        taken = [copies.copy(torch.from_numpy(memory[0]), running)[0] for _ in range(2)]
        assert sorted(taken) == [0, 1]
        running.set()
        with pytest.raises(Abandoned):
            copies.copy(torch.from_numpy(memory[0]), running)
        copies.close()
        assert not torch.from_numpy(memory).is_pinned()
