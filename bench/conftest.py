"""`pytest bench`: its options, the session that all groups share, and what is written at the end.

The repository's root is put on the path, also for processes that are started: ``bench`` is a folder
and no installed package.
Triton's interpreter, which the tests use, is not what is to be measured.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])

from bench.options import add_options, read_options
from bench.session import Session

SESSION = pytest.StashKey[Session]()
pytest_addoption = add_options


def pytest_configure(config: pytest.Config) -> None:
    if config.option.help or config.option.version:
        return
    folder = tempfile.TemporaryDirectory(prefix="pytest-bench-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    config.stash[SESSION] = Session(read_options(config, Path(folder.name)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes a ``peer`` or ``genes`` runs with each of those chosen."""
    options = metafunc.config.stash[SESSION].options
    if "peer" in metafunc.fixturenames:
        metafunc.parametrize("peer", options.peers, ids=[peer.key for peer in options.peers])
    if "genes" in metafunc.fixturenames:
        metafunc.parametrize("genes", options.genes)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    clock = config.stash[SESSION].clock
    folder = Path(__file__).parent
    for item in filter(lambda item: folder in item.path.parents, items):
        group = item.path.stem.removeprefix("test_")
        item.add_marker(pytest.mark.benchmark(timer=clock, group=group))


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    """The run: its options, and where records go."""
    return pytestconfig.stash[SESSION]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.option.collectonly:
        return
    interrupted = exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    status = session.config.stash[SESSION].finish(interrupted)
    if status and not exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    summary = terminalreporter.config.stash[SESSION].summary
    if summary:
        terminalreporter.section("benchmarks")
        terminalreporter.write_line("\n\n".join(summary))
