"""The smoke test of a merged model: where it is loaded, and which row it answers."""

from __future__ import annotations

import torch

from sft.data import rows as records
from sft.errors import TemplateError
from sft.model import hardware, load
from sft.ship import verify
from sft.ship.merge import merge
from tests.ship.test_merge import adapter


def test_weights_too_large_for_the_gpu_are_opened_on_the_cpu_as_they_are_stored(tmp_path, tiny_qwen2, monkeypatch):
    """A 7B in 16 bits that was trained on a card of 8 GiB: it must not be refused after the merge."""
    opened = {}
    gpu = hardware.Hardware("cuda", "small", (8, 6), 8 << 30, 100_000, True, 1)
    load_base = load.load_base

    def watched(files, section, tuning, dtype, **settings):
        opened.update(dtype=dtype, **settings)
        return load_base(files, section, tuning, dtype, **settings)

    merge(adapter(tiny_qwen2, tmp_path / "a"), tmp_path / "m", "fp16", tmp_path)
    monkeypatch.setattr(hardware, "probe", lambda: gpu)
    monkeypatch.setattr(load, "load_base", watched)
    answer = verify.smoke_test(tmp_path / "m", "Who are you?", tmp_path)
    assert (opened["device"], opened["quantise"], opened["dtype"]) == ("cpu", False, torch.float16)
    assert answer.device == "cpu"
    assert answer.summary().endswith("on cpu")


def test_a_held_out_row_that_the_template_refuses_is_skipped():
    rows = [{"user": user, "assistant": "x"} for user in ("refused", "taken")]

    def prompt(row):
        if records.question(row) == "refused":
            raise TemplateError("no prompt can be rendered")
        return [1], 0

    row = verify.first_row(rows, prompt)
    assert row is not None
    assert row["user"] == "taken"
