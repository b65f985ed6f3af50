"""A run read back is the run: its losses, and the start from which it was trained."""

import json
import shutil

import pytest
import torch
from conftest import NETS

from peftlab.checkpoint import adapter_tensors
from peftlab.errors import InputError
from peftlab.export import save_merged
from peftlab.fit import evaluate
from peftlab.parts import assemble, data_of
from peftlab.recorded import read_record, restore

METHODS = ("lora", "bitfit", "fishmask", "prefix_tuning", "sparse_adapter")


@pytest.fixture(autouse=True)
def cache(session_folder, monkeypatch):
    monkeypatch.setenv("PEFTLAB_CACHE", str(session_folder / "cache"))


@pytest.mark.parametrize("name", METHODS)
def test_the_restored_model_has_the_losses_of_the_run(name, finished):
    record = read_record(
        finished(f"method={name}", *(["optimizer.lr=0.01"] if name == "bitfit" else []))
    )
    backbone = restore(record)
    data = data_of(record.config, backbone)
    for split in ("train", "test"):
        batches = data.batches(getattr(data, split))
        tally = evaluate(backbone.net, batches, backbone.loss, autocast=False)
        assert tally.nats == pytest.approx(record.result["final"][f"{split}_nats"], rel=1e-7)
    assert record.rows[0]["step"] == 0 and record.run_id == record.result["run_id"]


@pytest.mark.parametrize("name", ["lora", "pissa", "prompt_tuning"])
def test_untrained_is_as_the_run_began(name, finished):
    record = read_record(finished(f"method={name}"))
    start = adapter_tensors(restore(record, trained=False).net)
    again = adapter_tensors(assemble(record.config | {"compile": False}).net)
    after = adapter_tensors(restore(record).net)
    assert start.keys() == again.keys() == after.keys()
    assert all(torch.equal(start[key], again[key]) for key in start)
    assert any(not torch.equal(start[key], after[key]) for key in start)


def test_another_base_and_a_damaged_adapter_are_told(finished, tmp_path):
    record = read_record(finished("method=lora"))
    other = tmp_path / "other"
    save_merged(NETS["gpt2"](), other, dtype=torch.float32)
    with pytest.raises(InputError, match=r"^model.sha256=\w{64}: that of the base of .*, \w{64}$"):
        restore(record, base=other)
    folder = tmp_path / "run"
    shutil.copytree(record.folder, folder)
    file = folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(InputError, match="adapter.safetensors: damaged or unreadable"):
        restore(read_record(folder))
    second = finished("method=lora", "seed=1")
    shutil.copy(second / "adapter.safetensors", file)
    told = json.loads((second / "result.json").read_text())["run_id"]
    with pytest.raises(InputError, match=f"of run {told}: of {record.run_id}"):
        restore(read_record(folder))
