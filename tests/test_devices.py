"""Cores are counted by affinity mask and quota, and PyTorch's threads leave them to others."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cellpatch_fast import CellPatch, cli, devices
from cellpatch_fast.devices import (
    cpu_quota,
    default_device,
    keep_to_quota,
    usable_cores,
    wait_passively,
)
from cellpatch_fast.inference.embedder import Embedder
from cellpatch_fast.training import distributed

ROOT = Path(__file__).parents[1]
CORES = 8  # of the mask, where a test sets it


def control_groups(root: Path, membership: str, files: dict[str, str]) -> Path:
    """A root with these control groups, and a process in those that ``membership`` lists."""
    contents = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in ({"proc/self/cgroup": membership} | contents).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


VERSION_2 = "0::/"
VERSION_1 = "12:memory:/docker/a1\n4:cpu,cpuacct:/docker/a1\n1:name=systemd:/docker/a1"


@pytest.mark.parametrize(
    ("membership", "files", "quota", "cores"),
    [
        pytest.param(VERSION_2, {}, math.inf, CORES, id="no_limit"),
        pytest.param(VERSION_2, {"cpu.max": "max 100000"}, math.inf, CORES, id="max"),
        pytest.param(VERSION_2, {"cpu.max": "200000 100000"}, 2, 2, id="two_cores"),
        pytest.param(VERSION_2, {"cpu.max": "250000 100000"}, 2.5, 3, id="rounded_up"),
        pytest.param(VERSION_2, {"cpu.max": "1000 100000"}, 0.01, 1, id="at_least_one"),
        pytest.param(VERSION_2, {"cpu.max": "9900000 100000"}, 99, CORES, id="more_than_there_are"),
        pytest.param(
            "0::/user/job/step",
            {"user/cpu.max": "300000 100000", "user/job/step/cpu.max": "400000 50000"},
            *(3, 3),
            id="limits_of_the_groups_around",
        ),
        pytest.param(
            VERSION_1,
            {"cpu/docker/a1/cpu.cfs_quota_us": "150000", "cpu/docker/a1/cpu.cfs_period_us": "1e5"},
            *(math.inf, CORES),
            id="not_a_number",
        ),
        pytest.param(
            VERSION_1,
            {"cpu/docker/a1/cpu.cfs_quota_us": "75000", "cpu/docker/a1/cpu.cfs_period_us": "50000"},
            *(1.5, 2),
            id="version_1",
        ),
        pytest.param(
            VERSION_1,
            {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"},
            *(4, 4),
            id="version_1_seen_from_inside_a_container",
        ),
        pytest.param(
            VERSION_1,
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            *(math.inf, CORES),
            id="version_1_no_limit",
        ),
    ],
)
def test_quotas_of_control_groups_count(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    membership: str,
    files: dict[str, str],
    quota: float,
    cores: int,
) -> None:
    monkeypatch.setattr(devices, "_cores_of_mask", lambda: CORES)
    root = control_groups(tmp_path, membership, files)
    assert (cpu_quota(root), usable_cores(root)) == (quota, cores)


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) == math.inf
    assert usable_cores(tmp_path) >= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity masks")
def test_the_affinity_mask_counts() -> None:
    """PyTorch follows it by itself; and so does what a benchmark says of the machine."""
    program = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from bench.machine import describe_device
from cellpatch_fast.devices import usable_cores
print(usable_cores(), torch.get_num_threads())
print(describe_device(torch.device("cpu"))["name"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    numbers, name = done.stdout.splitlines()
    assert numbers == "1 1"
    assert name.endswith("(1 cores)")


@pytest.mark.parametrize(
    ("own", "threads"), [pytest.param(None, 2, id="quota"), pytest.param("5", 5, id="users_own")]
)
def test_pytorch_keeps_to_a_quota_unless_the_user_says_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str | None, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    monkeypatch.setattr(devices, "_cores_of_mask", lambda: CORES)
    root = control_groups(tmp_path, VERSION_2, {"cpu.max": "200000 100000"})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        keep_to_quota(root)
        assert torch.get_num_threads() == threads
        torch.set_num_threads(1)
        keep_to_quota(root)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_without_a_quota_pytorch_is_not_even_loaded(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from cellpatch_fast.devices import keep_to_quota
keep_to_quota(Path({str(tmp_path)!r}))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("own", "policy"),
    [
        pytest.param({}, "PASSIVE", id="default"),
        pytest.param({"OMP_WAIT_POLICY": "active"}, "ACTIVE", id="users_own"),
    ],
)
def test_the_command_lines_threads_sleep_while_they_wait(own: dict[str, str], policy: str) -> None:
    """OpenMP itself says which policy it has read; the command loads PyTorch, then refuses."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = ["embed", "nowhere.h5ad", "--model", "nowhere", "--output", "out.zarr"]
    done = subprocess.run(
        [Path(sys.executable).with_name("cellpatch"), *command],
        env=environment | own | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert set(re.findall(r"OMP_WAIT_POLICY ?= ?'(\w+)'", done.stderr)) == {policy}


def test_processes_of_training_inherit_policy_and_their_share_of_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    started: dict[str, str] = {}

    def call(command: list[str], env: dict[str, str]) -> int:
        started.update(env)
        return 0

    monkeypatch.setattr("subprocess.call", call)
    monkeypatch.setattr(distributed, "usable_cores", lambda: 6)
    run = ["pretrain", "cells.h5ad", "--output", "run", "--device", "cpu", "--devices", "2"]
    assert cli.main(run) == 0
    assert (started["OMP_WAIT_POLICY"], started["OMP_NUM_THREADS"]) == ("passive", "3")


def test_a_users_policy_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "active"


@pytest.mark.parametrize("folder", ["cellpatch_fast", "bench", "tests"])
def test_cores_are_counted_in_one_place(folder: str) -> None:
    """Python's own count is the machine's, with those that this process may not use."""
    counting = "os." + "cpu_count"
    files = [path for path in (ROOT / folder).rglob("*.py") if counting in path.read_text()]
    assert files == ([Path(devices.__file__)] if folder == "cellpatch_fast" else [])


def test_the_default_device_is_the_gpu_that_pytorch_finds() -> None:
    assert default_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    program = "from cellpatch_fast.devices import default_device; print(default_device())"
    without = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], env=without, capture_output=True, text=True, check=True
    )
    assert done.stdout == "cpu\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which they would use")
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["embed", "--output", "out.zarr", "--model"], id="embed"),
        pytest.param(["annotate", "--output", "out.zarr", "--model"], id="annotate"),
        pytest.param(["pretrain", "--output", "run", "--few-cells", "--model"], id="pretrain"),
        pytest.param(
            ["finetune", "--output", "run", "--few-cells", "--label", "kind", "--model"],
            id="finetune",
        ),
    ],
)
def test_all_that_computes_goes_to_the_gpu_where_there_is_one(
    command: list[str],
    model_directory: Path,
    cells_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told that there is one, each tries to compute there, and says that it cannot."""
    monkeypatch.chdir(cells_file.parent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main([command[0], str(cells_file), *command[1:], str(model_directory)]) == 1
    assert "cannot compute on the device 'cuda'" in capsys.readouterr().err


def test_a_model_that_is_an_object_computes_where_it_is(
    small_model: CellPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Embedder(small_model).device == small_model.patches.device


@pytest.mark.gpu
def test_a_model_directory_is_run_on_the_gpu(model_directory: Path) -> None:
    assert Embedder(model_directory).device.type == "cuda"
