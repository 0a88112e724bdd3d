"""The disk space that a run needs, checked before weights are loaded."""

from __future__ import annotations

from sft import files
from sft.config.auto import optimizer_state
from sft.config.schema import Config
from sft.model.files import ModelFiles, tensors
from sft.runs import Run

LOGS = 32 * 2**20  # log.jsonl, event files, ledger, settings
_TABLES = ("embed", "wte", "wpe", "shared", "lm_head")  # 2-D tensors that "all-linear" leaves alone


def parts(config: Config, model: ModelFiles) -> dict[str, int]:
    """Bytes of each part at the moment of the greatest need: while a checkpoint is written beside the others.

    A checkpoint is the trained weights in float32 and the optimizer's state. LoRA trains r * (rows + columns) numbers
    of every linear layer.
    """
    train, full = config.train, config.tuning.mode == "full"
    numbers = model.parameters
    if not full:
        shapes = {name: entry["shape"] for path in model.weights for name, entry in tensors(path).items()}
        linear = [s for name, s in shapes.items() if len(s) == 2 and not any(table in name for table in _TABLES)]
        lora = config.tuning.lora
        rank = max(lora.r, *lora.rank_pattern.values(), 0) * (2 if lora.from_weights else 1)
        numbers = int(rank * sum(map(sum, linear)))
    beside = sum(path.stat().st_size for path in model.path.glob("*") if "token" in path.name or "vocab" in path.name)
    moments, size = optimizer_state(train.optim)
    moments += train.optim.startswith("schedule_free")  # the weights of training beside the averaged ones
    checkpoint = numbers * (4 + moments * size) + 2**20
    checkpoints = train.save_total_limit if train.save_strategy != "no" else 0
    best = train.load_best_model_at_end and train.eval_strategy != "no"
    return {
        "checkpoints": checkpoint * (checkpoints + 1),
        "best checkpoint": checkpoint if best else 0,
        "model" if full else "adapter": numbers * 4 + beside,
        "merged model": model.parameters * 2 if train.merge_at_end and not full else 0,
        "Fisher information": numbers * 4 if train.ewc.strength else 0,
        "logs": LOGS,
    }


def require_disk_space(config: Config, model: ModelFiles, run: Run) -> dict[str, int]:
    """The bytes of each part, less the run's older checkpoints. Raises EnvironmentProblem if they are not free."""
    needed = parts(config, model)
    on_disk = sum(files.size(path) for path in run.checkpoints()) if run.folder.is_dir() else 0
    needed["checkpoints"] = max(0, needed["checkpoints"] - on_disk)
    items = ", ".join(f"{name} {files.format_bytes(size)}" for name, size in needed.items() if size)
    fix = "free space (old runs: outputs/), --set train.save_total_limit=1, or another train.output_dir"
    files.require_free(run.folder, sum(needed.values()), "the run", fix=fix, items=items)
    return needed
