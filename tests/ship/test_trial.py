"""The question that a merged model is asked, where its run's rows are odd."""

from __future__ import annotations

import json

from sft.config.schema import Config
from sft.data import rows as records
from sft.errors import TemplateError
from sft.ship import verify


def test_a_held_out_row_that_the_template_refuses_is_passed_over(tmp_path):
    (tmp_path / "data" / "processed").mkdir(parents=True)
    rows = [{"user": user, "assistant": "x"} for user in ("refused", "taken")]
    for split in ("train", "val"):
        path = tmp_path / "data" / "processed" / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def prompt(row):
        if records.question(row) == "refused":
            raise TemplateError("no prompt can be made")
        return [1], 0

    found = verify._held_out(prompt, Config(), tmp_path)
    assert found is not None
    assert found[1].source == "taken"
