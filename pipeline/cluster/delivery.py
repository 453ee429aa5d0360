"""Dask's plugin that hands an order to every worker process of a cluster, to those that join later too."""

from __future__ import annotations

from distributed import Worker, WorkerPlugin

from pipeline.cluster import resident
from pipeline.cluster.order import Order


class Delivery(WorkerPlugin):
    """Brings an order, and takes it back, with the model that was opened for it, where ``closes`` says so."""

    def __init__(self, order: Order, *, closes: bool) -> None:
        self.order, self.closes = order, closes

    def setup(self, worker: Worker) -> None:
        """Begin to open the model; returns at once."""
        resident.receive(worker, self.order)

    def teardown(self, worker: Worker) -> None:
        """The worker ends, or the job does."""
        if self.closes:
            resident.leave(self.order)
