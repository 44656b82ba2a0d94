"""benchmark/kill_campaign.py: four of its kills; and any two runs that differ are found to differ."""

import json

import pytest
import torch

from benchmark.kill_campaign import KINDS, Case, campaign, table
from benchmark.same_run import difference
from util.config import Config, to_dict


@pytest.mark.slow(60)
def test_four_kills_are_survived_to_the_same_bits(tmp_path):
    kills, differences = campaign(
        4, 0, tmp_path, [Case("simmatch"), Case("fixmatch", eman=True, ranks=2)], jobs=2
    )
    assert sorted(kill.kind for kill in kills) == sorted(KINDS)
    assert all(kill.survived for kill in kills) and len(differences) >= 2 and set(differences) == {""}
    assert f"4/4 survived; {len(differences)}/{len(differences)} runs ended bit-equal" in table(
        kills, differences
    )


def run_folder(folder, loss=1.0, speed=5.0, weight=0.0, lr=0.1, workers=0):
    folder.mkdir()
    (folder / "log.jsonl").write_text(
        json.dumps({"event": "train", "step": 2, "loss": loss, "images_per_s": speed}) + "\n"
    )
    for name in ("best.pth", "last.pth"):
        torch.save(
            {
                "config": to_dict(Config(workers=workers, output_dir=str(folder), save_freq=workers)),
                "sha256": str(folder),
                "method": {"w": torch.tensor([1.0, weight])},
                "optimizer": {"param_groups": [{"lr": lr}]},
            },
            folder / name,
        )
    return folder


def test_any_bit_that_differs_is_found(tmp_path):
    whole = run_folder(tmp_path / "whole")
    assert difference(whole, run_folder(tmp_path / "faster", speed=9.0, workers=2)) == ""
    for number, (other, where) in enumerate(
        [
            ({"loss": 1.5}, "log.jsonl, line 1"),
            ({"weight": -0.0}, "best.pth['method']['w']"),
            ({"lr": 0.2}, "best.pth['optimizer']['param_groups'][0]['lr']"),
        ]
    ):
        assert difference(whole, run_folder(tmp_path / str(number), **other)).startswith(where)
    longer = run_folder(tmp_path / "longer")
    (longer / "log.jsonl").write_text(2 * (longer / "log.jsonl").read_text())
    assert difference(whole, longer) == "log.jsonl: 1 and 2 lines"
    (later := torch.load(longer / "last.pth"))["method"]["w"] += 1
    (longer / "log.jsonl").write_text((whole / "log.jsonl").read_text())
    torch.save(later, longer / "last.pth")
    assert difference(whole, longer) == "last.pth['method']['w']"
