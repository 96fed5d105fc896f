"""The package that users install: what is in it, what importing it costs."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "*.nbi", "*.nbc", "*.egg-info", "build", "dist"
)
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and return what it printed; its own words are the failure's message."""
    done = subprocess.run(command, cwd=cwd, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str, cwd: Path) -> str:
    """Run code in an isolated interpreter: only what is installed can be imported."""
    return run(sys.executable, "-I", "-c", code, cwd=cwd).strip()


def build_wheel(source: Path, target: Path) -> zipfile.ZipFile:
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", target, source, cwd=target)
    (wheel,) = target.glob("*.whl")
    return zipfile.ZipFile(wheel)


def files(folder: Path) -> set[str]:
    """Paths of a folder's files, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the project's files: a build must not find, nor leave, anything else."""
    copy = tmp_path_factory.mktemp("project") / "cellpatch-fast"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_exactly_the_files_of_the_two_packages(
    wheel: zipfile.ZipFile, source: Path
) -> None:
    package = {f"cellpatch_fast/{path}" for path in files(source / "cellpatch_fast")}
    kernels = {f"cellpatch_fast/kernels/{path}" for path in files(source / "kernels")}
    installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert installed == package | kernels
    assert "cellpatch_fast/py.typed" in installed
    assert "cellpatch_fast/kernels/reference.py" in installed


def test_wheel_installs_one_top_level_package_and_the_command(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert wheel.read(f"{info}/top_level.txt").split() == [b"cellpatch_fast"]
    assert b"cellpatch = cellpatch_fast.cli:main" in wheel.read(f"{info}/entry_points.txt")
    assert b"BSD 3-Clause" in wheel.read(f"{info}/licenses/LICENSE")


def test_sdist_builds_the_same_wheel_and_can_be_tested(
    wheel: zipfile.ZipFile, source: Path, tmp_path: Path
) -> None:
    run(sys.executable, "-c", BUILD_SDIST, tmp_path, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"conftest.py", "constraints.txt", "tests/test_package.py"} <= names
    assert sorted(build_wheel(sdist, tmp_path).namelist()) == sorted(wheel.namelist())


def test_kernels_are_reached_through_the_package_only(tmp_path: Path) -> None:
    """Holds for the installation that the tests run under: the editable one, as a rule."""
    code = """
        import importlib.util, cellpatch_fast.kernels
        print(cellpatch_fast.kernels.__file__)
        print(*(importlib.util.find_spec(name) for name in ("kernels", "bench")))
    """
    kernels, others = python(re.sub("^ +", "", code, flags=re.M), cwd=tmp_path).splitlines()
    installed = python("import cellpatch_fast; print(cellpatch_fast.__file__)", cwd=tmp_path)
    beside = Path(installed).with_name("kernels") / "__init__.py"
    assert Path(kernels) in (ROOT / "kernels" / "__init__.py", beside)
    assert str(ROOT) not in others


def test_kernels_import_without_files_and_annotated_data(tmp_path: Path) -> None:
    code = "import sys, cellpatch_fast.kernels; print(*sys.modules)"
    loaded = python(code, cwd=tmp_path).split()
    assert not {"anndata", "h5py", "zarr", "scanpy"} & set(loaded)


def test_import_is_quick_and_brings_no_heavy_library(tmp_path: Path) -> None:
    code = """
        import time; start = time.perf_counter()
        import cellpatch_fast; seconds = time.perf_counter() - start
        import sys; print(seconds, *sys.modules)
    """
    seconds, *loaded = python(re.sub("^ +", "", code, flags=re.M), cwd=tmp_path).split()
    assert not {"torch", "numba", "numpy", "pandas", "anndata", "zarr", "h5py"} & set(loaded)
    assert float(seconds) < 0.3


def test_every_public_name_can_be_had_and_is_listed() -> None:
    import cellpatch_fast

    assert set(cellpatch_fast.__all__) <= set(dir(cellpatch_fast))
    for name in cellpatch_fast.__all__:
        assert getattr(cellpatch_fast, name).__name__.split(".")[-1] == name
    assert re.fullmatch(r"\d+\.\d+\.\d+", cellpatch_fast.__version__)
    with pytest.raises(AttributeError, match="no attribute 'embedd'"):
        cellpatch_fast.embedd  # noqa: B018


@pytest.mark.parametrize(
    "name", ["atlas", "datasets", "genes", "io", "loading", "model", "pl", "pp", "tl", "training"]
)
def test_completion_offers_public_names_only(name: str) -> None:
    module = importlib.import_module(f"cellpatch_fast.{name}")
    assert dir(module) == sorted(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)
