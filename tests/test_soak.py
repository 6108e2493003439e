"""A slice of the campaign of `make soak`: 20 kills at file operations."""

from soak.campaign import trials

KILLS = 20


def test_twenty_kills_at_file_operations_change_nothing(tmp_path) -> None:
    done = []
    for trial in trials(seed=1, folder=tmp_path, only_operations=True):
        assert trial.faults == [], trial
        done.append(trial)
        if sum(len(trial.kills) for trial in done) >= KILLS:
            break
    assert sum(trial.resumes for trial in done) > KILLS / 2
