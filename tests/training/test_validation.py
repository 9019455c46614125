import pytest

from exp.runtime.errors import InputError
from exp.training.validation import ScoreHistory

NAN = float("nan")


def replay(scores: list[float], patience: int | None) -> tuple[list[int], int | None]:
    """Scores after iterations 10, 20, ... -> the iterations saved as the best so far, and where training stops."""
    history, saved = ScoreHistory("mIoUI", patience), []
    for iteration, score in enumerate(scores, start=1):
        if history.add(10 * iteration, score):
            saved.append(10 * iteration)
        if history.stopped:
            return saved, 10 * iteration
    return saved, None


@pytest.mark.parametrize(
    ("scores", "patience", "saved", "stop"),
    [
        ([1, 2, 3], 1, [10, 20, 30], None),
        ([1, 3, 2], 1, [10, 20], 30),
        ([1, 3, 2, 1, 4], 2, [10, 20], 40),
        ([1, 3, 2, 4, 1, 1], 2, [10, 20, 40], 60),
        ([2, 2, 2], 2, [10], 30),
        ([3, 2, 1, 0], None, [10], None),
        ([NAN, 1, NAN, 2], 2, [10, 20, 40], None),
        ([1, NAN, NAN], 2, [10], 30),
    ],
)
def test_best_and_early_stop(scores: list[float], patience: int | None, saved: list[int], stop: int | None):
    assert replay(scores, patience) == (saved, stop)


def test_no_validation_yet():
    history = ScoreHistory("mIoUI", 1)
    assert history.best is None
    assert not history.stopped


def test_a_resumed_history_goes_on():
    before, after = ScoreHistory("mIoUI", 2), ScoreHistory("mIoUI", 2)
    before.add(10, 5.0)
    before.add(20, 4.0)
    after.load_state_dict(before.state_dict())
    assert not after.add(30, 4.5)
    assert after.stopped
    assert after.describe() == "best mIoUI: 5.00 after 10 iterations"


def test_scores_of_another_kind_are_not_compared():
    state = {"name": "mDiceI", "scores": {10: 99.0}}
    free = ScoreHistory("mIoUI", None)
    free.load_state_dict(state)
    assert free.add(20, 1.0)
    with pytest.raises(InputError, match=r"schedule\.early_stop: got validations by mIoUI, expected them by mDiceI"):
        ScoreHistory("mIoUI", 3).load_state_dict(state)
