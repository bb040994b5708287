"""Fixtures, and what every test run needs set."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator

# Every test process, and what it starts, gets its share of the cores: two that share one are many times slower.
os.environ["OMP_NUM_THREADS"] = str(
    max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
)
os.environ["MKL_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")  # no copy of Plotly in every figure of a notebook

import pytest
import torch
from jaxtyping import config
from models import ARCHITECTURES, CONFIGS, Twins, make_twins
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session", params=ARCHITECTURES)
def twins(request: pytest.FixtureRequest) -> Twins:
    return make_twins(request.param)


@pytest.fixture(scope="module")
def llama() -> Twins:
    return make_twins("llama")


@pytest.fixture
def gpt2() -> Twins:
    return make_twins("gpt2")


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Turn the run-time type check off, so that a wrong type gets our own error message."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@functools.cache
def demo_or_reason() -> TransformerBridge | str:
    """The demo model; skip, with the reason, if it is not available."""
    try:
        return tv.demo_model()
    except tv.DemoModelError as error:
        if "cannot be downloaded" not in str(error) or os.environ.get("TV_LENS_NEED_DEMO"):
            raise
        return f"needs the network once: {error}"


@pytest.fixture(scope="session")
def demo() -> TransformerBridge:
    actual = demo_or_reason()
    return pytest.skip(actual) if isinstance(actual, str) else actual


# Of the laws that hold for every architecture, the default run tests these two.
FAST = {"gpt2", "llama"}
SLOW_FILES = {"test_grids.py", "test_interrupts.py", "test_memory.py", "test_simulation.py", "test_study.py"}


def kind_of(item: pytest.Item) -> str:
    """Which marker a test gets, unless it has one: see CONTRIBUTING.md."""
    fixtures = set(item.fixturenames) if isinstance(item, pytest.Function) else set()
    names = set(re.findall(r"[a-z]\w+", item.nodeid.partition("[")[2])) & set(CONFIGS)
    if item.path.suffix == ".ipynb" or item.path.name in SLOW_FILES or fixtures & {"demo", "browser"} or names - FAST:
        return "slow"
    return "laws" if names or fixtures & {"twins", "llama", "gpt2"} else "unit"


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test gets a marker. The notebooks run first, since they take longest, and on the demo model."""
    for item in items:
        if not any(item.get_closest_marker(kind) for kind in ("unit", "laws", "slow")):
            item.add_marker(kind_of(item))
    notebooks = [item for item in items if item.path.suffix == ".ipynb"]
    items[:] = [*notebooks, *(item for item in items if item not in notebooks)]
    if notebooks and isinstance(demo_or_reason(), str):
        for item in notebooks:
            item.add_marker(pytest.mark.skip(str(demo_or_reason())))
