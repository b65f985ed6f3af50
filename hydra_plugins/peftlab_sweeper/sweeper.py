"""hydra/sweeper=peftlab: Optuna 5 behind Hydra's multirun."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class PeftlabSweeper(Sweeper):
    """A study that can be interrupted anywhere and goes on when the command is repeated.

    settings: those of conf.py; they are read from the config when the sweep starts.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra hands to a sweeper; the launcher is made when the sweep starts."""
        self.given = (hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Sequence[Sequence[JobReturn]]:
        """Run the study; return what each job of this session returned.

        arguments: the command line's words. Raises: InputError for bad input, before any trial.
        """
        from hydra_plugins.peftlab_sweeper._sweep import Sweep

        return [Sweep(*self.given, arguments).run()]
