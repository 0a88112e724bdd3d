"""Downloading with the real hub client from a hub on loopback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.model.fake_hub import COMMIT, TOKEN, serve


@pytest.fixture
def repository(tiny_qwen2: Path, tmp_path: Path) -> Path:
    """What a repository on the hub holds: a model, and pickles that nobody should fetch."""
    shutil.copytree(tiny_qwen2, tmp_path / "repository")
    (tmp_path / "repository" / "pytorch_model.bin").write_bytes(b"pickle" * 99)
    (tmp_path / "repository" / "README.md").write_text("read me")
    return tmp_path / "repository"


def environment(address: str, home: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "SFT_ROOT": str(home.parent),
    }


def test_a_model_is_downloaded_without_pickles_and_then_works_offline(repository, tmp_path, command):
    home = tmp_path / "home"
    with serve(repository) as (address, requests):
        done = command("download_model", "--model", "lab/tiny", "--json", **environment(address, home))
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)
    assert (model["model"], model["revision"], model["kind"]) == ("lab/tiny", COMMIT, "causal")
    assert not [line for line in requests if "pytorch_model.bin" in line or "README" in line]
    names = sorted(path.name for path in Path(model["path"]).iterdir())
    assert names == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    offline = {**environment("http://127.0.0.1:9", home), "HF_HUB_OFFLINE": "1"}
    again = command("download_model", "--model", "lab/tiny", "--json", **offline)
    assert (again.returncode, json.loads(again.stdout)["path"]) == (0, model["path"])


def test_a_download_goes_on_with_the_files_that_are_missing(repository, tmp_path, command):
    home = tmp_path / "home"
    with serve(repository) as (address, requests):
        command("download_model", "--model", "lab/tiny", **environment(address, home))
        weights = next(home.rglob("snapshots/*/model.safetensors"))
        weights.resolve().unlink()
        requests.clear()
        done = command("download_model", "--model", "lab/tiny", "--json", **environment(address, home))
    assert done.returncode == 0, done.stderr
    assert weights.read_bytes() == (repository / "model.safetensors").read_bytes()
    fetched = [line.split()[1] for line in requests if line.startswith("GET") and "/resolve/" in line]
    assert [path.rsplit("/", 1)[1] for path in fetched] == ["model.safetensors"]


def test_a_gated_model_names_its_page_and_the_login_and_never_the_token(repository, tmp_path, command):
    home = tmp_path / "home"
    with serve(repository) as (address, _):
        bad = "hf_" + "wrongtoken000000000"
        done = command("download_model", "--model", "lab/gated", HF_TOKEN=bad, **environment(address, home))
        assert done.returncode == 2
        assert f"{address}/lab/gated" in done.stderr
        assert "hf auth login" in done.stderr
        assert bad not in done.stderr + done.stdout
        (tmp_path / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
        done = command("download_model", "--model", "lab/gated", **environment(address, home))
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stderr + done.stdout


def test_a_model_that_is_not_on_the_hub_is_an_error(repository, tmp_path, command):
    with serve(repository) as (address, _):
        done = command("download_model", "--model", "lab/nothing", **environment(address, tmp_path / "home"))
    assert done.returncode == 2
    assert "lab/nothing is neither a folder here nor a model on the hub" in done.stderr
    assert "Traceback" not in done.stderr
    gone = environment("http://127.0.0.1:9", tmp_path / "home")
    done = command("download_model", "--model", "lab/nothing", **gone)
    assert done.returncode == 2
    assert "the hub does not answer" in done.stderr
