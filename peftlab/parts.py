"""The parts of a run, built from its config: backbone, data, method, optimizer; nothing trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftlab.backbone import Backbone, load_backbone
from peftlab.base import base_losses
from peftlab.bits import Tally
from peftlab.compiled import compile_blocks, worth_it
from peftlab.data import Batch, Data, load_data
from peftlab.errors import InputError, require
from peftlab.fit import Progress, Row, fit
from peftlab.method import Method, trainable
from peftlab.optim import NetOptimizer, in_backward, schedule
from peftlab.reuse import Reuse, reuse_of
from peftlab.show import warn
from peftlab.sites import find_sites, kinds_of, most_positions

THREADS = torch.get_num_threads()  # of this process, before any run has set them
NOT_ARGUMENTS = ("_target_", "sites", "lr", "search")  # keys of conf/method that are for the run
SCHEDULE = ("schedule", "warmup", "clip")  # keys of conf/optimizer that are for the run


@dataclass
class Parts:
    """What a config composes: everything built, nothing trained, nothing written."""

    config: Mapping
    backbone: Backbone
    data: Data
    base: tuple[Tally, Tally]  # of the bare backbone on train and test split
    method: Method
    optimizer: torch.optim.Optimizer
    total_steps: int
    compiled: bool
    reuse: Reuse | None  # of blocks that nothing trains

    @property
    def net(self) -> PreTrainedModel:
        """The backbone with the method attached."""
        return self.backbone.net

    def fit(self, progress: Progress, stop: Callable[[], bool]) -> Iterator[Row]:
        """Train from `progress`; see `peftlab.fit.fit`."""
        optimizer, loss = self.config["optimizer"], self.backbone.loss
        factor = schedule(optimizer["schedule"], warmup=optimizer["warmup"], steps=self.total_steps)
        return fit(
            self.net,
            self.data,
            self.optimizer,
            factor,
            progress,
            base=self.base,
            loss=loss if self.reuse is None else self.reuse.feeding(loss),
            epochs=self.config["epochs"],
            clip=optimizer["clip"],
            autocast=self.config["precision"] == "bf16",
            stop=stop,
        )


def assemble(config: Mapping, load: Callable[..., Backbone] = load_backbone) -> Parts:
    """Build all parts of a run, the backbone by `load`.

    Raises: InputError for whatever in the config does not fit.
    """
    torch.set_num_threads(config["threads"] or THREADS)
    # A wrong setting is told before anything is loaded; one tensor random, one 0, as in a pair.
    pair = [nn.Parameter(f(2, 2)) for f in (torch.ones, torch.zeros)]
    _check_in_backward(config, build_optimizer(config["optimizer"], pair))
    backbone = base_of(config, load)
    data = data_of(config, backbone)
    method = method_of(config, backbone)
    autocast = config["precision"] == "bf16"
    base = base_losses(backbone, data, autocast=autocast)
    attach(method, backbone)
    prepare(method, backbone, data, autocast=autocast)
    params = [p for _, p in trainable(backbone.net)]
    optimizer = build_optimizer(config["optimizer"], params)
    if isinstance(optimizer, NetOptimizer):
        optimizer.attach(backbone.net)
    reuse = reuse_of(backbone.net, data, autocast=autocast) if config["reuse_frozen"] else None
    compiled = config["compile"]
    if compiled == "auto":
        n_tokens = sum(len(example.ids) for example in data.train.examples) * config["epochs"]
        compiled = worth_it(backbone.total_params, n_tokens)
    if compiled:
        warn("compiling the decoder blocks at the next steps")
        compile_blocks(backbone.net)
    steps = data.n_steps * config["epochs"]
    return Parts(config, backbone, data, base, method, optimizer, steps, compiled, reuse)


def base_of(config: Mapping, load: Callable[..., Backbone] = load_backbone) -> Backbone:
    """Load the backbone that the resolved config of a run names, by `load`."""
    block = config["dataset"]["block_length"]
    return load(config["model"], precision=config["precision"], block_length=block)


def data_of(config: Mapping, backbone: Backbone) -> Data:
    """Tokenise the data that the resolved config of a run names."""
    data = load_data(
        config["dataset"],
        tokenizer=backbone.tokenizer,
        tokenizer_id=backbone.tokenizer_id(),
        seed=config["seed"],
        batch=config["batch"],
        micro_batch=config["micro_batch"],
    )
    most = most_positions(backbone.net)
    rows = [row for split in (data.train, data.test) for row in split.examples]
    packed = [row.positions for row in rows if row.positions is not None]  # they begin again at 0
    longest = max([int(p.max()) + 1 for p in packed] or [len(row.ids) for row in rows])
    where, length = "dataset.block_length", config["dataset"]["block_length"]
    require(longest <= most, where, length, f"at most {most}: the longest row has {longest}")
    return data


def method_of(config: Mapping, backbone: Backbone) -> Method:
    """Build the method of a run from its seed, which is also that of dropout; not attached."""
    torch.manual_seed(config["seed"])
    return build_method(config["method"], backbone.net, backbone.kinds)


def attach(method: Method, backbone: Backbone) -> None:
    """Attach the method, after it has read the texts among its settings."""
    method.read(backbone.encode)
    method.attach(backbone.net)


def prepare(method: Method, backbone: Backbone, data: Data, *, autocast: bool) -> None:
    """Let the attached method look at the training data, in the precision of the run."""
    device = next(backbone.net.parameters()).device

    def nats(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return backbone.loss(backbone.net, batch.to(device))

    method.prepare(nats, data.batches(data.train))


def build_method(method: Mapping, net: PreTrainedModel, kinds: Mapping | None) -> Method:
    """Find the sites and construct the method that the config group `method` describes.

    kinds: model.kinds.
    """
    sites = find_sites(net, kinds_of(net.config.model_type, kinds), method["sites"])
    arguments = {key: value for key, value in method.items() if key not in NOT_ARGUMENTS}
    return construct("method", {"_target_": method["_target_"], **arguments}, sites=sites)


def _check_in_backward(config: Mapping, optimizer: torch.optim.Optimizer) -> None:
    """Require what an update within backward needs: gradients that are whole, one at a time."""
    if in_backward(optimizer):
        clip, micro, batch = config["optimizer"]["clip"], config["micro_batch"], config["batch"]
        why = "this optimizer updates within backward"
        require(clip is None, "optimizer.clip", clip, f"null, as {why}")
        require(micro == batch, "micro_batch", micro, f"batch ({batch}), as {why}")


def build_optimizer(optimizer: Mapping, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Construct the optimizer that the config group `optimizer` describes, over `params`."""
    arguments = {key: value for key, value in optimizer.items() if key not in SCHEDULE}
    return construct("optimizer", arguments, params=list(params))


def construct(group: str, node: Mapping, **objects: object):
    """Call node's `_target_`; what it refuses becomes one line that names the group."""
    try:
        # partial: Hydra would copy, or resolve, objects given to the call itself
        return instantiate(dict(node), _partial_=True, _convert_="all")(**objects)
    except InputError:
        raise
    except (InstantiationException, TypeError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise InputError(f"{group}={node['_target_']}: {reason}") from error
