import pytest

from pipeline.data.connect import connecting
from pipeline.errors import UserError

WHAT, REMEDY = "cluster.address: no Ray cluster at X", "use local"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("refused"), r"no Ray cluster at X \(refused\); use local"),
        (
            Exception("The current node timed out during startup."),
            "did not start .* busy, or short",
        ),
    ],
)
def test_what_ray_raises_is_said_with_a_remedy(error: Exception, said: str) -> None:
    with pytest.raises(UserError, match=said), connecting(WHAT, REMEDY):
        raise error


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(KeyError), connecting(WHAT, REMEDY):
        raise KeyError("x")
