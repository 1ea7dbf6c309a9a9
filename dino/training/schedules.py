"""The schedules that every method has."""

from dino.config.schema import Config
from dino.methods.schedule import Schedule


def optimizer_schedules(config: Config) -> dict[str, Schedule]:
    """Learning rate and weight decay by step, by the names of the metrics; needs a resolved config."""
    optim, steps = config.optim, config.train.steps
    # The first step's rate is one (warm-up + 1)-th of the peak, not 0, at which nothing would be learned.
    first = optim.lr / (optim.warmup_steps + 1)
    return {
        "optim/lr": Schedule(optim.lr, optim.lr_end, steps, start=first, warmup=optim.warmup_steps),
        "optim/weight_decay": Schedule(optim.weight_decay, optim.weight_decay_end, steps),
    }
