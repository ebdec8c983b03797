"""No set trains on what any set holds out, and what is there stays as it was."""

from cluster.kept_apart import Apart, Prompts, keep_apart
from preferences.sets import prompt_id


def ids(text: str) -> frozenset[str]:
    return frozenset(text)


def test_ids_are_the_prompts() -> None:
    assert Prompts.of(["a", "b", "a"], ["c"]) == Prompts(frozenset(map(prompt_id, "ab")), frozenset({prompt_id("c")}))


def test_what_any_set_holds_out_no_set_trains_on() -> None:
    sets = {"hh": Prompts(ids("abcd"), ids("xy")), "law": Prompts(ids("axe"), ids("bf")), "art": Prompts(ids("gh"), ids("i"))}
    found = keep_apart(sets)
    assert found == {"hh": Apart(ids("b")), "law": Apart(ids("x")), "art": Apart()}
    trained = frozenset().union(*(sets[name].train - apart.train for name, apart in found.items()))
    assert not trained & frozenset().union(*(prompts.test for prompts in sets.values()))


def test_a_further_set_finds_the_others_trained() -> None:
    sets = {"hh": Prompts(ids("abcd"), ids("xy")), "law": Prompts(ids("axe"), ids("bf"))}
    settled = keep_apart({"hh": sets["hh"]})
    found = keep_apart(sets, settled)
    assert found == {"hh": Apart(), "law": Apart(ids("x"), ids("b"))}, "hh was trained on b, and law measures f alone"
    more = sets | {"art": Prompts(ids("bfa"), ids("ey"))}
    third = keep_apart(more, found)
    assert {name: third[name] for name in found} == found
    assert third["art"] == Apart(ids("f"), ids("e")), "law holds f out, and was trained on e; b is measured by nothing any more"
    without = {name: prompts for name, prompts in more.items() if name != "hh"}
    assert keep_apart(without, third) == {name: third[name] for name in without}, "what goes without a set stays as it was"
