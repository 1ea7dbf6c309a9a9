"""Curate a pool of images, from Python or from the command line."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from dino.config import read as configuration
from dino.curation.pipeline import Curated, Surroundings, curate_pool
from dino.curation.settings import CurateConfig, check
from dino.curation.trial import described, planted_and_found, warning
from dino.data import Limits, Pool, open_images
from dino.data.manifest import is_manifest, read_manifest, write_manifest
from dino.data.sources.several import as_root, roots_of
from dino.data.sources.storage import is_remote
from dino.distributed import cores, forget_earlier_runs
from dino.errors import UserError
from dino.files import write_text
from dino.models import Backbone, load_backbone
from dino.report import curation as page
from dino.report import page as report_page
from dino.report.page import Picture
from dino.run import require_free_places
from dino.run_lock import LOCK, held
from dino.tracking import Table, Trackers, check_trackers

logger = logging.getLogger(__name__)


class Curation(NamedTuple):
    """A curation that is done.

    Attributes:
        manifest: what `dino.train` takes as its data; a row for each image with what became of it and why.
        report: a page of pictures and figures.
        images: in the pool.
        kept: images that are drawn.
        dropped: images that are not, by reason.
    """

    manifest: Path
    report: Path
    images: int
    kept: int
    dropped: dict[str, int]


def curate(
    data: str | Path | list, run: str | Path = "runs/curated", weights: str | Path = "", **settings: Any
) -> Curation:
    """Embed a pool of images, de-duplicate, cluster and rebalance it; a call that was stopped goes on where it was.

        curation = dino.curate("images", "runs/curated", weights="runs/mine", **{"clusters.spherical": False})
        dino.train(curation.manifest, "runs/better")

    Args:
        data: folder of images (searched recursively), an archive, a list, a manifest.parquet …; or a list of such.
        run: directory for the manifest and the report; empty, or of an earlier curation.
        weights: what embeds the images: a released name, a run directory or a file.
        settings: any other setting by its key; `dino curate --help` lists them.

    Raises:
        UserError: settings that cannot work, a directory that holds something else, or no image that can be used.
    """
    root = as_root([str(part) for part in data]) if isinstance(data, list | tuple) else str(data)
    given = {"data.root": root, "run.dir": str(run), "weights": str(weights)} | settings
    return curate_by(configuration.read(CurateConfig, None, given))


def curate_by(config: CurateConfig, report_only: bool = False) -> Curation:
    """Curate by settings, alone or as one of several processes, each of which must call this.

    Args:
        report_only: write no manifest.
    """
    check(config)
    check_trackers(config.tracking.backends)
    forget_earlier_runs()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    backbone = load_backbone(config.weights).to(accelerator.device)
    limits = Limits(config.data.max_pixels, config.data.max_bytes)
    images = open_images(
        config.data.root,
        config.data.kind,
        backbone.spec.in_chans,
        limits=limits,
        levels=backbone.preprocess.levels,
        labels=config.data.labels,
    )
    directory = Path(config.run.dir)
    refuse_other_directories(directory, config)
    with held(directory) if accelerator.is_main_process else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        return _curate_in(directory, config, accelerator, backbone, images, report_only)


def _curate_in(
    directory: Path, config: CurateConfig, accelerator: Accelerator, backbone: Backbone, images: Pool, report_only: bool
) -> Curation:
    """The curation of `curate_by`, in a directory that no other process writes to."""
    threads = config.run.cpu_threads
    torch.set_num_threads(cores() if threads == "auto" else int(threads))
    if accelerator.is_main_process:
        for remains in directory.glob(".*.partial"):  # of a call that was killed
            remains.unlink()
        write_text(directory / "config.yaml", configuration.dump(config))
    accelerator.wait_for_everyone()

    curated = curate_pool(Surroundings(config, backbone, directory, accelerator), images)
    columns = curated.columns
    manifest, report = directory / "manifest.parquet", directory / "report.html"
    if accelerator.is_main_process:
        if not report_only:
            write_manifest(manifest, columns, config.data.root, images.kind)
        sections = write_page(report, images, curated, config, _trial(backbone, images, config))
    reasons, numbers = page.reasons(columns["dropped"])
    counts = np.bincount(numbers, minlength=len(reasons)).tolist()
    dropped = {reason: count for reason, count in sorted(zip(reasons, counts, strict=True)) if reason and count}
    curation = Curation(manifest, report, len(images.names), int(np.sum(columns["kept"])), dropped)
    if accelerator.is_main_process and config.tracking.backends:
        hand_over(curation, sections, config, accelerator, has_manifest=not report_only)
    accelerator.wait_for_everyone()
    return curation


def write_page(
    path: Path, images: Pool, curated: Curated, config: CurateConfig, more_facts: dict[str, str]
) -> list[Picture | report_page.Table]:
    """report.html; gives its sections."""
    columns, copies = curated.columns, curated.copies
    facts = {
        "images": f"{len(images.names):,} from {config.data.root or config.data.kind}",
        "weights": config.weights,
        "drawn": f"{int(np.sum(columns['kept'])):,} images, {columns['weight'].sum():,.0f} draws",
        "method": f"{config.rebalance.method}, {config.rebalance.output}",
        **more_facts,
    }
    return page.write(
        path,
        images,
        columns,
        pairs=copies.near,
        cosines=copies.cosines,
        candidates=copies.candidates,
        facts=facts,
        settings=configuration.dump(config),
    )


def hand_over(
    curation: Curation,
    sections: list[Picture | report_page.Table],
    config: CurateConfig,
    accelerator: Accelerator,
    has_manifest: bool,
) -> None:
    """Tell trackers what was kept; W&B also the report's tables and pictures, and the manifest."""
    settings = {key: configuration.get(config, key) for key in configuration.leaves(config)}
    trackers = Trackers(accelerator, config.tracking, Path(config.run.dir), settings, "curation")
    figures = {"curation/images": curation.images, "curation/kept": curation.kept}
    figures |= {f"curation/dropped: {reason}": count for reason, count in curation.dropped.items()}
    trackers.log(figures)
    tables, pictures = {}, {}
    for part in sections:
        if isinstance(part, Picture):
            pictures[f"curation/{part.title}"] = part.png
        else:
            tables[f"curation/{part.title}"] = Table(part.columns, part.rows)
    trackers.pictures(pictures)
    trackers.tables(tables, figures)
    if config.tracking.artifacts and has_manifest:
        trackers.artifact("dataset", "manifest", [curation.manifest], {"weights": config.weights, **figures})
    trackers.end()


def _trial(backbone: Backbone, images: Pool, config: CurateConfig) -> dict[str, str]:
    """What the page says of the weights; the user is told where they are too weak."""
    if not config.duplicates.near:
        return {}
    found = planted_and_found(backbone, images, config.duplicates)
    if text := warning(found):
        logger.warning(text)
    return {"planted copies found": described(found)}


def refuse_other_directories(directory: Path, config: CurateConfig) -> None:
    """A run directory is empty or a curation's, and the pool lies elsewhere."""
    resolved = directory.resolve()
    for root in sources(config):
        pool = Path(root).expanduser().resolve()
        if resolved.is_relative_to(pool) or pool.is_relative_to(resolved):
            raise UserError(f"run.dir={directory} and the images of {root} lie in each other: name a run.dir elsewhere")
    require_free_places(directory, (), ("manifest.parquet", "report.html", LOCK))
    if directory.exists() and any(path.name != LOCK for path in directory.iterdir()):
        try:
            configuration.read(CurateConfig, str(directory / "config.yaml"), [])
        except UserError as error:
            raise UserError(
                f"run.dir={directory} is not empty and holds no curation: name another directory"
            ) from error


def sources(config: CurateConfig) -> Iterator[str]:
    """Where images on this machine come from: the pool, those that its manifest was made of, test sets and seeds."""
    roots = [config.data.root, *config.duplicates.against, config.rebalance.seeds or ""]
    seen = {""}
    while roots:
        for root in roots_of(roots.pop()):
            if root in seen or is_remote(root):
                continue
            seen.add(root)
            yield root
            if is_manifest(root):
                roots.append(read_manifest(root).root)
