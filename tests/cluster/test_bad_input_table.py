"""The sixty kinds of bad input, and the tests that hold the one clear line that each gets; or why one cannot come about."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.cluster.command import ROOT

INPUT, PLACES, FLIGHT = "tests/cluster/test_bad_input.py", "tests/cluster/test_bad_places.py", "tests/cluster/test_preflight.py"
CLOCKS, RELABEL = "tests/cluster/test_clocks.py", "tests/cluster/test_relabel.py"


def config(name: str) -> str:
    return f"{INPUT}::test_config[{name}]"


def file(name: str) -> str:
    return f"{INPUT}::test_config_file[{name}]"


def data(name: str) -> str:
    return f"{INPUT}::test_data[{name}]"


def path(name: str) -> str:
    return f"{PLACES}::test_path[{name}]"


def model(name: str) -> str:
    return f"{PLACES}::test_model[{name}]"


TABLE: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("unknown key", (config("unknown key"), config("unknown nested key"))),
    2: ("wrong type", (config("not a number"),)),
    3: (
        "learning rate NaN, infinite or negative",
        (config("infinite"), config("a rate that is no number"), config("a negative rate")),
    ),
    4: ("learning rate 0", (config("a learning rate of 0"),)),
    5: ("rounds 0, -1, 1e9", (config("negative size"), config("a thousand million rounds"))),
    6: ("batch not divisible", (config("odd minibatch"), config("microbatch does not divide"))),
    7: ("K of 0, or 1 with a spread", (config("zero size"), config("k < 2"), config("spread of one member"))),
    8: ("meta batch over the pool", (config("meta batch over S_k"),)),
    9: ("prompt and response over the context", (config("context too short"),)),
    10: ("temperature 0", (config("temperature 0"), config("a sampler without chance"))),
    11: ("KL target 0 or less", (config("a KL target of 0"),)),
    12: (
        "more than any node type could hold",
        (
            "tests/cluster/test_node_types.py::test_what_no_growth_makes_room_for",
            "tests/cluster/test_autoscaling.py::test_what_no_node_type_can_hold_is_refused_at_once",
        ),
    ),
    13: ("tensor parallel over the GPUs", (config("an engine over GPUs that it is not given"),)),
    14: ("a YAML key twice", (file("a key twice"),)),
    15: ("a Python object in YAML", (file("a Python object"),)),
    16: ("aliases that explode", (file("aliases that explode"), file("an alias of itself"), file("sections without end"))),
    17: (
        "empty file, byte order mark, not UTF-8",
        (file("empty"), file("not UTF-8"), file("UTF-16"), f"{INPUT}::test_a_byte_order_mark_is_no_part_of_a_config"),
    ),
    18: ("another config on resume", (f"{INPUT}::test_run_directory_of_another_config",)),
    19: ("a future or old format", (f"{PLACES}::test_ledger[of the future]", f"{PLACES}::test_ledger[without a format]")),
    20: ("a name that is a path", (config("a name that is a path"), f"{PLACES}::test_no_name_leads_out_of_the_storage_root")),
    21: ("a link out of the run directory", (f"{PLACES}::test_symbolic_links_are_not_followed_out_of_a_run",)),
    22: ("a place that cannot be written", (f"{INPUT}::test_a_storage_root_that_cannot_be_written",)),
    23: ("a file in the place of a directory", (f"{INPUT}::test_storage_root",)),
    24: ("no space", (config("more rounds than the disk holds"), f"{INPUT}::test_a_full_disk_for_real")),
    25: ("NUL, line end, 300 characters", (path("a NUL"), path("a line end"), path("300 characters"))),
    26: (
        "storage that a node does not share",
        (f"{FLIGHT}::test_every_node_is_looked_at", f"{FLIGHT}::test_what_a_node_has_and_sees"),
    ),
    27: ("a variable in a path", (path("a variable"), path("a variable in braces"))),
    28: ("empty data", (data("empty file"),)),
    29: ("no column chosen", (data("no column chosen"), data("missing columns"))),
    30: ("chosen equal to rejected", (data("chosen equal to rejected"),)),
    31: ("empty or blank response", (data("empty chosen"), data("empty rejected"))),
    32: ("invalid JSON at line n", (data("malformed line"), data("brackets without end"))),
    33: ("the last line cut off", (data("a last line cut off"),)),
    34: ("an id twice", (data("an id twice"),)),
    35: ("an example of 10 MB", (data("ten million characters"),)),
    36: ("a prompt over the context", (data("prompt longer than allowed"),)),
    37: (
        "half characters, control characters, a template's marks in a text",
        (
            data("half a character"),
            "tests/preferences/test_encode.py::test_special_tokens_in_a_text_stay_text",
            f"{PLACES}::test_what_is_printed_neither_ends_a_line_nor_steers_a_terminal",
        ),
    ),
    38: (
        "all labels one way: chosen and rejected are columns; a second labeller's labels then make a set without pairs",
        (f"{INPUT}::test_a_set_to_stop_on_that_the_data_do_not_have",),
    ),
    39: ("training and evaluation overlap", (f"{INPUT}::test_held_out_pairs_of_their_own",)),
    40: ("NaN in a column of numbers", (data("NaN in a column"), data("null in a column of numbers"))),
    41: ("one row, fewer than a batch", (data("one row"), data("fewer rows than can be judged on"))),
    42: ("a compressed bomb", (data("compressed"),)),
    43: ("tokenizers that differ", (f"{INPUT}::test_a_model_to_fine_tune",)),
    44: ("no padding token", (model("no padding token"),)),
    45: ("a vocabulary of another size than the embeddings", (model("fewer embeddings than tokens"),)),
    46: ("pickled weights", (model("pickled"),)),
    47: ("code of its own", (model("code of its own"), model("a tokenizer with code of its own"))),
    48: ("weights cut off", (model("cut off"),)),
    49: ("a header of 2^60 bytes", (model("2^60 bytes of header"),)),
    50: ("another shape or type", (model("another shape"), model("whole numbers"))),
    51: (
        "NaN in weights: known once they are read",
        (f"{PLACES}::test_weights_that_are_no_numbers_are_refused_when_they_are_loaded",),
    ),
    52: (
        "another architecture, no head",
        (model("another architecture"), model("no head for language"), model("encoder and decoder")),
    ),
    53: (
        "a round of another run",
        (f"{INPUT}::test_run_directory_of_another_config", f"{PLACES}::test_ledger[a round that is not its own]"),
    ),
    54: (
        "a hash that differs: rounds fetched from an object store are compared with their manifest; a run's own have no list of "
        "hashes, and what the files say of their own size is held",
        ("tests/cluster/test_storage.py::test_a_damaged_file_is_not_taken", model("cut off")),
    ),
    55: ("an open dashboard", (f"{FLIGHT}::test_an_open_dashboard_is_refused_unless_told",)),
    56: ("a missing or wrong token", ("tests/cluster/test_job.py::test_a_driver_without_the_token_is_told_so",)),
    57: ("versions that differ", (f"{FLIGHT}::test_every_node_is_looked_at", f"{FLIGHT}::test_what_a_node_has_and_sees")),
    58: ("actors of a dead run, a live run of the name", (f"{FLIGHT}::test_namesakes",)),
    59: (
        "a clock an hour wrong",
        (
            f"{CLOCKS}::test_only_a_few_read_the_clock",
            f"{CLOCKS}::test_a_wait_for_room_ends_by_its_own_time",
            f"{CLOCKS}::test_a_run_continues_whatever_its_files_times_say",
            f"{FLIGHT}::test_a_wait_does_not_go_by_the_clock",
        ),
    ),
    60: (
        "a judge or scorer that answers wrongly, raises or hangs; no function of a user's is ever called",
        (
            f"{RELABEL}::test_a_judge_that_does_not_keep_its_promise",
            f"{RELABEL}::test_nobody_listens",
            f"{RELABEL}::test_what_passes_is_tried_again",
            "tests/rm/test_ensemble.py::test_a_bad_score_names_member_and_row",
        ),
    ),
}
"""By number: what it is, and the tests that hold it."""


@cache
def found_in(name: str) -> dict[str, set[str]]:
    """A file's test functions, and the names of each one's cases: keys of the table that parametrizes it, or texts there."""
    tree = ast.parse((ROOT / name).read_text())
    tables: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                tables |= {target.id: node.value} if isinstance(target, ast.Name) else {}
    found: dict[str, set[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            inside = [part for decorator in node.decorator_list for part in ast.walk(decorator)]
            named = [tables[part.id] for part in inside if isinstance(part, ast.Name) and part.id in tables]
            for table in named:
                inside += (key for key in table.keys if key) if isinstance(table, ast.Dict) else ast.walk(table)
            found[node.name] = {part.value for part in inside if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return found


def test_the_table_is_whole() -> None:
    assert list(TABLE) == list(range(1, 61))
    assert all(tests for _, tests in TABLE.values())


@pytest.mark.parametrize("number", TABLE)
def test_what_the_table_names_is_there(number: int) -> None:
    for test in TABLE[number][1]:
        name, _, rest = test.partition("::")
        function, _, case = rest.partition("[")
        assert Path(ROOT / name).is_file(), f"{number}: there is no {name}"
        functions = found_in(name)
        assert function in functions, f"{number}: {name} has no {function}"
        if case:
            assert case.removesuffix("]") in functions[function], f"{number}: {function} has no case {case}"


def test_a_name_that_is_not_there_is_noticed() -> None:
    functions = found_in(INPUT)
    assert "unknown key" in functions["test_config"] and "a key twice" in functions["test_config_file"]
    assert "test_nothing" not in functions and "a key twice" not in functions["test_config"]
