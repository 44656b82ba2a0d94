"""YAML of config files: what a plain text is, and what is refused, with the line."""

import os

import pytest
import yaml

from util.config import parse, read_yaml
from util.config_file import read_mapping, to_text
from util.errors import UserError


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "mine.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.mark.parametrize(
    "text, value",
    [
        ("1", 1),
        ("-3", -3),
        ("0", 0),
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        (".5", 0.5),
        ("5.", 5.0),
        ("true", True),
        ("False", False),
        ("", None),
        ("null", None),
        ("[120, 160]", [120, 160]),
        ("\n- 1\n- 2", [1, 2]),
        ("[]", []),
        ("'1'", "1"),
        ('"true"', "true"),
        ("a b # comment", "a b"),
        # YAML 1.1 reads each of these as another value
        ("0123", "0123"),
        ("0x1F", "0x1F"),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("yes", "yes"),
        ("Off", "Off"),
        ("2020-01-01", "2020-01-01"),
        ("=", "="),
        ("<<", "<<"),
    ],
)
def test_a_plain_text_is_a_decimal_number_a_boolean_or_itself(file, text, value):
    found = read_mapping(file(f"key: {text}"))["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "line, words",
    [
        ("epochs: 0123", ["epochs in", "int", "decimal", "'0123'"]),
        ("epochs: 1:30", ["epochs in", "'1:30'"]),
        ("epochs: 0x10", ["epochs in", "'0x10'"]),
        ("epochs: 1_000", ["epochs in", "'1_000'"]),
        ("epochs: '0123'", ["epochs in", "'0123'"]),
        ("epochs: 99999999999999999999", ["epochs in", "int"]),
        ("schedule: [60, 0120]", ["schedule in", "'0120'"]),
        ("lr: 0123", ["lr in", "float", "'0123'"]),
        ("lr: 1:30", ["lr in", "'1:30'"]),
        ("lr: 1_0.5", ["lr in", "'1_0.5'"]),
        ("lr: 1e999", ["lr in", "inf"]),
        ("DA: yes", ["DA in", "true or false", "'yes'"]),
        ("DA: off", ["DA in", "'off'"]),
        ('data: "a\\0b"', ["data in", "str"]),
        ("lr: 0.1\nmu: 2\nlr: 0.2", ["line 3", "the key 'lr' is already in line 1"]),
        ("lr: &a 0.1\nwd: *a", ["line 1", "anchors and aliases"]),
        ("lr: *a", ["line 1", "anchors and aliases"]),
        ("lr: !!float 1", ["line 1", "tags", "float"]),
        ("data: !!python/object/apply:os.system [ls]", ["line 1", "tags"]),
        ("mu: {a: 1}", ["line 1", "'mu' is nested"]),
        ("schedule: [[1]]", ["line 1", "'schedule' is nested"]),
        ("? [a]\n: 1", ["line 1", "'key: value'"]),
        ("<<: {mu: 1}", ["line 1", "'<<' is nested"]),
        ("a: 1\n---\nb: 2", ["line 2", "second document"]),
        ("text", ["line 1", "'key: value'", "text"]),
        ("mu: 1\n  nu: 2", ["not YAML"]),
        ("mu: \x07", ["not YAML"]),
        ('"a\\nb": 1\n"a\\nb": 2', ["line 2", "already in line 1"]),
        (f"epochs: {'x' * 5000}", ["epochs in", "got 'xxx"]),
        (f"{'x' * 1000}: 1", ["unknown key 'xxx"]),
    ],
)
def test_what_a_config_does_not_need_is_refused_in_one_line(file, line, words):
    with pytest.raises(UserError) as error:
        read_yaml(file(line))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    for word in ["mine.yaml", *words]:
        assert word in str(error.value), error.value


@pytest.mark.parametrize(
    "content, words",
    [
        (b"mu: 1\0", "NUL"),
        (b"mu: \xff", "UTF-8"),
        (b"\xff\xfem\0u\0", "UTF-8"),
        (b"mu: 1\n" + b"#" * 200_000, "200,006 bytes"),
        (b"mu: " + b"[" * 90_000, "nested"),
        (b"mu: " + b"{a: " * 20_000, "nested"),
        (b"".join(b" " * n + b"a:\n" for n in range(400)), "nested"),
        (b"- " * 40_000, "got a list"),
    ],
)
def test_files_that_would_exhaust_a_reader_are_refused(file, content, words):
    with pytest.raises(UserError, match=words) as error:
        read_yaml(file(content))
    assert "mine.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_pipe_a_device_and_a_folder_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(UserError, match=f"{path} is a .*, not a regular file"):
            parse(["--config", str(path)], "")


@pytest.mark.parametrize("content", ["", "# a comment\n", "---\n", "{}", "null"])
def test_a_file_without_settings_is_empty(file, content):
    assert read_mapping(file(content)) == {}


def test_what_is_written_reads_back_here_and_with_every_reader(file):
    texts = "1e-4 0123 1:30 yes null ~ -1 .5 0x1F 1_000 true = << a:b #x {a} &a *a !t 2020-01-01 é".split()
    texts += ["", " a ", "a\nb", "- a", "a: b", "'", '"', "\t", "x" * 300, "\udc80"]
    values = {f"key{k}": text for k, text in enumerate(texts)}
    values |= {"i": 3, "f": 1e-5, "g": 1e22, "t": True, "n": None, "l": [1, 2], "e": []}
    text = to_text(values)
    assert read_mapping(file(text)) == values == yaml.safe_load(text)
