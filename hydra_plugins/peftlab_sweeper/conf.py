"""Settings of the sweeper and of the launcher, with their defaults; `--info config` shows them."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class SweeperConf:
    """hydra/sweeper=peftlab."""

    defaults: list[Any] = field(default_factory=lambda: [{"sampler": "tpe"}, {"pruner": "none"}])
    _target_: str = "hydra_plugins.peftlab_sweeper.sweeper.PeftlabSweeper"
    _recursive_: bool = False
    sampler: Any = MISSING  # hydra/sweeper/sampler: tpe, random, gp, cmaes, qmc or grid
    pruner: Any = MISSING  # hydra/sweeper/pruner: none, median, percentile, asha or hyperband
    # name in the storage, which may hold many studies; null: study
    study_name: str | None = "${oc.select:study,null}"
    # journal:FILE, sqlite:///FILE, postgresql://... (better as ${oc.env:NAME}: never written out)
    storage: str = "journal:${hydra.sweep.dir}/study.journal"
    direction: Any = "minimize"  # or maximize; a list of them where the job returns several values
    n_trials: int | None = 20  # in all, earlier sessions included; null: every point of a grid
    n_jobs: int | None = None  # trials side by side; null: as many as the launcher has workers
    seed: int | None = 0  # of the sampler; null: another study each time
    # Ranges in Hydra's override grammar; params wins over search, the command line over both.
    search: Any = None
    params: Any = None
    fixed: Any = None  # {parameter: value} for all trials, resolved once; wins over search, params
    # Several studies taken in turn: a swept parameter, each of whose values is a study of its own,
    # or {label: [override, ...]}
    arms: Any = None
    when: Any = None  # {parameter: {other parameter: value or list of values}}: drawn only then
    # {parameter: decades}: how far a range on a log scale may grow beyond each of its ends, half a
    # decade at a time, while the best trial lies at that end
    widen: Any = None
    enqueue: Any = None  # list of points, each {parameter: value}, to be tried first
    retries: int = 1  # further attempts at a trial that failed, from its checkpoint
    max_failures: int = 3  # trials that may fail, attempts exhausted, before the sweep stops
    repeats: int = 1  # seeds per trial: the objective is their mean
    confirm: int = 0  # after the study the best k points run again on fresh seeds
    confirm_seeds: int = 3  # how many
    seed_key: str = "seed"  # the config's key of the run's own seed, for repeats and confirm


@dataclass
class WorkersConf:
    """hydra/launcher=peftlab_workers."""

    _target_: str = "hydra_plugins.peftlab_sweeper.workers.WorkersLauncher"
    n_jobs: int = 2  # worker processes


OPTUNA = "optuna.samplers"
SAMPLERS = {
    # Optuna's own defaults unless a reason stands beside
    "tpe": {"_target_": f"{OPTUNA}.TPESampler", "n_startup_trials": 10},
    "random": {"_target_": f"{OPTUNA}.RandomSampler"},
    "gp": {"_target_": f"{OPTUNA}.GPSampler", "n_startup_trials": 10},
    "cmaes": {
        "_target_": f"{OPTUNA}.CmaEsSampler",
        "n_startup_trials": 1,
        "warn_independent_sampling": False,  # categories are drawn at random, as documented
    },
    "qmc": {
        "_target_": f"{OPTUNA}.QMCSampler",
        "qmc_type": "sobol",
        "scramble": True,
        "warn_independent_sampling": False,
    },
    "grid": {"_target_": "hydra_plugins.peftlab_sweeper._samplers.Grid"},
}
PRUNERS = {
    "none": {"_target_": "optuna.pruners.NopPruner"},
    "median": {
        "_target_": "peftlab.pruning.Percentile",
        "percentile": 50.0,
        "n_startup": 4,
        "n_warmup": 20,
    },
    "percentile": {
        "_target_": "peftlab.pruning.Percentile",
        "percentile": 25.0,
        "n_startup": 4,
        "n_warmup": 20,
    },
    # rungs at 5, 15 and 45 % of a run: by replays of recorded studies (docs/sweeps.md)
    "asha": {
        "_target_": "optuna.pruners.SuccessiveHalvingPruner",
        "min_resource": 5,
        "reduction_factor": 3,
    },
    "hyperband": {
        "_target_": "optuna.pruners.HyperbandPruner",
        "min_resource": 10,
        "max_resource": 100,
        "reduction_factor": 3,
    },
}

store = ConfigStore.instance().store
store(group="hydra/sweeper", name="peftlab", node=SweeperConf, provider="peftlab")
store(group="hydra/launcher", name="peftlab_workers", node=WorkersConf, provider="peftlab")
for name, node in SAMPLERS.items():
    store(group="hydra/sweeper/sampler", name=name, node=node, provider="peftlab")
for name, node in PRUNERS.items():
    store(group="hydra/sweeper/pruner", name=name, node=node, provider="peftlab")
