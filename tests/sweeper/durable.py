"""A toy task that keeps its state in its folder, as a run does, so that kills can be judged.

python durable.py FOLDER OVERRIDE ...
"""

import json
import os
import sys
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from toy import HERE, words

from peftlab.files import write_atomic
from peftlab.trial import Pruned, current_trial

STEPS = range(10, 110, 10)


def task(c):
    """The value is summed up step by step: a step left out or done twice would show."""
    point = {"x": c.x, "k": c.k}
    path = Path(HydraConfig.get().runtime.output_dir) / "state.json"
    state = {"point": point, "step": 0, "total": 0.0}
    if path.exists():
        state = json.loads(path.read_text())
    if state["point"] != point:
        raise RuntimeError(f"{path} is of another point")
    with Path(c.log).open("a") as file:
        file.write(f"{HydraConfig.get().job.num}\n")
    trial = current_trial()
    for step in STEPS[state["step"] // 10 :]:
        time.sleep(c.sleep)
        state |= {"step": step, "total": state["total"] + ((c.x - 2) ** 2 + c.k) * step}
        pruned = False
        if step < STEPS[-1]:  # reported before it is kept: after a kill in between it comes again
            trial.report(state["total"] / step, step)
            pruned = trial.should_prune()
        write_atomic(path, json.dumps(state))
        if pruned:
            raise Pruned
    return state["total"]


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = ["toy", *words(sys.argv[1], *sys.argv[2:])]
    hydra.main(version_base="1.3", config_path=str(HERE), config_name="toy")(task)()
