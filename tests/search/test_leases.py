"""Who holds a lease may write, and nobody else, on either database."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from autolite.search import leases
from autolite.search.leases import SEARCH, LeaseLostError, Leases
from autolite.search.samplers import SAMPLERS
from autolite.search.studies import FencedStorage, StageStudy
from autolite.store import Store


@pytest.fixture
def store(storage: str) -> Iterator[Store]:
    store = Store(storage, f"run-{uuid.uuid4().hex[:8]}")
    yield store
    store.close()


@pytest.fixture
def another(store: Store) -> Iterator[Store]:
    """The same run as another process sees it."""
    again = Store(store.url, store.run)
    yield again
    again.close()


def sleep(seconds: float) -> None:
    threading.Event().wait(seconds)


def test_a_lease_has_one_holder_until_it_runs_out_or_is_given_up(store: Store, another: Store) -> None:
    assert store.take_lease("trial 1", "me", 60) == 1
    assert another.take_lease("trial 1", "you", 60) is None
    assert another.holder("trial 1") == "me"
    assert another.leases("trial ") == {"trial 1"}
    assert store.end_lease("trial 1", 1)
    assert another.leases("trial ") == set()
    assert another.take_lease("trial 1", "you", 0.1) == 2  # tokens only grow
    sleep(0.2)
    assert store.take_lease("trial 1", "me", 60) == 3


def test_one_that_ran_out_is_renewed_only_if_nobody_took_it(store: Store, another: Store) -> None:
    token = store.take_lease("trial 1", "me", 0.05)
    sleep(0.1)
    assert token is not None
    assert store.renew_lease("trial 1", token, 0.05)
    sleep(0.1)
    assert another.take_lease("trial 1", "you", 60) == token + 1
    assert not store.renew_lease("trial 1", token, 60)
    assert not store.end_lease("trial 1", token)
    assert store.holder("trial 1") == "you"


def test_runs_in_one_database_hold_their_own(store: Store) -> None:
    other = Store(store.url, f"{store.run}-other")
    assert store.take_lease("trial 1", "me", 60) == 1
    assert other.take_lease("trial 1", "you", 60) == 1
    other.close()


def test_of_many_that_take_it_at_once_one_gets_it(store: Store) -> None:
    found: list[int | None] = []
    for key in ("new", "new", "given up"):
        if key == "given up":
            token = store.take_lease(key, "somebody", 60)
            assert token is not None
            store.end_lease(key, token)
        start = threading.Barrier(8)

        def take(key: str = key, start: threading.Barrier = start) -> None:
            start.wait()
            found.append(store.take_lease(key, "me", 60))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(token for token in found if token is not None) == [1, 2]


def test_a_process_renews_what_it_holds_until_it_ends(
    store: Store, another: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "SECONDS", 0.6)
    with Leases(store) as mine:
        lease = mine.take("trial 1")
        assert lease is not None
        sleep(1.5)
        assert another.take_lease("trial 1", "you", 60) is None
        mine.check(lease)
    assert another.take_lease("trial 1", "you", 60) == 2


def test_a_process_learns_that_it_lost_a_lease(store: Store, another: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SECONDS", 0.6)
    with Leases(store) as mine:
        lease = mine.take("trial 1")
        assert lease is not None
        assert another.take_lease("trial 1", "you", 60, force=True) == 2
        sleep(0.5)
        with pytest.raises(LeaseLostError):
            mine.check(lease)
    assert store.holder("trial 1") == "you"


def test_a_process_whose_search_is_gone_gives_its_trial_up_but_writes_what_is_done(store: Store) -> None:
    searched = True
    with Leases(store, alive=lambda: searched) as mine:
        lease = mine.take("trial 1")
        assert lease is not None
        mine.check(lease)
        searched = False
        with pytest.raises(LeaseLostError):
            mine.check(lease)
        mine.check(lease, asking=True)


def test_whoever_decides_after_one_that_died_ends_its_leases_alone(store: Store, another: Store) -> None:
    dead = f"{Leases(store).owner.partition(' ')[0]} 1 dead"
    for key, owner in ((SEARCH, dead), ("trial 1", dead), ("trial 2", "a worker")):
        assert store.take_lease(key, owner, 60)
    with Leases(another) as mine:
        mine.lead()
        assert store.holder("trial 1") is None
        assert store.holder("trial 2") == "a worker"
        assert store.holder(SEARCH) == mine.owner


@pytest.fixture
def study(store: Store) -> StageStudy:
    database = FencedStorage(store.url, store.run)
    found = optuna.create_study(study_name=f"{store.run}/screen", storage=database)
    return StageStudy("screen", found, 0, database, SAMPLERS["tpe"])


def test_what_a_rung_did_not_get_to_is_given_up_and_the_next_ones_queue_kept(study: StageStudy) -> None:
    for queue in ("9trials 0", "9trials 1"):
        study.enqueue([{"x": 1.0}, {"x": 2.0}], queue)
    study.drop_queued("9trials 1")
    study.drop_next()
    assert study.study.ask().user_attrs["queued"] == "9trials 1 1"
    assert study.waiting() == 0
    assert study.trials() == [], "none of them was evaluated"


def test_only_the_holder_of_its_lease_finishes_a_trial(store: Store, study: StageStudy) -> None:
    with Leases(store) as mine:
        trial = study.study.ask()
        lease, later = mine.take("trial screen 0"), mine.take("trial screen 0", force=True)
        assert lease is not None
        assert later is not None
        with pytest.raises(LeaseLostError):
            study.tell(trial, lease, [1.0])
        assert study.study.trials[0].state == TrialState.RUNNING
        study.tell(trial, later, [2.0])
        assert study.study.trials[0].values == [2.0]
        assert store.holder("trial screen 0") is None  # given up in the same transaction
        with pytest.raises(LeaseLostError):  # told already
            study.tell(trial, later, [3.0])
        assert study.study.trials[0].values == [2.0]


def test_a_lease_cannot_be_taken_between_its_check_and_the_result(store: Store, study: StageStudy) -> None:
    """The other process's attempt waits for the transaction, and then finds the trial finished."""
    with Leases(store) as mine:
        trial = study.study.ask()
        lease = mine.take("trial screen 0")
        assert lease is not None
        states: list[TrialState] = []

        def take() -> None:
            other = Store(store.url, store.run)
            other.take_lease("trial screen 0", "you", 60, force=True)
            states.append(FencedStorage(store.url, store.run).get_trial(trial._trial_id).state)
            other.close()

        thread = threading.Thread(target=take)
        original = optuna.storages.RDBStorage.check_trial_is_updatable

        def slowly(storage: optuna.storages.RDBStorage, trial_id: int, state: TrialState) -> None:
            if not thread.is_alive() and not states:
                thread.start()
                sleep(0.5)
            original(storage, trial_id, state)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optuna.storages.RDBStorage, "check_trial_is_updatable", slowly)
            study.tell(trial, lease, [1.0])
        thread.join()
        assert states == [TrialState.COMPLETE]


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
@pytest.mark.parametrize("drawn", range(6))
def test_what_a_process_drew_in_part_is_drawn_to_its_end_as_it_would_have_been(
    sampler: str, drawn: int, tmp_path: Path
) -> None:
    """Whoever is killed in the midst of asking leaves a trial with some of its parameters."""
    names = [f"p{i}" for i in range(6)]

    def suggest(trial: optuna.Trial, names: list[str]) -> dict[str, float]:
        return {
            name: trial.suggest_float(name, 0, 1) if i % 2 else trial.suggest_int(name, 0, 1000)
            for i, name in enumerate(names)
        }

    def study(name: str) -> StageStudy:
        storage = FencedStorage(f"sqlite:///{tmp_path / name}.db")
        made = optuna.create_study(study_name="s", storage=storage, directions=["minimize"] * 3)
        return StageStudy("screen", made, 0, storage, SAMPLERS[sampler])

    whole, part = study("whole"), study("part")
    for each in (whole, part):
        for _ in range(2):
            trial = each.ask(explore=False)
            suggest(trial, names)
            each.study.tell(trial, [1.0, 1.0, 1.0])
    expected = suggest(whole.ask(explore=False), names)
    suggest(part.ask(explore=False), names[:drawn])
    (frozen,) = (t for t in part.running() if t.number == 2)
    assert suggest(part.take_up(frozen), names) == expected
