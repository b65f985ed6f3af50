"""The frozen model's own loss on both splits, evaluated once per model, data and machine.

It is the same for every method, seed and learning rate, so a sweep need not evaluate it for each
trial, and a run can start training at once.
"""

import hashlib
import json
from dataclasses import asdict

import torch

from peftlab.backbone import Backbone
from peftlab.bits import Tally
from peftlab.data import Data
from peftlab.files import cache_dir, write_atomic
from peftlab.fit import evaluate
from peftlab.provenance import cpu
from peftlab.show import warn

NUMERICS = 4  # of the loss: counted up by a change of our code that moves its last bits


def base_losses(backbone: Backbone, data: Data, *, autocast: bool) -> tuple[Tally, Tally]:
    """Return the tallies of train and test split under the bare backbone, from the cache if there.

    autocast: multiply in bf16. The key holds all that can move a bit of the result.
    """
    weight = next(backbone.net.parameters())
    facts = (
        *(backbone.sha256, backbone.quantize, backbone.kinds, data.fingerprint),
        backbone.net.config._attn_implementation,
        *(autocast, str(weight.dtype), str(weight.device), torch.get_num_threads()),
        *(torch.__version__, cpu(), NUMERICS),
    )
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    note = cache_dir() / "base" / f"{key}.json"
    if not note.exists():
        warn("evaluating the frozen model, once for this data ...")
        tallies = [
            evaluate(backbone.net, data.batches(split), backbone.loss, autocast=autocast)
            for split in (data.train, data.test)
        ]
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(note, json.dumps([asdict(tally) for tally in tallies]))
    train, test = (Tally(**tally) for tally in json.loads(note.read_text()))
    return train, test
