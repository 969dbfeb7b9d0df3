"""Fixtures and settings of every test.

Shapes and order are the same in each run; the numbers in the operands are new. The seed they come from is in the header
of pytest's report, and FP8GEMM_TEST_SEED=<seed> repeats a run.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from references import SEED, fresh_rng
from stub import build as build_stubs

from fp8gemm import device, native, planner

settings.register_profile(
    "fp8gemm",
    deadline=None,
    derandomize="CI" in os.environ,
    max_examples=40,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fp8gemm")


def pytest_report_header() -> str:
    return f"operands from seed {SEED} (FP8GEMM_TEST_SEED={SEED} repeats them)"


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own cache, nor hears of their settings; none has a thread in its back."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("FP8GEMM_")]:
            patch.delenv(name)
        patch.setenv("FP8GEMM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(planner, "follow", lambda: None)
        yield


@pytest.fixture(autouse=True)
def _no_sm_limits() -> Iterator[None]:
    yield
    for device_id in range(4):
        native.library().limit_sms(device_id, 0)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return fresh_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stubs of tests/stub.py are."""
    return build_stubs(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="session")
def hopper() -> int:
    """The id of a Hopper GPU; the test is skipped without one."""
    found = device.hopper_devices()
    if not found:
        pytest.skip("no Hopper GPU")
    return found[0]
