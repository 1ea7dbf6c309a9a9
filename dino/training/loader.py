"""Batches of views for one process, from any step on."""

import signal
from collections.abc import Generator, Iterator
from contextlib import closing

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dino.config.schema import Config
from dino.data import EpochStream, MicroBatches, Pool, ResidentImages, samples_per_epoch
from dino.errors import UserError
from dino.run import RunDirectory
from dino.training.phases import spans
from dino.training.skipped import Skipped
from dino.views import DeviceViews, MultiCrop, ViewsDataset, collate, view_spec
from dino.views.draws import sample_key


class Batches:
    """The micro-batches of each optimizer step of this process, and a record of images that cannot be read.

    Views are made in one of two ways, by `data.cache`: on the device from images that are there; or by workers that
    decode and crop, with the rest on the device.

    Args:
        start: first step; the batches are those that an uninterrupted run has from there on.
        stop: step before which to end.
        directory: where unreadable images are listed; None: nowhere.

    Attributes:
        stream: which images make up each step; sampling weights may be changed in it.
    """

    def __init__(
        self,
        config: Config,
        images: Pool,
        accelerator: Accelerator,
        start: int,
        stop: int,
        directory: RunDirectory | None,
    ):
        self.config, self.images, self.start, self.stop = config, images, start, stop
        self.device = accelerator.device
        self.process, self.processes = accelerator.process_index, accelerator.num_processes
        self.stream = EpochStream(
            len(images.names),
            config.train.batch_size,
            config.train.seed,
            images.weights,
            samples_per_epoch(images),
            images.shards if config.data.order == "shards" else None,
            config.data.window,
        )
        self.skipped = Skipped(images, config.data.max_unreadable, directory, accelerator.is_main_process)
        self.resident = None
        if config.data.cache == "device":
            self.resident = ResidentImages(images, self.device, show_progress=accelerator.is_main_process)
            self.skipped.note(self.resident.unreadable)
            if self.skipped.are_too_many():
                raise self.skipped.error()

    def __iter__(self) -> Iterator[list[list[Tensor]]]:
        """For each step, its micro-batches, each a list of crops by size."""
        return self.between(self.start, self.stop)

    def between(self, first: int, end: int) -> Generator[list[list[Tensor]], None, None]:
        """The same of steps `first` to `end` − 1."""
        every = self.config.data.rebalance_every
        for span in spans(self.config):
            start, stop = max(first, span.start), min(end, span.stop)
            while start < stop:
                # Not beyond where sampling weights may change: workers are ahead of the steps.
                boundary = min(stop, (start // every + 1) * every) if every else stop
                yield from self._alike(self._positions(start, boundary), view_spec(span.views))
                start = boundary

    def _positions(self, start: int, stop: int) -> MicroBatches:
        return MicroBatches(self.stream, start, stop, self.process, self.processes, self.config.train.accumulation)

    def _alike(self, positions: MicroBatches, spec: MultiCrop) -> Iterator[list[list[Tensor]]]:
        """Steps whose views are all alike."""
        views = self._from_workers(positions, spec) if self.resident is None else self._from_device(positions, spec)
        micro_batches = []
        with closing(ahead(views, self.device)) as batches:
            for batch in batches:
                micro_batches.append(batch)
                if len(micro_batches) == self.config.train.accumulation:
                    yield micro_batches
                    micro_batches = []

    def _from_device(self, positions: MicroBatches, spec: MultiCrop) -> Generator[list[Tensor], None, None]:
        assert self.resident is not None
        views = DeviceViews(spec)
        for batch in positions:
            keys = np.array([sample_key(self.config.train.seed, *position) for position in batch], dtype=np.uint64)
            crops = views.crop(self.resident.gather([index for _, index in batch]), keys)
            yield views.photometric(crops, keys)

    def _from_workers(self, positions: MicroBatches, spec: MultiCrop) -> Generator[list[Tensor], None, None]:
        iterator, views = iter(self._loader(positions, spec)), DeviceViews(spec)
        try:
            for batch in iterator:
                if batch.unreadable:
                    raise UserError(f"{self.config.data.root}: {batch.unreadable}")
                self.skipped.note(batch.skipped)
                crops = [crop.to(self.device, non_blocking=True) for crop in batch.crops]
                yield views.photometric(crops, batch.keys)
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # its socket is gone before PyTorch noticed
            raise RuntimeError(
                "a worker process died while it handed over a batch, usually because memory ran out: "
                "lower data.workers or train.batch_size, and start the same command again"
            ) from error
        finally:
            # Here and now: what is left to the interpreter's exit waits for workers that ignore its SIGTERM.
            if isinstance(iterator, _MultiProcessingDataLoaderIter):
                iterator._shutdown_workers()

    def _loader(self, positions: MicroBatches, spec: MultiCrop) -> DataLoader:
        config, workers = self.config, self.config.data.workers
        return DataLoader(
            ViewsDataset(self.images, spec, config.train.seed),
            batch_sampler=positions,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=max(4, 2 * config.train.accumulation) if workers else None,
            worker_init_fn=_leave_interrupts_to_the_main_process,
            generator=torch.Generator(),  # its own, so that starting workers draws nothing from the run's random state
        )

    def indices(self, step: int) -> list[int]:
        """This process's images of a step, micro-batch by micro-batch."""
        return [index for batch in self._positions(step, step + 1) for _, index in batch]

    def names(self, step: int) -> list[str]:
        """The images of a step's global batch."""
        return [self.images.names[index] for _, index in self.stream.batch(step)]


def ahead(views: Generator[list[Tensor], None, None], device: torch.device) -> Generator[list[Tensor], None, None]:
    """The same views; on a GPU made on a stream of their own, a micro-batch ahead of the step that takes them."""
    with closing(views):
        if device.type != "cuda":
            yield from views
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # resident images may still be on their way
        batch, ready = _next_on(stream, views)
        while batch is not None:
            following = _next_on(stream, views)
            step = torch.cuda.current_stream(device)
            step.wait_event(ready)
            for crops in batch:
                crops.record_stream(step)  # whose memory is not to be used again before the step is done with it
            yield batch
            batch, ready = following


def _next_on(stream: torch.cuda.Stream, views: Iterator[list[Tensor]]) -> tuple[list[Tensor] | None, torch.cuda.Event]:
    with torch.cuda.stream(stream):
        return next(views, None), stream.record_event()


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    """Ctrl-C reaches the whole process group; workers must live until the main process has saved its checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
