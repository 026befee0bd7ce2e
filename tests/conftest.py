# SPDX-License-Identifier: Apache-2.0
"""The one list of what may be skipped: a test that skips for another reason, or elsewhere, fails."""

from collections.abc import Iterator

import pytest

# Reason: where it may be given. Only hardware and tools that a machine may lack.
SKIPS = {
    "there is no nvcc": ("tests/build/test_cuda_module.py", "tests/cusim/"),
    "this torch is built without CUDA": ("tests/ops/test_backend_cuda.py",),
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Turns a skip that is not on the list into a failure."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not any(item.nodeid.startswith(place) for place in SKIPS.get(reason, ())):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: expected to run, got a skip ({reason}); tests/conftest.py lists what may"
    return report
