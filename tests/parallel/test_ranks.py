"""Functions over several ranks on real gloo processes; the checks are in tests/helpers/*_ranks."""

import pytest
import ranks

NAMES = ("vocab", "sequence", "agreement", "fuzz", "adapter", "model")
ALL = tuple(f"{name}_ranks" for name in NAMES)
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world_size", "modules"),
    [
        (2, ALL),
        pytest.param(3, ALL, marks=SLOW),
        pytest.param(4, ALL[-1:], marks=SLOW),
        pytest.param(2, ("compile_ranks",), marks=SLOW),
    ],
    ids=["2", "3", "4", "compiled"],
)
def test_against_one_process(world_size, modules, tmp_path, request):
    slow = request.node.get_closest_marker("slow") is not None
    ranks.start(world_size, tmp_path, modules, slow)
