"""The config groups: every choice composes, every key is explained where it is defined."""

import hydra
import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from optuna.distributions import FloatDistribution
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hydra_plugins.peftlab_sweeper._space import read_space
from peftlab.backbone import conv1d_to_linear
from peftlab.cards import method_names
from peftlab.config import HOME, check, resolve, run_name
from peftlab.parts import build_method
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


def test_sweeps_are_studies_that_go_on():
    """What each does is seen in tests/sweeper/test_files.py."""
    for path in (HOME / "sweeps").glob("*.yaml"):
        sweep = yaml.safe_load(path.read_text())
        assert {"override /hydra/sweeper": "peftlab"} in sweep["defaults"]
        assert sweep["skip_finished"] is True and sweep["study"].startswith(path.stem)


@pytest.mark.parametrize("name", method_names())
def test_every_method_can_be_tuned(name):
    """Its ranges are read, name keys that exist, and hold its own default or lie around it."""
    config = compose(f"method={name}")
    space = read_space([], [config.method.search], {}, OverridesParser.create())
    assert {parameter.name for parameter in space.parameters} == set(config.method.search)
    assert "optimizer.lr" in config.method.search
    for parameter in space.parameters:
        assert OmegaConf.select(config, parameter.name) is not None
        first = parameter.values()[0] if parameter.texts else parameter.distribution.low
        compose(f"method={name}", parameter.override(first))


@pytest.fixture(scope="module")
def skeletons():
    """The two packaged models without numbers, by their sizes."""
    smollm2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    smollm2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=100, **smollm2))
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=192, n_layer=4, n_head=3))
        conv1d_to_linear(gpt2)
    return [net.requires_grad_(False) for net in (llama, gpt2)]


@pytest.mark.parametrize("name", method_names())
def test_no_choice_of_a_search_is_refused_by_a_packaged_model(name, skeletons):
    """A study that draws such a point ends without having tuned its method."""
    method = OmegaConf.to_container(compose(f"method={name}").method, resolve=True)
    space = read_space([], [method["search"]], {}, OverridesParser.create())
    for parameter in space.parameters:
        group, _, key = parameter.name.partition(".")
        drawn = parameter.distribution
        if group != "method" or isinstance(drawn, FloatDistribution):
            continue
        for value in parameter.texts or (drawn.low, drawn.high):
            for net in skeletons:
                build_method({**method, key: value}, net, None)


def test_one_number_can_be_made_of_others():
    tied = 'method.gamma="${peftlab_power:${optimizer.lr},-${aux.p}}"'
    resolved = resolve(compose(tied, "optimizer.lr=1e-4", "+aux.p=0.75"))
    assert resolved["method"]["gamma"] == pytest.approx(1000.0)
    assert resolved["aux"] == {"p": 0.75}
    check(resolved)
