"""YAML sets values and flags override them; unknown, mistyped and out-of-range settings are named."""

import dataclasses

import pytest

from util.config import MAY_CHANGE_ON_RESUME, Config, parse, to_dict, to_yaml
from util.errors import UserError


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_flags_override_yaml_and_yaml_overrides_defaults(config_file):
    config = parse(
        ["--config", config_file("lr: 0.5\nmu: 3\nwd: 1e-4"), "--mu", "4", "--labels-per-class", "9", "--DA"],
        "",
    )
    assert (config.lr, config.mu, config.labels_per_class, config.DA, config.wd) == (0.5, 4, 9, True, 1e-4)
    assert config.threshold == Config().threshold
    assert config.output_dir == "checkpoints/mine"


@pytest.mark.parametrize(
    "flags, name, value",
    [
        (["--lambda_in", "2"], "lambda_in", 2.0),
        (["--lambda-in", "2"], "lambda_in", 2.0),
        (["--lambda-in=2"], "lambda_in", 2.0),
        (["--DA"], "DA", True),
        (["--DA", "false"], "DA", False),
        (["--schedule", "3", "5"], "schedule", [3, 5]),
        (["--output-dir", "7"], "output_dir", "7"),
    ],
)
def test_every_spelling_of_a_flag_is_accepted(config_file, flags, name, value):
    assert getattr(parse(["--config", config_file(""), *flags], ""), name) == value


@pytest.mark.parametrize(
    "yaml_text, flags, words",
    [
        ("lamda_u: 1", [], ["'lamda_u'", "'lambda_u'", "mine.yaml"]),
        ("", ["--treshold", "1"], ["'--treshold'", "'--threshold'", "command line"]),
        ("", ["--da", "true"], ["'--da'", "'--DA'"]),
        ("epochs: many", [], ["epochs", "int", "'many'", "mine.yaml"]),
        ("epochs: 1.5", [], ["epochs", "int", "1.5"]),
        ("epochs: true", [], ["epochs", "int", "True"]),
        ("DA: 1", [], ["DA", "bool", "1"]),
        ("method: 3", [], ["method", "str", "3"]),
        ("lr: .nan", [], ["lr", "nan"]),
        ("lambda_u: .inf", [], ["lambda_u", "inf"]),
        ("schedule: 3", [], ["schedule", "list of int", "3"]),
        ("", ["--lr", "fast"], ["--lr", "float", "'fast'"]),
        ("", ["--lr"], ["--lr"]),
        ("", ["--epochs", "0"], ["epochs", "greater than 0"]),
        ("", ["--threshold", "2"], ["threshold", "between 0 and 1"]),
        ("", ["--tt", "0"], ["tt", "greater than 0"]),
        ("", ["--workers", "-1"], ["workers", "0 or more"]),
        ("", ["--device", "tpu"], ["device", "cpu"]),
        ("- a\n- b", [], ["mine.yaml", "list"]),
        ("a: [", [], ["mine.yaml", "not YAML"]),
    ],
)
def test_a_mistake_is_named_in_one_line(config_file, yaml_text, flags, words):
    with pytest.raises(UserError) as error:
        parse(["--config", config_file(yaml_text), *flags], "")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_missing_or_unreadable_config_file_is_a_user_error(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            parse(["--config", str(path)], "")
    with pytest.raises(UserError, match="--config"):
        parse([], "")


def test_the_resolved_config_reads_back_as_itself(config_file):
    config = parse(["--config", config_file("lr: 1e-3"), "--output-dir", "x"], "")
    assert parse(["--config", config_file(to_yaml(config))], "") == config
    assert Config(**to_dict(config)) == config


def test_every_field_has_a_help_text_and_may_change_lists_fields():
    assert all(f.metadata["help"] for f in dataclasses.fields(Config))
    assert MAY_CHANGE_ON_RESUME <= {f.name for f in dataclasses.fields(Config)}
