"""What is shipped: every configuration loads, the reference page is the schema's, and nothing here imports torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import train
from sft.config import load as paths
from sft.config import reference
from sft.config.auto import Facts, resolve
from sft.config.load import load
from sft.config.schema import Config
from tests.conftest import ROOT

SHIPPED = sorted(path for path in (ROOT / "configs").glob("**/*.yaml") if path.name != "local.yaml")
NAMES = {
    "config_base", "run_bnb", "run_unsloth", "demo_cpu", "alpaca", "chat", "seq2seq_full", "card_8gb", "card_12gb",
    "card_16gb", "card_24gb", "edugen_240", "smollm2_cpu",
}  # fmt: skip


def test_the_promised_configurations_are_there() -> None:
    assert {path.stem for path in SHIPPED} >= NAMES


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("facts", [Facts("cpu"), Facts("cuda", (7, 5))], ids=["cpu", "old-gpu"])
def test_every_shipped_configuration_loads_and_leaves_the_step_to_the_machine(path: Path, facts: Facts) -> None:
    loaded = load(path, root=ROOT)
    assert not loaded.is_set("train.batch_size") and not loaded.is_set("train.grad_accum")
    assert path.stem == "demo_cpu" or not (loaded.is_set("train.bf16") or loaded.is_set("train.fp16"))
    assert "auto" not in resolve(loaded.config, facts).config.train.model_dump().values()


def test_run_configurations_have_their_own_folders() -> None:
    folders = [load(path, root=ROOT).config.train.output_dir for path in SHIPPED if path.stem != "config_base"]
    assert len(set(folders)) == len(folders)
    assert {"outputs/run-bnb", "outputs/run-unsloth", "outputs/demo"} <= set(folders)


def test_the_base_restates_defaults_and_nothing_else() -> None:
    assert load(ROOT / "configs" / "config_base.yaml", root=ROOT).config == Config()


def test_every_key_has_a_meaning_and_the_page_is_up_to_date() -> None:
    assert [field.key for field in reference.table().values() if len(field.description) < 10] == []
    assert (ROOT / "docs" / "CONFIG.md").read_text(encoding="utf-8") == reference.markdown()


def test_the_page_has_one_row_for_every_key() -> None:
    rows = [line.split("`")[1] for line in reference.markdown().splitlines() if line.startswith("| `")]
    assert rows == [f.key for f in reference.table().values() if not f.section or f.nullable]
    row = "| `train.max_steps` | a whole number (at least 1) or null | `null` |"
    assert sum(line.startswith(row) for line in reference.markdown().splitlines()) == 1


def test_the_reference_command_writes_and_checks(command, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    page = tmp_path / "CONFIG.md"
    page.write_text("old", encoding="utf-8")
    stale = command("config_reference", "--check", "--out", page)
    assert stale.returncode == 2 and "does not match the schema" in stale.stderr and page.read_text() == "old"
    assert command("config_reference", "--out", page).returncode == 0
    assert page.read_text(encoding="utf-8") == reference.markdown()
    assert command("config_reference", "--check", "--out", page).returncode == 0


def test_loading_a_configuration_imports_nothing_heavy() -> None:
    code = (
        "import sys, pathlib; from sft.config import auto, load, reference;"
        f"load.load({str(ROOT / 'configs/demo_cpu.yaml')!r}, root=pathlib.Path({str(ROOT)!r}));"
        "print(sorted({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "scripts", check=True
    )
    assert done.stdout.strip() == "[]"


def test_accelerate_files_leave_the_precision_to_the_run() -> None:
    one, two, shared, zero = (
        yaml.safe_load((ROOT / f"env/accelerate_{name}.yaml").read_text())
        for name in ("config", "ddp_2", "fsdp_2", "deepspeed_2")
    )
    assert (one["num_processes"], one["distributed_type"], one["mixed_precision"]) == (1, "NO", "no")
    assert (two["num_processes"], two["distributed_type"], two["mixed_precision"]) == (2, "MULTI_GPU", "no")
    assert (shared["num_processes"], shared["distributed_type"], shared["mixed_precision"]) == (2, "FSDP", "no")
    assert (zero["num_processes"], zero["distributed_type"], zero["mixed_precision"]) == (2, "DEEPSPEED", "no")


def test_files_for_several_machines_start_what_accelerate_and_torchrun_accept(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from torch.distributed.run import get_args_parser

    own = ["--config", "configs/run_bnb.yaml", "--set", "experiment.name=two words"]
    several = ROOT / "env/accelerate_multinode.yaml"
    loaded = load_config_from_file(str(several))  # refuses a key that it does not know
    assert (loaded.num_machines, loaded.num_processes, str(loaded.distributed_type)) == (2, 16, "DistributedType.FSDP")
    two = yaml.safe_load((ROOT / "env/accelerate_fsdp_2.yaml").read_text())
    assert loaded.fsdp_config == two["fsdp_config"] and loaded.mixed_precision == "no"

    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, line in {
        "torchrun": 'printf "%s\\n" "$FSDP_VERSION" "$@"',
        "scontrol": "printf 'node-7\\nnode-8\\n'",
        "srun": 'shift; SLURM_NODEID=1 exec "$@"',
    }.items():
        (stubs / name).write_text(f"#!/bin/sh\n{line}\n")
        (stubs / name).chmod(0o755)
    env = {"PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}", "TORCHRUN": str(stubs / "torchrun")}

    def started(script: str, *arguments: str, **extra: str) -> Any:
        """What torchrun is started with, parsed by its own parser."""
        done = subprocess.run(
            ["bash", "-c", script, "job", *arguments],
            env=env | extra,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        version, *words = done.stdout.splitlines()
        parsed = get_args_parser().parse_args(words)
        assert version == "2" and Path(parsed.training_script).name == "train.py"
        train.build_parser().parse_args(parsed.training_script_args)
        return parsed

    slurm = {"SLURM_NNODES": "4", "SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_SUBMIT_DIR": "."}
    job = started((ROOT / "env/slurm.sbatch").read_text(), *own, SLURM_GPUS_ON_NODE="4", **slurm)
    assert (job.nnodes, job.node_rank, job.nproc_per_node, job.master_addr) == ("4", 1, "4", "node-7")
    assert job.training_script_args == own

    task = yaml.safe_load((ROOT / "env/skypilot.yaml").read_text())
    assert task["num_nodes"] == 2 and subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)
    sky = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    job = started(task["run"], SKYPILOT_NODE_IPS="10.0.0.4\n10.0.0.5", **sky, **task["envs"])
    assert (job.nnodes, job.node_rank, job.nproc_per_node, job.master_addr) == ("2", 1, "8", "10.0.0.4")
    assert job.training_script_args == task["envs"]["ARGS"].split()


def test_paths_count_from_the_root(tmp_path: Path) -> None:
    assert paths.resolve_path(tmp_path, "data/raw/x.jsonl") == tmp_path / "data" / "raw" / "x.jsonl"
    assert paths.resolve_path(tmp_path, "./a/../b") == tmp_path / "b"
    assert paths.resolve_path(tmp_path, "/etc/hosts") == Path("/etc/hosts")
    assert paths.resolve_path(tmp_path, "~/x") == Path.home() / "x"
    assert paths.display_path(tmp_path / "configs" / "a.yaml", tmp_path) == "configs/a.yaml"
    assert paths.display_path(Path("/elsewhere/a.yaml"), tmp_path) == "/elsewhere/a.yaml"


def test_what_is_shipped_is_found_from_another_root_unless_it_has_its_own(tmp_path: Path) -> None:
    assert paths.shipped(tmp_path, "configs/run_bnb.yaml") == ROOT / "configs" / "run_bnb.yaml"
    assert paths.shipped(tmp_path, "configs/none.yaml") == tmp_path / "configs" / "none.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run_bnb.yaml").touch()
    assert paths.shipped(tmp_path, "configs/run_bnb.yaml") == tmp_path / "configs" / "run_bnb.yaml"
