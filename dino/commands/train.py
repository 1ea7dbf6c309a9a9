"""Pre-train a vision backbone with DINO on a folder of unlabelled images.

    accelerate launch train/pretrain.py data.root=path/to/images run.dir=runs/mine
    accelerate launch train/pretrain.py --config configs/omniglot_cpu.yaml data.root=omniglot.zip train.epochs=5

The run leaves RUN/backbone.safetensors, metrics.jsonl, report.html and checkpoints. Started again by the same command,
it goes on where it stopped.
"""

import argparse
from contextlib import closing

from dino.config import read as configuration
from dino.config.auto import Pool, keep_resolved, resolve
from dino.data import estimated_bytes, fingerprint, open_images, samples_per_epoch
from dino.distributed import local_processes
from dino.methods.distill import follow_guide
from dino.methods.ema import synchronise_buffers
from dino.methods.network import Normalise, build_networks
from dino.monitor.health import Health
from dino.report.run import Reporter
from dino.run import RunDirectory
from dino.training import faults, launch
from dino.training.artifacts import write_backbone
from dino.training.checkpoint import Checkpoints
from dino.training.initial import follow_weights
from dino.training.interrupt import Interrupt, Stop
from dino.training.loader import Batches
from dino.training.metrics import Metrics
from dino.training.optimizer import build_optimizer
from dino.training.rebalancing import Draws
from dino.training.schedules import schedules
from dino.training.sharding import whole_backbone
from dino.training.step import Step
from dino.training.summary import summary
from dino.training.targets import Targets


def main() -> None:
    arguments = parse()
    config = configuration.load(arguments.config, arguments.settings)
    accelerator = launch.start(config)
    config.train.precision = launch.precision_of(accelerator)
    directory = RunDirectory(config.run.dir)
    earlier = directory.earlier_config(config.train.resume)
    found = directory.starting_point(config.train.resume)

    # Weights to start from, data, and the settings that depend on them.
    config, initial, reasons = follow_weights(config, earlier if found else None)
    config, guide, decided = follow_guide(config)
    reasons |= decided
    images = open_images(config.data.root, config.data.kind, config.data.channels)
    pool = Pool(samples_per_epoch(images), images.channels, images.kind, estimated_bytes(images))
    config, resolved = resolve(keep_resolved(config, earlier) if earlier else config, pool, local_processes())
    reasons |= resolved
    if earlier:
        directory.refuse_other_config(config, earlier)
    steps = int(config.train.steps)

    # Student, teacher, objective, optimizer.
    launch.set_threads_and_seed(config)
    student, teacher = launch.place(accelerator, build_networks(config, initial), config.train)
    targets = Targets(config).to(accelerator.device)
    normalise = Normalise(config.views.mean, config.views.std).to(accelerator.device)
    optimizer = build_optimizer(student, config.optim)
    modules = {"student": student, "teacher": teacher, "targets": targets}
    draws = Draws(config, images, accelerator)
    if config.data.rebalance_every:
        modules["draws"] = draws
    frozen = None if guide is None else guide.network(config, images, accelerator.device)
    checkpoints = Checkpoints(directory.checkpoints, accelerator, modules, optimizer, config.train.keep_checkpoints)
    wrapped, prepared = launch.prepare(accelerator, student, optimizer)
    plan = schedules(config)
    take_step = Step(accelerator, config, wrapped, teacher, targets, prepared, normalise, plan, frozen)

    # Where to begin.
    launch.seed_process(config.train.seed, accelerator.process_index)
    facts = {"images": fingerprint(images), "guide": guide.digest if guide else ""}
    start = 0
    if found:
        state = checkpoints.load(found)
        faults.refuse_other_images(state["images"], facts["images"], found)
        faults.refuse_other_guide(state.get("guide", facts["guide"]), facts["guide"], config.objective.distill, found)
        start = state["step"]
    accelerator.print(summary(config, pool, student, accelerator, directory, start, reasons))
    if arguments.dry_run:
        faults.rehearse(take_step, Batches(config, images, accelerator, start, start + 2, None), accelerator)
        return
    interrupt = Interrupt(accelerator, config.train.time_limit)
    result = whole_backbone(teacher, accelerator)
    if accelerator.is_main_process:
        directory.prepare(config, start)
        if start >= steps:  # killed before the last checkpoint's backbone was written?
            write_backbone(directory, config, result, start, facts["images"])
    accelerator.wait_for_everyone()

    # The run.
    batches = Batches(config, images, accelerator, start, steps, directory)
    draws.steer(batches.stream, start)
    stop = Stop.NO
    health = Health(accelerator, config, images.labels, start)
    reporter = Reporter(directory, config, images, accelerator.is_main_process)
    taken, width = start, student.backbone.embed_dim
    with Metrics(accelerator, config, directory, width, start) as metrics, closing(metrics.timing(batches)) as timed:
        if initial is not None and not start:
            metrics.begin(health.of_start(take_step, batches))
        for step, micro_batches in enumerate(timed, start):
            metrics.add(take_step(step, micro_batches))
            health.observe(take_step.teacher_output, batches.indices(step))
            taken = step + 1
            logs = taken % config.monitor.log_every == 0 or taken == steps
            saves = taken % int(config.train.checkpoint_every) == 0 or taken == steps
            stop = interrupt.asked(batches.too_many_unreadable, together=logs)
            if logs or saves or stop or draws.are_due(taken):
                faults.raise_if_broken(take_step, batches, directory)
            if draws.are_due(taken):
                metrics.note(draws.renew(teacher, taken))
                draws.steer(batches.stream, taken)
            if logs:
                epoch = taken * config.train.batch_size / pool.images
                metrics.log(taken, epoch, plan.at(step), health)
                if reporter.is_due():
                    metrics.show(taken, reporter.write(result, "running", alive=True))
            if stop == Stop.UNREADABLE:
                raise batches.unreadable_error()
            if saves or stop:
                synchronise_buffers(teacher)
                checkpoints.save(taken, facts)
                result = whole_backbone(teacher, accelerator)
                if accelerator.is_main_process:
                    write_backbone(directory, config, result, taken, facts["images"])
            if stop:
                break
        metrics.show(taken, reporter.write(result, stop.state, alive=False))
    accelerator.print(stop.farewell(directory.path))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings, in YAML as groups and keys or as key=value:\n" + configuration.describe(),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, for example one of configs/")
    parser.add_argument("--dry-run", action="store_true", help="check everything, take two steps, write nothing")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings that take precedence over the file's"
    )
    return parser.parse_intermixed_args()
