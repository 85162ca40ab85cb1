"""The table of seen ids is a set of strings, only quicker."""

from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.streams._seen import SeenIds, hashes


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.text(min_size=1, max_size=4), max_size=40), max_size=20))
def test_ids_are_found_after_they_were_added_and_not_before(batches: list[list[str]]) -> None:
    table, model = SeenIds(), set[str]()
    for batch in batches:
        ids = list(dict.fromkeys(batch))
        keys = hashes(ids)
        assert table.which(keys) == [x in model for x in ids]
        if ids:
            assert table.any_of(keys) == (not model.isdisjoint(ids))
        new = [x for x in ids if x not in model]
        if new:
            table.add(new, hashes(new))
        model.update(new)
    assert table.all() == model
    assert table.n == len(model)
    again = SeenIds.restored(table.state())
    assert again.state() == table.state()
    assert again.all() == model


def test_full_rows_and_growing_lose_nothing() -> None:
    table = SeenIds()
    ids = [f"call-{i}" for i in range(20_000)]
    for i in range(0, len(ids), 1000):
        table.add(ids[i : i + 1000], hashes(ids[i : i + 1000]))
    assert all(table.which(hashes(ids)))
    assert not table.any_of(hashes([f"other-{i}" for i in range(20_000)]))
    assert table.all() == set(ids)


def test_what_came_in_other_batches_gives_the_same_state() -> None:
    ids = [f"call-{i}" for i in range(1000)]
    one, many = SeenIds(), SeenIds(5000)
    one.add(ids, hashes(ids))
    for i in range(0, 1000, 7):
        many.add(ids[i : i + 7], hashes(ids[i : i + 7]))
    assert one.state() == many.state()


def test_an_id_that_holds_the_separator_is_remembered_whole() -> None:
    table, ids = SeenIds(), ["a\x1fb", "a", "c"]
    table.add(ids, hashes(ids))
    assert table.all() == SeenIds.restored(table.state()).all() == {"a\x1fb", "a", "c"}
