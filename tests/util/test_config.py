"""YAML sets values and flags override them; unknown, mistyped and out-of-range settings are named."""

import pytest
import yaml
from conftest import ROOT

from util.config import MAY_CHANGE_ON_RESUME, Config, changed_settings, parse, read_yaml, to_dict, to_yaml
from util.errors import UserError
from util.fields import FIELDS, SHORTHANDS


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


def test_a_config_with_other_flags_reads_back_as_the_same_run(config_file):
    """Also if a flag chooses another method, which leaves settings of the file without effect."""
    digits = str(ROOT / "configs" / "digits.yaml")
    config = parse(["--config", digits, "--method", "fixmatch", "--output-dir", "1e-4"], "")
    text = to_yaml(config)
    assert yaml.safe_load(text).keys() & {"lambda_u", "lambda_in", "strong", "schedule", "evaluate"} == {
        "lambda_u"
    }
    again = parse(["--config", config_file(text)], "")
    assert to_yaml(again) == text and changed_settings(to_dict(config), again) == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_published_config_reads_back_as_itself(path, config_file):
    config = parse(["--config", str(path)], "")
    assert parse(["--config", config_file(to_yaml(config))], "") == config


NUMBERS = [name for name, f in FIELDS.items() if f.type in (int, float, list[int])]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_lower_and_an_upper_bound(name, config_file):
    f = FIELDS[name]
    low, high = f.bounds
    flag = f"--{name.replace('_', '-')}"
    for value, bound in ((low - 1, low), (high * 1.5 if f.type is float else high + 1, high)):
        for where, argv in (
            (flag, ["--config", config_file(""), f"{flag}={value!r}"]),
            (
                f"{name} in ",
                ["--config", config_file(f"{name}: {[value] if f.type == list[int] else value}")],
            ),
        ):
            if f.type == list[int] and where == flag:
                argv[2:] = [flag, str(value)]
            if f.type != list[int] or value > 0:  # argparse takes -1 for a flag
                with pytest.raises(UserError, match="must be|expected") as error:
                    parse(argv, "")
                if value < 2**63:
                    wanted = "between 0 and 1" if (low, high) == (0, 1) else str(bound)
                    assert where in str(error.value) and wanted in str(error.value)
    assert not f.broken_rule([high] if f.type == list[int] else high)
    if f.valid[0] == "(":
        assert f.broken_rule(low) == f"greater than {low}"


@pytest.mark.parametrize(
    "field, known",
    [
        ("device", "auto, cpu or cuda"),
        ("precision", "fp32, bf16 or fp16"),
        ("device_views", "auto, on or off"),
        ("on_bad_image", "stop or skip"),
        ("on_save_error", "stop or continue"),
        ("other_ranks", "refuse or continue"),
        ("norm", "None or BN"),
    ],
)
def test_a_text_that_is_not_one_of_the_choices_is_refused_with_all_of_them(field, known, config_file):
    with pytest.raises(UserError, match=f"{field} in .*mine.yaml must be {known}, got 'other'"):
        parse(["--config", config_file(f"{field}: other")], "")


DIGITS = "dataset: digits\nlabels_per_class: 1\n"


@pytest.mark.parametrize(
    "text, flags, words",
    [
        # the data set does not use it
        (DIGITS, "--strong rand", ["--strong", "dataset digits", "imagenet, cifar10, cifar100 and folder"]),
        (DIGITS, "--randaug", ["--randaug", "dataset digits"]),
        (DIGITS, "--multicrop", ["--multicrop", "dataset digits"]),
        (DIGITS, "--strong no_such_view", ["--strong", "dataset digits"]),
        (DIGITS + "strong: rand", "", ["strong in ", "mine.yaml", "dataset digits"]),
        (DIGITS, "--weak moco", ["--weak", "dataset digits"]),
        (DIGITS, "--split simmatch-1p", ["--split", "dataset digits", "imagenet and folder"]),
        (DIGITS, "--image-size 32", ["--image-size", "dataset digits"]),
        (DIGITS, "--device-views off", ["--device-views", "dataset digits"]),
        (DIGITS, "--anno-percent 0.2", ["--anno-percent", "dataset digits"]),
        (DIGITS, "--data somewhere", ["--data", "dataset digits"]),
        (DIGITS, "--on-bad-image skip", ["--on-bad-image", "dataset digits", "imagenet and folder"]),
        ("dataset: cifar10", "--image-size 64", ["--image-size", "dataset cifar10"]),
        ("dataset: cifar10\nsplit: simmatch-1p", "", ["split in ", "dataset cifar10"]),
        ("", "--val somewhere", ["--val", "dataset imagenet", "it is for folder"]),
        ("", "--unlabeled somewhere", ["--unlabelled", "dataset imagenet"]),
        ("", "--val-share 0.1", ["--val-share", "dataset imagenet"]),
        # the method does not use it
        ("method: supervised", "--threshold 0.5", ["--threshold", "method supervised", "fixmatch"]),
        ("method: supervised", "--eman", ["--eman", "simmatch, simmatchv2 and fixmatch"]),
        ("method: simmatch_single", "--eman", ["--eman", "method simmatch_single"]),
        ("method: fixmatch\nlambda_in: 5", "", ["lambda_in in ", "method fixmatch", "simmatch_single"]),
        ("method: fixmatch\nDA: true", "", ["DA in ", "method fixmatch"]),
        # another setting takes its place
        ("DA: true\ncos: true", "--schedule 3 5", ["--schedule", "cos, which takes its place"]),
        ("cos_7_16: true\nschedule: [3]", "", ["schedule in ", "cos_7_16, which takes its place"]),
        ("da_len: 32", "", ["da_len in ", "without DA"]),
        ("", "--split a --labels-per-class 4", ["--labels-per-class", "split, which takes its place"]),
        ("", "--split a --anno-percent 0.5", ["--anno-percent", "split"]),
        ("", "--labels-per-class 4 --anno-percent 0.5", ["--anno-percent", "labels_per_class"]),
        ("dataset: folder", "--unlabelled u --anno-percent 0.5", ["--anno-percent", "unlabelled"]),
        ("dataset: folder", "--val v --val-share 0.5", ["--val-share", "val, which"]),
    ],
)
def test_a_setting_without_effect_is_refused_with_the_reason(text, flags, words, config_file):
    with pytest.raises(UserError, match="has no effect") as error:
        parse(["--config", config_file(text), *flags.split()], "")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), error.value


@pytest.mark.parametrize(
    "text, flags",
    [
        (DIGITS + "strong: moco\nlambda_u: 3", ""),  # the default
        (
            DIGITS + "lambda_in: 5\nDA: true\nda_len: 9",
            "--method fixmatch",
        ),  # a flag changes the file's choice
        ("lambda_in: 5\nthreshold: 0.5", "--method supervised"),
        ("image_size: 64\nstrong: rand", "--dataset cifar10"),
        ("val_share: 0.5", "--dataset folder"),  # without effect in the file alone, but not with the flag
        ("dataset: folder\nval_share: 0.1\nanno_percent: 0.2", "--val v --unlabelled u"),
        ("anno_percent: 0.01", "--split simclr-1p"),
        ("anno_percent: 0.01\ncos: true", "--labels-per-class 2"),
        ("schedule: [3]", "--cos"),
        ("DA: true\nda_len: 9", "--DA false"),
        (DIGITS, "--split  --strong moco"),
        (DIGITS + "method: supervised", "--mu 3 --dim 64 --ema-m 0.9"),
    ],
)
def test_settings_that_are_accepted(text, flags, config_file):
    parse(
        ["--config", config_file(text), *flags.split(" ")] if flags else ["--config", config_file(text)], ""
    )


@pytest.mark.parametrize("flags", ["--norm BN", "--start-epoch 3", "--port 1234", "--cos --schedule 120 160"])
def test_flags_of_published_commands_are_accepted(flags):
    parse(["--checkpoint", "a.pth", *flags.split()], "")


def test_evaluation_accepts_every_flag():
    flags = "--DA --lambda_in 5 --cos --schedule 3 --da-len 7 --anno-percent 0.01 --split a --val v --eman"
    assert parse(
        ["--evaluate", "--checkpoint", "a.pth", "--method", "supervised", *flags.split()], ""
    ).evaluate


def test_a_config_of_an_earlier_version_holds_every_field_and_is_accepted(config_file):
    settings = {
        **to_dict(Config()),
        "dataset": "digits",
        "method": "fixmatch",
        "lambda_in": 5.0,
        "strong": "rand",
    }
    path = config_file(yaml.safe_dump(settings, sort_keys=False))
    assert parse(["--config", path], "").method == "fixmatch" and Config(**read_yaml(path)).lambda_in == 5.0


def test_settings_without_effect_do_not_make_another_run():
    config = Config(dataset="digits", method="fixmatch", labels_per_class=4)
    before = {**to_dict(config), "strong": "rand", "lambda_in": 5.0, "schedule": [3], "workers": 0}
    assert changed_settings({**before, "schedule": config.schedule}, config) == []
    assert changed_settings(before, config) == ["schedule was [3] and is now [120, 160]"]
    assert changed_settings(yaml.safe_load(to_yaml(config)), config) == []
    del before["momentum"]  # of a version that did not have this setting yet
    assert changed_settings(before, config) == ["schedule was [3] and is now [120, 160]"]
    assert changed_settings({**before, "threshold": 0.5}, Config(**{**before, "cos": True})) == [
        "cos was False and is now True",
        "threshold was 0.5 and is now 0.7",
    ]


@pytest.mark.parametrize(
    "flag, near",
    [
        ("--lernrate", "--learning-rate"),
        ("--lerning_rate=3", "--learning-rate"),
        ("--weightdecay", "--weight-decay"),
        ("--unlabeld", "--unlabeled"),
        ("--rand-aug", "--randaug"),
        ("--confg", "--config"),
        ("--Lambda-U", "--lambda-u"),
        ("--batch", "--batch-size"),
        ("--warmup", "--warmup-epoch"),
        ("--num-workers", "--workers"),
    ],
)
def test_the_nearest_flag_is_suggested_among_all_spellings(flag, near):
    with pytest.raises(
        UserError, match=f"unknown flag '{flag.split('=')[0]}' .* the nearest known one is '{near}'"
    ):
        parse([flag], "")


@pytest.mark.parametrize("flag", "--wandb --amp --gpu --resume --dist-url --arch --xyz --temperature".split())
def test_no_flag_is_suggested_if_none_is_near(flag):
    with pytest.raises(
        UserError, match=f"unknown flag '{flag}' .*no known one is near; --help lists every flag"
    ):
        parse([flag], "")


@pytest.mark.parametrize("key, near", [("lamda_u", "lambda_u"), ("learning_rate", "lr"), ("lernrate", "lr")])
def test_the_nearest_key_is_suggested_as_a_key(key, near, config_file):
    with pytest.raises(
        UserError, match=f"unknown key '{key}' in .*mine.yaml; the nearest known one is '{near}'"
    ):
        parse(["--config", config_file(f"{key}: 1")], "")
    with pytest.raises(UserError, match="no known one is near"):
        parse(["--config", config_file("wandb: 1")], "")


def test_a_word_that_is_no_flag_is_named():
    with pytest.raises(UserError, match="unexpected 'digits' on the command line.*--config FILE"):
        parse(["digits"], "")


def test_tables_name_fields():
    assert {name for name, _ in SHORTHANDS.values()} <= FIELDS.keys()


def test_every_field_has_a_help_text_and_may_change_lists_fields():
    assert all(f.help for f in FIELDS.values())
    assert MAY_CHANGE_ON_RESUME <= FIELDS.keys()
