"""Batches of views for one process, from any step on."""

import copy
import signal
from collections.abc import Generator, Iterator
from contextlib import closing

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dino.config.read import Config
from dino.config.schema import ViewsConfig
from dino.data import EpochStream, Images, MicroBatches, ResidentImages, UnreadableImage, samples_per_epoch
from dino.errors import UserError
from dino.run import RunDirectory
from dino.training.phases import stretches
from dino.views import DeviceViews, MultiCrop, ViewsDataset, collate, multi_crop
from dino.views.draws import sample_key


def view_spec(views: ViewsConfig) -> MultiCrop:
    """The views that a config's `views` describe."""
    return multi_crop(
        views.preset,
        views.global_size,
        (views.global_scale[0], views.global_scale[1]),
        views.local_size,
        (views.local_scale[0], views.local_scale[1]),
        views.local_crops,
        views.inverted_blur,
        views.affine,
        views.stroke,
    )


class Batches:
    """The micro-batches of each optimizer step of this process, and a record of images that cannot be read.

    Views are made in one of three ways, by `data.cache` and `views.backend`: on the device from images that are there;
    by workers that decode and cut, with the rest on the device; or by workers alone.

    Args:
        start: first step; the batches are those that an uninterrupted run has from there on.
        stop: step before which to end.
        directory: where unreadable images are listed; None: nowhere.
    """

    def __init__(
        self,
        config: Config,
        images: Images,
        accelerator: Accelerator,
        start: int,
        stop: int,
        directory: RunDirectory | None,
    ):
        self.config, self.images, self.directory = config, images, directory
        self.start, self.stop = start, stop
        self.stream = EpochStream(
            len(images.names), config.train.batch_size, config.train.seed, images.weights, samples_per_epoch(images)
        )
        self.process, self.processes, self.device = (
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.device,
        )
        listed = {} if directory is None else directory.read_skipped()
        self.skipped = self._still_unreadable(listed)
        if directory is not None and accelerator.is_main_process and self.skipped != listed:
            directory.write_skipped(list(self.skipped.items()))
        self.resident = None
        if config.data.cache == "device":
            self.resident = ResidentImages(images, self.device, show_progress=accelerator.is_main_process)
            self._note(self.resident.unreadable)
            if self.too_many_unreadable():
                raise self.unreadable_error()

    def __iter__(self) -> Iterator[list[list[Tensor]]]:
        """For each step, its micro-batches, each a list of crops by size."""
        every = int(self.config.data.rebalance_every)
        for stretch in stretches(self.config):
            start, stop = max(self.start, stretch.start), min(self.stop, stretch.stop)
            while start < stop:
                # Not beyond where the draws may change: workers are ahead of the steps.
                end = min(stop, (start // every + 1) * every) if every else stop
                yield from self._stretch(self._positions(start, end), view_spec(stretch.views))
                start = end

    def first(self, steps: int) -> Iterator[tuple[int, list[list[Tensor]]]]:
        """The first few of them with their steps, without taking them from the run."""
        few = copy.copy(self)
        few.stop = min(self.stop, self.start + steps)
        return enumerate(few, self.start)

    def _positions(self, start: int, stop: int) -> MicroBatches:
        return MicroBatches(self.stream, start, stop, self.process, self.processes, self.config.train.accumulation)

    def _stretch(self, positions: MicroBatches, spec: MultiCrop) -> Iterator[list[list[Tensor]]]:
        """Steps whose views are all alike."""
        made = self._from_workers(positions, spec) if self.resident is None else self._from_device(positions, spec)
        micro_batches = []
        with closing(made) as batches:
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
            crops = views.cut(self.resident.gather([index for _, index in batch]), keys)
            yield views.retouch(crops, keys)

    def _from_workers(self, positions: MicroBatches, spec: MultiCrop) -> Generator[list[Tensor], None, None]:
        iterator, views = iter(self._loader(positions, spec)), DeviceViews(spec)
        retouches = self.config.views.backend == "device"
        try:
            for batch in iterator:
                if batch.skipped:
                    self._note(batch.skipped)
                crops = [crop.to(self.device, non_blocking=True) for crop in batch.crops]
                yield views.retouch(crops, batch.keys) if retouches else crops
        except UnreadableImage as error:
            reason = str(error).strip().rsplit("\n", 1)[-1].removeprefix("dino.data.decode.UnreadableImage: ")
            raise UserError(f"{self.config.data.root}: {reason}") from error
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
        config, workers = self.config, int(self.config.data.workers)
        return DataLoader(
            ViewsDataset(self.images, spec, config.train.seed, finished=config.views.backend == "workers"),
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

    def too_many_unreadable(self) -> bool:
        """Whether more than `data.max_unreadable` of all images turned out unreadable, in any process."""
        if self.directory is not None and self.directory.skipped.exists():
            self.skipped.update(self.directory.read_skipped())
        return len(self.skipped) > self.config.data.max_unreadable * len(self.images.names)

    def unreadable_error(self) -> UserError:
        """What to tell the user then."""
        name, reason = next(iter(self.skipped.items()), ("one", "see skipped.txt"))
        share = len(self.skipped) / len(self.images.names)
        where = f"; all are listed in {self.directory.skipped}" if self.directory else ""
        return UserError(
            f"{len(self.skipped)} of {len(self.images.names):,} images ({share:.1%}) cannot be read, more than "
            f"data.max_unreadable={self.config.data.max_unreadable:g} allows, for example {name}: {reason}{where}. "
            "Mend or remove them, or raise data.max_unreadable"
        )

    def _still_unreadable(self, skipped: dict[str, str]) -> dict[str, str]:
        """Without images that were mended since an earlier start."""
        places = {name: index for index, name in enumerate(self.images.names)} if skipped else {}
        found = {}
        for name in filter(places.__contains__, skipped):
            try:
                self.images.read(places[name])
            except UnreadableImage as reason:
                found[name] = str(reason)
        return found

    def _note(self, entries: list[tuple[int, str]]) -> None:
        new = {self.images.names[index]: reason for index, reason in entries}
        new = {name: reason for name, reason in new.items() if name not in self.skipped}
        self.skipped.update(new)
        if new and self.directory is not None:
            self.directory.add_skipped(list(new.items()))


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    """Ctrl-C reaches the whole process group; workers must live until the main process has saved its checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
