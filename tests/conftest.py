"""Settings of all tests: checked shapes, a private cache, one thread, no network and no screen."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook

# Read when the libraries are imported, so set before the first test module is.
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, slowly, by Triton's own interpreter

# Under nohup, or in the background of a script, these are ignored, and processes that tests stop would ignore them too.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

SHAPED = (
    "blocks", "data", "evals", "model", "ops", "plan", "quantizing",
    "train.distillation", "train.objectives", "train.optimizer",
)  # fmt: skip
"""Where annotations have shapes; elsewhere mypy checks types."""

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for mypy
if os.environ.get("UNCHECKED") != "1":  # the slow tests train for minutes; shapes are checked by the fast ones
    install_import_hook([f"explore.{name}" for name in SHAPED], f"{__name__}.typechecker")

settings.register_profile("explore", derandomize=True, deadline=None)
settings.load_profile("explore")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs CUDA")


@pytest.fixture(scope="session", autouse=True)
def _surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("surroundings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPLORE_CACHE", str(folder / "cache"))
        patch.setenv("HF_HOME", str(folder / "huggingface"))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DIR", str(folder))
        patch.delenv("WANDB_API_KEY", raising=False)
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """One thread: xdist's workers share the cores, and the order of a sum must not depend on the number of threads."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
