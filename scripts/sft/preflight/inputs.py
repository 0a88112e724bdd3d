"""Checks of what goes in: config, rows, model files, template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.config import paths
from sft.errors import ConfigError, SftError, TemplateError
from sft.model.files import ModelFiles
from sft.preflight.case import Case, Finding, Level


def config(case: Case) -> Iterator[Finding]:
    """Loads the config; every mistake in it is a finding."""
    from sft.config.load import load

    try:
        loaded = load(case.config_path, case.sets, root=case.root)
    except ConfigError as error:
        for problem in error.problems or [error]:
            where = f" ({problem.where})" if problem.where else ""
            yield Finding("error", "config", problem.what + where, problem.mend)
        return
    case.config = loaded.config
    tuning, model = loaded.config.tuning, loaded.config.model
    named = paths.shown(case.config_path, case.root)
    yield Finding("ok", "config", f"{named}: {tuning.mode} of {model.name} with {tuning.backend}")


def data(case: Case) -> Iterator[Finding]:
    """The rows of the stage that training would take, counted; the first one read."""
    if case.config is None:
        return
    from sft.data import mix, store

    data = case.config.data
    processed = paths.resolve(case.root, data.processed_dir) / "train.jsonl"
    if data.train_path is None and data.stage in ("auto", "processed") and not processed.exists():
        raw = mix.find(data, case.root)
        yield Finding("warning", "data", f"{raw.name} is there ({raw.kind}), but not processed yet", "make process")
        return
    stage = store.paths(data, case.root)
    splits = (("train", stage.train), ("val", stage.val), ("test", stage.test))
    counts = {name: store.count(path) for name, path in splits if path is not None}
    said = ", ".join(f"{name} {rows}" for name, rows in counts.items())
    if not counts["train"]:
        yield Finding("error", "data", f"{paths.shown(stage.train, case.root)} has no rows", "make process")
        return
    next(iter(store.iter_rows(stage.train)))
    level: Level = "ok" if counts.get("val") else "warning"
    mend = None if counts.get("val") else "without validation rows no best checkpoint is chosen: raise data.split.val"
    yield Finding(level, "data", f"{stage.name} rows: {said}", mend)


def model(case: Case) -> Iterator[Finding]:
    """The model's files here, or on the hub; nothing is fetched or loaded."""
    if case.config is None:
        return
    from sft import credentials
    from sft.model import hub

    section = case.config.model
    folder = hub.local_folder(section.name, case.root) or hub.cached(section.name, section.revision)
    place = credentials.find(case.root)[1]
    if folder is not None:
        offline = hub.local_folder(section.name, case.root) is not None or hub.offline()
        try:
            case.files = _whole(section, folder)
        except SftError:
            if offline:
                raise
            yield Finding("warning", "model", f"{section.name} is in the cache in part", "make download-model")
            return
        size = f"{case.files.size} parameters, {case.files.kind}"
        yield Finding("ok", "model", f"{section.name}: {size}, all files whole")
    elif hub.offline():
        yield Finding("error", "model", f"{section.name} is not here, and HF_HUB_OFFLINE is set", "make download-model")
    elif not hub.reachable(1.5):
        mend = "mend the network, or --set model.name=models/demo"
        yield Finding("error", "model", f"{section.name} is not here, and the hub does not answer", mend)
    else:
        case.to_fetch = hub.peek(section, case.root, timeout=1.5).bytes
        said = f"{section.name} is on the hub: {case.to_fetch / 1e9:.2f} GB to fetch"
        yield Finding("warning", "model", said, "make download-model (train fetches it too)")
    yield Finding("ok", "hub token", f"from {place}" if place else "none (needed for gated and private models only)")


def _whole(section: Any, folder: Path) -> ModelFiles:
    from sft.model import files, kinds

    config = files.read_config(folder, section.name)
    kind = kinds.kind_of(config, section.type, name=section.name)
    found = files.ModelFiles(folder, section.name, section.revision, config, kind)
    _ = found.weights
    return found


def template(case: Case) -> Iterator[Finding]:
    """Compiles the template and renders a turn with it: does the answer stand in it, does the question."""
    if case.config is None or case.files is None:
        return
    from sft.chat.sources import load_template
    from sft.preflight.stand_in import Tokenizer

    template = load_template(case.config.data, Tokenizer(case.files.path), case.root)  # type: ignore[arg-type]
    question, answer = "what-was-asked", "what-was-answered"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = template.render(messages)
    for part, shown in (("answer", answer), ("question", question)):
        if shown not in text:
            raise TemplateError(
                f"the template never shows the {part}", where=template.name, mend="make preview shows what it writes"
            )
    prompt = template.render(messages[:1], add_generation_prompt=True)
    if answer in prompt or not text.startswith(prompt.rstrip()):
        said = f"{template.name}: what the model is asked is not how a trained row begins"
        yield Finding("warning", "template", said, "make preview shows both")
        return
    yield Finding("ok", "template", f"{template.name} shows question and answer")
