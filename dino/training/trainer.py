"""A run's parts, and the loop that takes its steps."""

from contextlib import closing
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dino.config.schema import Config
from dino.data import Pool, fingerprint, samples_per_epoch
from dino.data.identity import facts as image_facts
from dino.methods import METHODS, Outside
from dino.methods.ema import synchronise_buffers
from dino.models import Backbone
from dino.monitor.health import QUEUE, Health, distinct_images
from dino.report.run import Reporter
from dino.run import RunDirectory
from dino.training import faults, launch, resume
from dino.training.backbone_file import described, training_facts, write_backbone
from dino.training.best import Best
from dino.training.checkpoint import SAMPLING_WEIGHTS, Checkpoints
from dino.training.interrupt import Interrupt, Stop
from dino.training.loader import Batches
from dino.training.metrics import Metrics
from dino.training.normalise import Normalise
from dino.training.optimizer import build_optimizer
from dino.training.rebalancing import Rebalancer
from dino.training.rehearsal import rehearse
from dino.training.rescue import is_gone, save_elsewhere
from dino.training.schedules import optimizer_schedules
from dino.training.sharding import whole_backbone
from dino.training.step import Step


class Trainer:
    """Method, optimizer, checkpoints and what else takes part in every step, on this process's device.

    Args:
        config: resolved.
        initial: the backbone that the student begins with; None: random weights.
        outside: weights besides the student's own that the method learns from.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        directory: RunDirectory,
        images: Pool,
        initial: Backbone | None = None,
        outside: Outside | None = None,
    ):
        self.config, self.accelerator, self.directory, self.images = config, accelerator, directory, images
        self.method = METHODS[config.objective.name](config, initial, outside)
        launch.place(accelerator, self.method, config.train)
        self.optimizer = build_optimizer(self.method.student, config.optim)
        self.method.prepare(images, accelerator.device)
        self.rebalancer = Rebalancer(config, images, accelerator)
        modules = self.method.state()
        if config.data.rebalance_every:
            modules[SAMPLING_WEIGHTS] = self.rebalancer
        self.health = Health(accelerator, config, self.method, images.labels)
        keep, own = config.train.keep_checkpoints, {"health": self.health}
        self.checkpoints = Checkpoints(directory.checkpoints, accelerator, modules, self.optimizer, keep, own)
        self.checkpoints.descriptions = described(config, modules)
        # Of their files too only where facts are written and compared: looking at a million takes its time.
        is_main, with_content = accelerator.is_main_process, config.data.verify == "content"
        self.images_facts = image_facts(images, with_content) if is_main else {"images": fingerprint(images)}
        settings = {"settings": resume.settings_of(config)}
        self.facts = {**self.images_facts, **self.method.checkpoint_facts(), **settings}
        self.schedules = optimizer_schedules(config)
        normalise = Normalise(config.views.mean or (), config.views.std or ()).to(accelerator.device)
        prepared = launch.prepare(accelerator, self.method, self.optimizer)
        self.take_step = Step(accelerator, config, self.method, prepared, normalise, self.schedules)
        launch.seed_process(config.train.seed, accelerator.process_index)

    def restore(self, checkpoint: Path | None) -> int:
        """Put the state of a checkpoint back; returns the step to go on from.

        Raises:
            UserError: damaged, or made with other images or weights.
        """
        if checkpoint is None:
            return 0
        state = self.checkpoints.load(checkpoint)
        resume.refuse_edited_config(self.directory, self.config, state, checkpoint)
        resume.refuse_other_images(state, self.images_facts, checkpoint)
        self.facts["images"] = state.get("images", self.facts["images"])  # as they were called, wherever they lie now
        if "content" in state:  # not lost where a start in between does not look
            self.facts.setdefault("content", state["content"])
        self.method.check_state(state, checkpoint)
        self.health.measured = state.get("measured", state["step"])  # earlier versions wrote neither
        self.health.views = state.get("views", 0)
        return state["step"]

    def rehearse(self, start: int) -> None:
        """Check images, memory and time by taking some steps; nothing is written."""
        batches = Batches(self.config, self.images, self.accelerator, start, self.config.train.steps, directory=None)
        rehearse(self.take_step, batches, self.accelerator)

    def run(self, start: int, is_continued: bool) -> Stop:
        """Train from step `start` to the end, or until something asks to stop; gives the reason.

        Args:
            is_continued: the student began with trained weights: how good these are is measured first.
        """
        config, accelerator, directory = self.config, self.accelerator, self.directory
        self._prepare_directory(start)
        batches = Batches(config, self.images, accelerator, start, config.train.steps, directory)
        self.rebalancer.steer(batches.stream, start)
        self.health.distinct = distinct_images(self.images) if accelerator.is_main_process else 1.0
        reporter = Reporter(directory, config, self.images, accelerator.is_main_process)
        backbone = whole_backbone(self.method.result, accelerator)
        width, best = self.method.student.backbone.embed_dim, Best(directory, config.train.keep_best)
        steps, stop = start, Stop.NO
        with (
            Interrupt(accelerator, config.train.time_limit, start + 1) as interrupt,
            Metrics(accelerator, config, directory, width, start) as metrics,
            closing(metrics.timing(batches)) as micro_batches_by_step,
        ):
            if is_continued and start == 0:
                metrics.begin(self._first_look(batches))
            for step, micro_batches in enumerate(micro_batches_by_step, start):
                metrics.add(self.take_step(step, micro_batches))
                self.health.observe(batches.indices(step))
                steps = step + 1
                logs = steps % config.monitor.log_every == 0 or steps == config.train.steps
                saves = steps % config.train.checkpoint_every == 0 or steps == config.train.steps
                rebalances = self.rebalancer.is_due(steps)
                too_many, gone = logs and batches.skipped.are_too_many(), (logs or saves) and is_gone(directory)
                stop = interrupt.reason(too_many, logs or saves, gone)
                interrupt.step = min(steps + 1, config.train.steps)
                if stop == Stop.GONE:
                    raise save_elsewhere(directory, config, steps, self._save, accelerator.is_main_process)
                if logs or saves or stop or rebalances:
                    faults.raise_if_broken(self.take_step, batches, directory)
                if rebalances:
                    metrics.note(self.rebalancer.update(self.method.result, steps))
                    self.rebalancer.steer(batches.stream, steps)
                if logs:
                    line = metrics.log(steps, self._epoch(steps), self._rates(step), self.health)
                    if best.is_beaten_by(line, self.health.names()):
                        self._keep(best, line)
                    if reporter.is_due():
                        metrics.show(steps, reporter.write(backbone, "running", alive=True))
                if stop == Stop.UNREADABLE:
                    raise batches.skipped.error()
                if saves or stop:
                    backbone = self._save(steps)
                if stop:
                    break
            metrics.show(steps, reporter.write(backbone, stop.state, alive=False))
            if stop == Stop.NO:
                metrics.hand_over(training_facts(config, steps, self.facts["images"]))
        return stop

    def _prepare_directory(self, start: int) -> None:
        result = whole_backbone(self.method.result, self.accelerator)
        if self.accelerator.is_main_process:
            resume.prepare(self.directory, self.config, start)
            if start >= self.config.train.steps:  # killed before the last checkpoint's backbone was written?
                write_backbone(self.directory.path, self.config, result, start, self.facts["images"])
        self.accelerator.wait_for_everyone()

    def _first_look(self, batches: Batches) -> dict[str, float]:
        """Indicators of weights that are trained already, before the first step; nothing is learned."""
        count = -(-QUEUE // max(1, len(batches.indices(batches.start))))
        first = batches.start
        for step, micro_batches in enumerate(batches.between(first, min(batches.stop, first + count)), first):
            self.take_step.look(step, micro_batches)
            self.health.observe(batches.indices(step))
        return self.health.measure(0)

    def _save(self, steps: int, elsewhere: RunDirectory | None = None) -> Backbone:
        """A checkpoint and the result's backbone after so many steps, in the run's directory or elsewhere."""
        directory = elsewhere or self.directory
        synchronise_buffers(self.method.result)
        watched = {"measured": self.health.measured, "views": self.health.views}
        self.checkpoints.save(steps, self.facts | watched, directory.checkpoints)
        backbone = whole_backbone(self.method.result, self.accelerator)
        if self.accelerator.is_main_process:
            write_backbone(directory.path, self.config, backbone, steps, self.facts["images"])
        return backbone

    def _keep(self, best: Best, line: dict[str, Any]) -> None:
        """Put the result's backbone aside, and what it was best at."""
        backbone = whole_backbone(self.method.result, self.accelerator)
        if self.accelerator.is_main_process:
            write_backbone(best.folder, self.config, backbone, line["step"], self.facts["images"])
        best.record(line)

    def _epoch(self, steps: int) -> float:
        return steps * self.config.train.batch_size / samples_per_epoch(self.images)

    def _rates(self, step: int) -> dict[str, float]:
        """What schedules gave this step, by the names of the metrics."""
        schedules = self.schedules | self.method.schedules
        return {name: schedule(step) for name, schedule in schedules.items()}
