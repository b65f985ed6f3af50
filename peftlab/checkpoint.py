"""A run's state in one safetensors file, and the adapter that is left of it in the end.

The file holds the trained tensors, the optimizer's state, torch's random state and, as JSON in
its header, everything else; it is replaced atomically, so it is whole or absent.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peftlab.bits import Tally
from peftlab.errors import InputError
from peftlab.files import replacing, save_tensors
from peftlab.fit import Progress
from peftlab.method import attached, trainable


def adapter_tensors(net: nn.Module) -> dict[str, Tensor]:
    """All that a run adds to the frozen backbone, by name: trained tensors and stored constants."""
    constants = {f"peft.{name}": tensor for name, tensor in attached(net).state_dict().items()}
    trained = {name: p.detach() for name, p in trainable(net)}
    return {**constants, **trained}


def save_adapter(net: nn.Module, path: Path, about: Mapping[str, str]) -> int:
    """Write the adapter, each tied tensor once, with `about` in its header; return its bytes.

    The method is compacted first, for good: what only training needs is not in the file.
    """
    attached(net).compact()
    with replacing(path) as temporary:  # straight from the tensors, without a copy in memory
        save_tensors(temporary, _on_cpu(adapter_tensors(net)), about)
    return path.stat().st_size


def load_adapter(net: nn.Module, path: Path) -> dict[str, str]:
    """Copy an adapter's tensors into `net`, to which the same method is attached; compact it.

    Returns what the file's header says about it.
    Raises: InputError if the file is damaged or its tensors are not this method's.
    """
    tensors, about = read_tensors(path)
    attached(net).compact()
    _copy_into(adapter_tensors(net), tensors, path)
    attached(net).loaded()
    return about


def save_state(
    path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, **more: object
) -> None:
    """Write all that is needed to go on from here; `more` is any JSON."""
    tensors = {f"net/{name}": tensor for name, tensor in adapter_tensors(net).items()}
    scalars: dict[str, float] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            where = f"optimizer/{index}/{key}"
            if isinstance(value, Tensor):
                tensors[where] = value
            else:
                scalars[where] = value
    tensors["random/cpu"] = torch.get_rng_state()
    device = next(net.parameters()).device
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    header = {"progress": asdict(progress), "scalars": scalars, **more}
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        save_tensors(temporary, _on_cpu(tensors), {"state": json.dumps(header)})


def load_state(
    path: Path, net: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict]:
    """Restore what `save_state` wrote; return the progress and the rest of the header.

    Raises: InputError if the file is damaged or belongs to other tensors.
    """
    tensors, metadata = read_tensors(path)
    try:
        return _restore(net, optimizer, tensors, json.loads(metadata["state"]), path)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: is no checkpoint of a run ({error!r:.80})") from error


def _restore(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    header: dict,
    path: Path,
) -> tuple[Progress, dict]:
    own = {name.removeprefix("net/"): t for name, t in tensors.items() if name.startswith("net/")}
    _copy_into(adapter_tensors(net), own, path)
    attached(net).loaded()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict] = {}
    for where, value in {**tensors, **header.pop("scalars")}.items():
        if where.startswith("optimizer/"):
            _, index, key = where.split("/", 2)
            state.setdefault(int(index), {})[key] = _laid_as(params[int(index)], value)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    torch.set_rng_state(tensors["random/cpu"])
    device = next(net.parameters()).device
    if "random/cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], device)
    stored = header.pop("progress")
    stored["online"] = Tally(**stored["online"])
    for split in ("train", "test"):
        stored[split] = [Tally(**tally) for tally in stored[split]]
    return Progress(**stored), header


def _laid_as(p: Tensor, value: object) -> object:
    """Return a tensor of p's shape with p's strides too: fused optimizers go through memory."""
    if not isinstance(value, Tensor) or value.shape != p.shape:
        return value
    return torch.empty_like(p, dtype=value.dtype).copy_(value)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, and what its header says.

    Raises: InputError if it is damaged or cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: damaged or unreadable ({error}); delete it to start anew"
        ) from error


def _copy_into(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], path: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in stored.items()}:
        raise InputError(f"{path}: holds tensors of another method, size or model")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
