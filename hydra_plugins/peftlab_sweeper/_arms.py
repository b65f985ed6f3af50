"""hydra.sweeper.arms: several studies in one sweep, taken in turn.

    null                                   one study
    method                                 a swept parameter: each of its values is a study
    {plain: [method=lora], plus: [method=lora, optimizer=loraplus]}       overrides by label

An arm is a study like any other, in the sub-folder that is named after it. An escaped ${...} in
an override is for each trial to resolve: see sweeps/tying.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from hydra_plugins.peftlab_sweeper._arm import Arm, plain, raw
from hydra_plugins.peftlab_sweeper._space import Space, read_space
from peftlab.errors import require
from peftlab.trial import study_name

WHERE = "hydra.sweeper.arms"


def read_arms(loader: ConfigLoader, config: DictConfig, arguments: Sequence[str]) -> list[Arm]:
    """Return the arms of a sweep, at least one.

    Raises: InputError for a setting that is none of the above, and as `Arm` does.
    """
    settings = config.hydra.sweeper
    setting = plain(settings.arms)
    if setting is None:
        return [Arm("", loader, config, arguments)]
    parser = OverridesParser.create(config_loader=loader)
    given = read_space(arguments, [raw(settings, "params") or {}], {}, parser)
    words = _of_parameter(setting, given) if isinstance(setting, str) else setting
    require(isinstance(words, Mapping) and len(words) > 0, WHERE, setting, "{label: [override]}")
    arms = []
    for label, own in words.items():
        named = re.fullmatch(r"[\w+-][\w+.-]*", str(label)) is not None  # it names a folder
        require(named, WHERE, label, "a label is a name of letters, digits, _ + . -")
        lists = isinstance(own, list) and all(isinstance(word, str) for word in own)
        require(lists, f"{WHERE}.{label}", own, "a list of overrides")
        for word in own:
            parser.parse_override(word)
        folder = PurePath(config.hydra.sweep.dir) / str(label)
        study = f"{study_name(settings)}/{label}"  # of the job, and so of its tracker, too
        place = [f"++study='{study}'", f"hydra.sweep.dir='{folder}'"]
        arms.append(Arm(str(label), loader, config, [*arguments, *own, *place]))
    names = [study_name(arm.settings) for arm in arms]
    allowed = "every arm needs its own: leave it ${oc.select:study,study}"
    require(len({*names}) == len(names), "hydra.sweeper.study_name", names[0], allowed)
    return arms


def _of_parameter(name: str, given: Space) -> dict[str, list[str]]:
    """Return one arm per value of a swept parameter, labelled by the value."""
    known = {parameter.name: parameter for parameter in given.parameters}
    allowed = f"must be swept, as in {name}=1,2; {', '.join(known) or 'none is'}"
    require(name in known, WHERE, name, allowed)
    words: dict[str, list[Any]] = {}
    for value in known[name].values():
        label = re.sub(r"[^\w+.-]+", "-", str(value)).strip("-")
        require(label not in words, WHERE, value, "two values look alike; give {label: [override]}")
        words[label] = [known[name].override(value)]
    return words
