"""A run is run again from its record: the same to the last bit, or what differs by name."""

import json

import pytest
import yaml

from peftlab.__main__ import main
from peftlab.recorded import allowed_targets
from peftlab.run import run

METHODS = (
    "lora gamma_lora dora tied_lora partially_tied_lora ia3 houlsby prefix_tuning bitfit adalora"
).split()


@pytest.fixture
def done(compose, tmp_path):
    def make(*words):
        folder = tmp_path / "run"
        result = run(compose("epochs=1", *words), folder, trial=None, job_type="train")
        assert result["status"] == "completed"
        return folder

    return make


@pytest.mark.parametrize("name", METHODS)
def test_the_same_to_the_last_bit(name, done, capfd):
    folder = done(f"method={name}", *(["method.dropout=0.1"] if name == "lora" else []))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert main(["reproduce", str(folder)]) == 0
    rows = len((folder / "rows.jsonl").read_text().splitlines())
    assert f"reproduced: {rows} rows" in capfd.readouterr().out
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def edit(path, change):
    """Let `change` edit the JSON in a file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_byte_of_the_data_differs(done, rows_file, capfd):
    folder = done("method=ia3")
    text = rows_file.read_text()
    rows_file.write_text(text.replace("make 3", "make 4", 1).replace('"3.', '"4.', 1))
    assert rows_file.read_text() != text
    assert main(["reproduce", str(folder)]) == 1
    out = capfd.readouterr().out
    assert "not reproduced: row " in out and ": bits_per_token is " in out
    assert "dataset.fingerprint is " in out and "model.sha256" not in out


def test_another_package_and_another_number(done, capfd):
    folder = done("method=ia3")
    edit(folder / "result.json", lambda r: r["provenance"]["packages"].update(torch="1.0.0"))
    assert main(["reproduce", str(folder)]) == 0  # the numbers are the same all the same
    assert "although package torch is 2." in capfd.readouterr().out
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows[3]["grad_norm"] += 1e-9
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["reproduce", str(folder)]) == 1
    out = capfd.readouterr().out
    assert "not reproduced: row 4 (step 2, step train): grad_norm is " in out
    assert "package torch is 2." in out and ", was 1.0.0" in out


def test_what_is_no_record(done, tmp_path, capfd):
    folder = done("method=ia3")
    config = yaml.safe_load((folder / "config.yaml").read_text())

    def refused(told):
        assert main(["reproduce", str(folder)]) == 2
        (line,) = capfd.readouterr().err.splitlines()[-1:]
        assert line.startswith("peftlab: ") and told in line, line

    def write(changed):
        (folder / "config.yaml").write_text(yaml.safe_dump(changed))

    write(config | {"seed": 1})
    refused("config.yaml is not that of result.json, seed is 1, was 0")
    for group, key in (("method", "sites"), ("optimizer", "lr")):
        value = config[group][key]
        write(config | {group: config[group] | {key: value + value}})
        refused(f"{group}.{key} is {value + value}, was {value}")
    write(config | {"batch": config["batch"] * 2})
    refused("config.yaml is not that of result.json, in what result.json has only as a hash")
    kept = (folder / "result.json").read_text()
    edit(folder / "result.json", lambda r: r.update(method=["lora"]))
    refused("config.yaml is not that of result.json, nor is that one as a run writes it")
    (folder / "result.json").write_text(kept)
    write({k: v for k, v in config.items() if k != "compile"})
    refused("of another version: config.yaml lacks ['compile']")
    planted = tmp_path / "planted"
    evil = {"_target_": "os.mkdir", "path": str(planted)}
    for place in (config | {"tracking": evil}, config | {"method": config["method"] | {"x": evil}}):
        write(place)
        refused("_target_=os.mkdir: a class of peftlab's own conf/")
    (folder / "config.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{planted}']")
    refused("is no record of a run")
    assert not planted.exists()
    write(config)
    edit(folder / "result.json", lambda r: r.update(status="diverged"))
    refused("a completed run; this one is diverged")
    (folder / "rows.jsonl").unlink()
    refused("a run folder: it holds config.yaml, result.json, rows.jsonl")


def test_only_classes_of_our_own_configs_are_allowed():
    allowed = allowed_targets()
    assert "peftlab.methods.lora.LoRA" in allowed and "torch.optim.AdamW" in allowed
    roots = {target.split(".")[0] for target in allowed}
    assert roots == {"peftlab", "torch", "transformers"}
