"""What is asked of the images before the settings that depend on them are resolved."""

import copy

from dino.config.auto import PoolFacts, cache_room, is_measured
from dino.config.schema import Config
from dino.data import Levels, Pool, decoded, mean_and_std, measured_range, samples_per_epoch


def measured(config: Config, images: Pool, show_progress: bool = True) -> tuple[Config, PoolFacts]:
    """The config with `data.range`, where it is to be measured, and facts of the images, which go by it from now on.

    Every process may call this by itself, and gets the same.

    Raises:
        UserError: no image of those looked at can be read.
    """
    config = copy.deepcopy(config)
    if config.data.bits == "float" and config.data.range is None:
        config.data.range = list(measured_range(images, show_progress))
        images.levels = Levels("float", (config.data.range[0], config.data.range[1]))
    mean, std = mean_and_std(images, show_progress) if is_measured(config, images.channels) else (None, None)
    size = decoded(images, cache_room())
    facts = PoolFacts(samples_per_epoch(images), images.channels, images.kind, size.bytes, size.canvas, mean, std)
    return config, facts
