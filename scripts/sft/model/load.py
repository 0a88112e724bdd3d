"""Loads the base model, full precision or 4-bit, on GPU or CPU; refuses what would leave weights random."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sft.errors import EnvironmentProblem, ModelError, one_line
from sft.model import hardware
from sft.model.files import ModelFiles

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sft.config.schema import ModelSection, TuningSection


log = logging.getLogger("sft.model")


def load_base(
    files: ModelFiles,
    model: ModelSection,
    tuning: TuningSection,
    dtype: torch.dtype,
    *,
    device: str,
    train: bool,
    attention: str | None = None,
    quantise: bool = True,
    sharded: bool = False,
) -> PreTrainedModel:
    """The base model on `device`, with `dtype` as its weights' (or, where 4-bit, its other tensors' and sums') type.

    4-bit where `tuning.mode` is qlora and `quantise`; sharded: stored so that ranks can share it. attention: the
    attention function to use where `model.attn_implementation` is auto. With `train` false the model is in eval mode
    with its cache on. The model keeps `files.name` as its `name_or_path` and its fingerprint as `sft_base`, which
    `adapters` compares.

    Raises ModelError (incomplete, other shapes than config.json says, already quantised), EnvironmentProblem (memory).
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    method = files.quantised
    if method and not (method == "bitsandbytes" and tuning.mode == "qlora" and quantise):
        raise ModelError(
            f"the weights of {files.name} are stored quantised ({method})",
            where="model.name",
            fix="name the full-precision model: qlora makes its own 4-bit weights from it, and merging needs it",
        )
    if model.trust_remote_code:
        log.warning(f"model.trust_remote_code is on: code that comes with {files.name} runs on this machine")
    _ = files.weights
    quiet_libraries()
    settings: dict[str, Any] = {
        "dtype": dtype,
        "device_map": {"": placement(model.device_map, device)},
        "use_safetensors": True,
        "local_files_only": True,
        "trust_remote_code": model.trust_remote_code,
        "output_loading_info": True,
    }
    if implementation := attention if model.attn_implementation == "auto" else model.attn_implementation:
        settings["attn_implementation"] = implementation
    if tuning.mode == "qlora" and quantise and not method:
        settings["quantization_config"] = four_bit_config(tuning, dtype, sharded=sharded)
    family = AutoModelForSeq2SeqLM if files.kind == "seq2seq" else AutoModelForCausalLM
    try:
        loaded, report = family.from_pretrained(files.path, **settings)
    except Exception as error:
        raise _as_our_error(files, error) from error
    _refuse_missing_weights(files, report)
    keep_4bit_layout(loaded)
    mark(loaded, files)
    loaded.config.use_cache = not train
    loaded.train(train)
    return loaded  # type: ignore[no-any-return]


def mark(model: Any, files: ModelFiles) -> None:
    """Notes on the model which base it is; its adapters are saved with that note."""
    model.name_or_path = files.name
    model.sft_base = {"name": files.name, "revision": files.revision, "fingerprint": files.fingerprint()}


def placement(device_map: str, device: str) -> str:
    """The device that the whole model goes to; under several processes each takes the GPU of its own rank."""
    if device_map not in ("auto", "cuda"):
        return device_map
    return f"cuda:{hardware.local_rank()}" if device.startswith("cuda") else "cpu"


def four_bit_config(tuning: TuningSection, dtype: torch.dtype, *, sharded: bool = False) -> Any:
    """transformers' settings for 4-bit weights that compute in `dtype`. sharded: their bytes are stored as numbers of
    that type, as FSDP shards floats alone.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=tuning.quant_type,
        bnb_4bit_use_double_quant=tuning.double_quant,
        bnb_4bit_compute_dtype=dtype,
        **({"bnb_4bit_quant_storage": dtype} if sharded else {}),
    )


def keep_4bit_layout(model: Any) -> None:
    """Stops bitsandbytes from repacking 4-bit weights at the first evaluation on CPUs with AVX512-BF16.

    The packed form has no backward pass (0.50.2: `matmul_4bit` returns `gemv_4bit`'s result without a gradient), so
    training after an evaluation would go on with zero gradients, and the base's bytes would have changed.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quiet_libraries() -> None:
    """Silences bitsandbytes and transformers while they load, their progress bars included."""
    from transformers.utils.logging import disable_progress_bar

    for name in ("bitsandbytes.backends.cpu.ops", "transformers.distributed.tensor_parallel"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()


def _refuse_missing_weights(files: ModelFiles, report: Any) -> None:
    """transformers fills missing weights with random numbers and goes on; here that is an error."""
    missing = sorted(report["missing_keys"]) + [str(entry[0]) for entry in report["mismatched_keys"]]
    if missing:
        raise ModelError(
            f"{files.name} has no weights for {len(missing)} tensors that its config.json requires"
            f" ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); they would be random",
            where=str(files.path),
            fix=f"download it again (make download-model MODEL={files.name}), or choose a model with a language head",
        )
    if unused := sorted(report["unexpected_keys"]):
        log.warning(f"{len(unused)} tensors of {files.name} are not used by its architecture, e.g. {unused[0]}")


def _as_our_error(files: ModelFiles, error: Exception) -> Exception:
    """transformers' error as ours, with its fix."""
    message = one_line(error, 400)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return EnvironmentProblem(
            f"there is not enough memory to load {files.name}: {message}",
            fix="make plan shows what fits; a smaller model, or tuning.mode: qlora",
        )
    what, where, fix = f"{files.name} cannot be loaded: {type(error).__name__}: {message}", str(files.path), None
    if "trust_remote_code" in message:
        what, where = f"{files.name} comes with code of its own", "model.name"
        fix = "if you trust its authors: --set model.trust_remote_code=true"
    elif "attention" in message.lower() or "attn_implementation" in message:
        what, where, fix = message, "model.attn_implementation", "--set model.attn_implementation=eager"
    return ModelError(what, where=where, fix=fix)


def empty_4bit_weight(weight: Any, dtype: torch.dtype, codes: dict[str, torch.Tensor]) -> torch.nn.Parameter:
    """Packed 4-bit storage with bitsandbytes' state: blocks of 64, their scales in blocks of 256. For the planner."""
    import torch
    from bitsandbytes.functional import QuantState

    blocks, nested = -(-weight.numel() // 64), weight.compress_statistics
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=64,
        quant_type=weight.quant_type,
        dtype=dtype,
    )
    if nested:
        code = codes.setdefault("map", torch.empty(256))
        state.state2 = QuantState(torch.empty(-(-blocks // 256)), code=code, blocksize=256, dtype=torch.float32)
        state.offset, state.nested = torch.empty(()), True
    storage = weight.quant_storage
    size = -(-weight.numel() // 2 // storage.itemsize)
    packed: Any = torch.nn.Parameter(torch.empty((size, 1), dtype=storage), requires_grad=False)
    packed.quant_state, packed.quant_type, packed.compress_statistics = state, weight.quant_type, nested
    return packed  # type: ignore[no-any-return]
