"""Settings in whole runs: config.yaml repeats its run, files of earlier versions are read, and settings that
would do nothing, or more than the machine can, are refused before anything is written.
"""

import re

import pytest
import yaml
from conftest import DIGITS, ROOT

import eval as eval_script
import train_semi
from benchmark.same_run import difference
from util.config import Config, to_dict
from util.effect import without_effect
from util.inspect import doctor, report
from util.run import checkpoint, memory

SHORT = "--epochs 2 --steps-per-epoch 4 --eval-freq 1 --mu 2 --print-freq 3 --device cpu".split()


@pytest.fixture
def call(monkeypatch, capsys):
    """Call a script's main in this process with flags. Returns its output."""

    def run(main, *flags):
        monkeypatch.setattr("sys.argv", ["script", *map(str, flags)])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def train(call):
    def run(folder, *flags, config=ROOT / "configs" / "digits.yaml"):
        return call(train_semi.main, "--config", config, "--output-dir", folder, *SHORT, *flags)

    return run


def saved(folder, settings):
    """Replace settings in the last checkpoint of a run."""
    state = checkpoint.load(folder / "last.pth")
    state["config"] |= settings
    checkpoint.save(folder / "last.pth", {key: value for key, value in state.items() if key != "format"})
    return state["config"]


@pytest.mark.parametrize("method", ["simmatch", "fixmatch"])
def test_config_yaml_gives_the_same_run_and_holds_only_what_has_an_effect(method, train, call, tmp_path):
    train(tmp_path / "a", "--method", method, "--save-minutes", "5", "--port", "3000")
    settings = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert not settings.keys() & {"strong", "image_size", "split", "schedule", "evaluate", "norm", "data"}
    assert not settings.keys() & without_effect(Config(**settings)).keys()
    assert settings["port"] == 3000 and settings["mu"] == 2 and settings["method"] == method
    call(train_semi.main, "--config", tmp_path / "a" / "config.yaml", "--output-dir", tmp_path / "b")
    assert difference(tmp_path / "a", tmp_path / "b") == ""
    again = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert again == {**settings, "output_dir": str(tmp_path / "b")}
    out = call(train_semi.main, "--config", tmp_path / "a" / "config.yaml")  # names its own directory
    assert "continues from" in out and "it is finished" in out


def test_files_of_earlier_versions_are_read_and_resumed(train, call, tmp_path):
    """They hold every field. Those without an effect differ here from what the command line would give."""
    folder = tmp_path / "run"
    train(folder, "--method", "fixmatch")
    unused = {"strong": "rand", "image_size": 96, "lambda_in": 7.0, "da_len": 5, "val_share": 0.5}
    settings = saved(folder, unused)
    assert settings.keys() == to_dict(Config()).keys()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))

    assert "top-1" in call(eval_script.main, "--checkpoint", folder / "last.pth", "--workers", "0")
    assert "| fixmatch | 1 |" in call(report.main, folder)
    with pytest.raises(SystemExit):
        call(doctor.main, folder)
    old = tmp_path / "old.yaml"
    (folder / "config.yaml").rename(old)
    assert "it is finished" in train(folder, config=old)
    assert "it is finished" in train(folder, "--method", "fixmatch")
    assert not yaml.safe_load((folder / "config.yaml").read_text()).keys() & {
        "strong",
        "lambda_in",
        "evaluate",
    }


def test_a_setting_without_effect_leaves_an_earlier_run_intact(train, mistake, tmp_path):
    train(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    flags = [*DIGITS, tmp_path / "run", *SHORT]
    mistake(train_semi.main, [*flags, "--strong", "rand"], "--strong has no effect with dataset digits")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}


def test_moco_path_of_a_resumed_run_must_be_the_one_that_it_started_from(train, mistake, tmp_path):
    folder = tmp_path / "run"
    train(folder)
    saved(folder, {"moco_path": "files/moco.pth", "epochs": 3})
    mistake(
        train_semi.main,
        [*DIGITS, folder, *SHORT, "--moco-path", "files/other.pth"],
        "--moco-path files/other.pth has no effect",
        "last.pth is resumed",
        "--output-dir",
    )
    for epochs, path in ((3, "files/moco.pth"), (4, ""), (5, "./files/moco.pth")):
        saved(folder, {"epochs": epochs})
        assert "continues from" in train(folder, "--epochs", epochs, *(["--moco-path", path] if path else []))
        assert checkpoint.load(folder / "last.pth")["config"]["moco_path"] == "files/moco.pth"
        assert yaml.safe_load((folder / "config.yaml").read_text())["moco_path"] == "files/moco.pth"


def test_moco_path_is_refused_for_a_run_that_did_not_start_from_it(train, mistake, tmp_path):
    train(tmp_path / "run")
    flags = [*DIGITS, tmp_path / "run", *SHORT, "--moco-path", "some.pth"]
    mistake(train_semi.main, flags, "--moco-path some.pth has no effect", "did not start from it")


def test_a_checkpoint_that_is_not_there_is_named_when_a_new_run_starts(train, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = "checkpoints/mine.pth does not exist: a new run starts and writes it"
    assert line in train("run", "--checkpoint", "mine.pth").splitlines()
    assert line not in train("run", "--checkpoint", "mine.pth")
    assert "does not exist" not in train("other")


def test_a_step_that_needs_too_much_memory_is_refused_before_anything_is_built(
    mistake, monkeypatch, tmp_path
):
    monkeypatch.setattr(memory, "machine_memory", lambda: 2 * 10**8)
    big = ["--steps-per-epoch", "1", "--batch-size", "100000", "--mu", "1", "--device", "cpu"]
    mistake(
        train_semi.main,
        [*DIGITS, tmp_path / "run", *big],
        "the images of one step need 0.3 GB, but this machine has 0.2 GB",
        "lower --batch-size or --mu",
    )
    assert not (tmp_path / "run").exists()


def test_an_unknown_view_is_refused_before_the_images_are_listed(mistake, monkeypatch, tmp_path):
    flags = ["--config", ROOT / "configs" / "imagenet_1p.yaml", "--data", tmp_path / "nowhere"]
    for view in ("--weak", "--strong"):
        said = mistake(train_semi.main, [*flags, view, "strongest", "--output-dir", tmp_path / "run"])
        assert re.search("unknown view 'strongest'; known: weak, moco, ", said)


@pytest.mark.parametrize("flags", ["", "--strong rand --weak moco --image-size 9 --split a --threshold 0.5"])
def test_evaluate_accepts_what_published_commands_carry(flags, train, call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    train("run", "--checkpoint", "mine.pth", "--method", "supervised")
    flags = ["--evaluate", "--anno-percent", "0.01", "--DA", "--checkpoint", "mine.pth", *flags.split()]
    monkeypatch.chdir(tmp_path)
    assert "* Acc@1 " in call(train_semi.main, *flags, "--workers", "0", "--device", "cpu")
