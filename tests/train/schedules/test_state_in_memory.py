"""A state that was loaded is the user's: training goes on without changing it, and it loads again."""

import copy

import pytest
from resuming import assert_equal
from small import sgd
from test_schedules_resume import IN_HALF, SCHEDULES, adam, data, everything, start, train

NAMES = [
    *("greedy", "greedy extra", "backprop windows of 3", "backlink 1", "backlink 2 windows of 3", "stashed", "current"),
    *("stashed windows of 2", "replay", "replay noise", "replay fp16", "replay vq", "replay small vq", "replay extra"),
    *IN_HALF,
]


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("name", NAMES)
def test_training_leaves_a_state_as_it_was_loaded(name, optimizer):
    assert name in {**SCHEDULES, **IN_HALF}
    pairs, first, runs = data(name), start(name, optimizer), []
    train(first, pairs[:4])
    held = copy.deepcopy(everything(first))  # in memory, as after torch.load
    kept = copy.deepcopy(held)
    for _ in range(2):
        schedule = start(name, optimizer)
        schedule.net.load_state_dict(held["net"])
        schedule.load_state_dict(held["schedule"])
        runs.append(train(schedule, pairs[4:]))
        assert_equal(held, kept, "the state that was loaded")
    assert_equal(runs[0], runs[1], "the second time")
    assert_equal(train(first, pairs[4:]), runs[0], "the schedule that was not stopped")
