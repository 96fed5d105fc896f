"""run_blocks covers every item once, stops on errors, and works from any thread and after fork."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from cellpatch_fast.kernels.threads import run_blocks
from hypothesis import given
from hypothesis import strategies as st

from ..examples import examples


@examples(50)
@given(st.integers(0, 300), st.integers(1, 50), st.integers(1, 5))
def test_every_item_once_in_blocks(count: int, block: int, number: int) -> None:
    before, ranges = torch.get_num_threads(), []
    torch.set_num_threads(number)
    run_blocks(lambda start, stop: ranges.append((start, stop)), count, block)
    torch.set_num_threads(before)
    edges = [*range(0, count, block), count]
    assert sorted(ranges) == list(itertools.pairwise(edges))


def test_nothing_to_do(threads: int) -> None:
    def task(start: int, stop: int) -> None:
        raise AssertionError("called without an item")

    run_blocks(task, 0, 64)


def test_as_many_threads_as_torch_has(threads: int) -> None:
    """All of them at once: each waits until the others have come."""
    together = threading.Barrier(threads, timeout=20)
    names = set()

    def task(start: int, stop: int) -> None:
        together.wait()
        names.add(threading.current_thread().name)

    run_blocks(task, threads, 1)
    assert len(names) == threads


def test_no_more_threads_than_blocks(two_threads: None) -> None:
    callers = []
    run_blocks(lambda start, stop: callers.append(threading.current_thread()), 64, 64)
    assert callers == [threading.current_thread()]


def test_an_error_of_a_single_thread_is_raised_at_once() -> None:
    done = []

    def task(start: int, stop: int) -> None:
        done.append(start)
        raise KeyError("broken")

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.raises(KeyError, match="broken"):
        run_blocks(task, 100, 1)
    torch.set_num_threads(before)
    assert done == [0]


@pytest.mark.parametrize(
    "in_caller",
    [pytest.param(True, id="in_the_caller"), pytest.param(False, id="in_another_thread")],
)
def test_an_error_stops_all_threads(two_threads: None, in_caller: bool) -> None:
    """And is raised once no thread is at work any more."""
    working: set[int] = set()
    done = []

    def task(start: int, stop: int) -> None:
        if (threading.current_thread() is threading.main_thread()) == in_caller:
            raise KeyError("broken")
        working.add(start)
        time.sleep(0.01)
        done.append(start)
        working.remove(start)

    with pytest.raises(KeyError, match="broken"):
        run_blocks(task, 100, 1)
    assert not working
    assert len(done) < 50
    items: list[int] = []
    run_blocks(lambda start, stop: items.extend(range(start, stop)), 100, 1)
    assert sorted(items) == [*range(100)]  # the pool is as good as before


def test_interrupting_stops_all_threads(two_threads: None) -> None:
    done = []

    def task(start: int, stop: int) -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        time.sleep(0.01)
        done.append(start)

    with pytest.raises(KeyboardInterrupt):
        run_blocks(task, 100, 1)
    assert len(done) < 50


def test_several_callers_at_once(two_threads: None) -> None:
    found: dict[int, list[int]] = {caller: [] for caller in range(6)}

    def call(caller: int) -> None:
        for _ in range(20):
            run_blocks(lambda start, stop: found[caller].extend(range(start, stop)), 97, 5)

    callers = [threading.Thread(target=call, args=(caller,)) for caller in found]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(timeout=60)
    assert all(sorted(items) == sorted(20 * [*range(97)]) for items in found.values())


def test_more_threads_later(two_threads: None) -> None:
    """The pool serves a number of threads that was raised after it was made."""
    items: list[int] = []
    run_blocks(lambda start, stop: items.extend(range(start, stop)), 97, 1)
    torch.set_num_threads(7)
    run_blocks(lambda start, stop: items.extend(range(start, stop)), 97, 1)
    assert sorted(items) == sorted(2 * [*range(97)])


def test_in_a_forked_child_too() -> None:
    """A child of fork has none of its parent's threads and makes its own; the bits are the same."""
    program = """
        import os, sys, torch
        sys.path.insert(0, sys.argv[1])
        from conftest import make_cells, make_weights
        from cellpatch_fast.kernels import encode

        torch.set_num_threads(2)
        weights, cells = make_weights(), make_cells([11] * 300)
        batch = weights, cells.offsets, cells.genes, cells.values
        with torch.no_grad():
            expected = encode(*batch, backend="numba").features
            if child := os.fork():
                sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            same = torch.equal(encode(*batch, backend="numba").features, expected)
            print("same" if same else "different", flush=True)
            os._exit(0 if same else 1)
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (child.stdout.strip(), child.returncode) == ("same", 0), child.stderr
