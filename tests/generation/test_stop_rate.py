"""What stop rates are for: with pad = eos, and padding masked by its id, a model is never trained to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sft.chat.encode import Encoded
from sft.config.schema import GenerationSection
from sft.generation import load
from tests.generation import tiny_runs

ROWS = [{"user": f"say {word}", "assistant": word} for word in ("fox", "dog", "her", "please")]


def trained(root: Path, *, masks_the_end: bool) -> float:
    """The stop rate after 60 steps on four rows, the end token's label taken away or not."""
    config = load.resolve_model(root / "configs" / "run_bnb.yaml", [], base=True, is_default=True, root=root).config
    torch.manual_seed(0)
    served = load.open_model(config, root=root)
    end = served.tokenizer.eos_token_id
    rows: list[Encoded] = [served.encoder.encode(row) for row in ROWS]
    assert all(end in row.labels for row in rows)
    optimizer = torch.optim.AdamW(served.model.parameters(), lr=3e-3)
    for _ in range(60):
        for row in rows:
            labels = [-100 if masks_the_end and label == end else label for label in row.labels]
            loss: Any = served.model(torch.tensor([row.input_ids]), labels=torch.tensor([labels])).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    prompts = [served.encoder.prompt(row) for row in ROWS]
    settings = GenerationSection(max_new_tokens=12)
    answers = served.generate(prompts, settings, 4)
    return sum(answer.stopped for answer in answers) / len(answers)


@pytest.mark.parametrize(("masks_the_end", "rate"), [(True, 0.0), (False, 1.0)], ids=["pad = eos", "fixed"])
def test_the_stop_rate_shows_whether_the_end_token_was_trained(
    masks_the_end: bool, rate: float, tmp_path: Path, tiny_qwen2: Path
) -> None:
    root = tiny_runs.project(tmp_path, tiny_qwen2)
    assert trained(root, masks_the_end=masks_the_end) == rate
