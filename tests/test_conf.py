"""The config groups: every choice composes, every key is explained where it is defined."""

import hydra
import pytest
from omegaconf import OmegaConf

from peftlab.config import HOME, check, resolve, run_name
from peftlab.train import CONF

GROUPS = ("model", "method", "optimizer", "dataset", "tracking")
CHOICES = [
    f"{group}={path.stem}"
    for group in GROUPS
    for path in sorted((HOME / "conf" / group).glob("*.yaml"))
    if path.stem != "schedule"  # a part of the others
]


def compose(*overrides):
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose("config", list(overrides))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_to_a_config_that_passes_the_checks(choice):
    more = ["model.path=someone/model"] if choice == "model=hub" else []
    more += ["dataset.path=rows.jsonl"] if choice in ("dataset=hub", "dataset=local") else []
    resolved = resolve(compose(choice, *more))
    check(resolved)
    group, name = choice.split("=")
    assert resolved["optimizer"]["lr"] == resolved["method"]["lr"]
    if group in ("model", "method", "dataset"):
        assert name in run_name(resolved)


def test_the_lr_of_the_optimizer_wins_over_the_methods():
    assert compose("method=lora", "optimizer.lr=0.5").optimizer.lr == 0.5
    assert compose("method=lora", "method.lr=0.25").optimizer.lr == 0.25


def test_every_key_has_a_comment_on_its_line_or_above():
    silent = []
    for group in (*GROUPS, "."):
        for path in (HOME / "conf" / group).glob("*.yaml"):
            above = ""
            for line in path.read_text().splitlines():
                key, colon, _ = line.partition(":")
                skip = ("_target_", "search", "defaults", "hydra", "name", "source", "path")
                top = colon and key and not key.startswith((" ", "#", "-")) and key not in skip
                if top and "#" not in line and not above.startswith("#"):
                    silent.append(f"{path.relative_to(HOME)}: {line}")
                above = line
    assert not silent, silent


def test_sweeps_name_keys_that_exist():
    for path in (HOME / "sweeps").glob("*.yaml"):
        sweep = OmegaConf.load(path)
        for key in sweep.hydra.sweeper.params:
            assert OmegaConf.select(compose(), key) is not None
        assert sweep.skip_finished is True
