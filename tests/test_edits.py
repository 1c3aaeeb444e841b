"""What is made of a model's answer: read strictly, applied exactly, refused with a line that helps."""

import json
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysearch.model import Operator
from raysearch.outline import note
from raysearch.proposers import edits
from raysearch.proposers.edits import SCHEMA, Answer, AnswerError, Edit, apply, parse, schema_of_lines

PROGRAM = "LR = 0.02\nDEPTH = 6\n\n\ndef train(run):\n    return LR * DEPTH\n"
FILES = {"train.py": PROGRAM}
GOOD: dict[str, Any] = {
    "hypothesis": "more is better",
    "operator": "tune",
    "predicted_delta": -0.01,
    "edits": [{"path": None, "search": "DEPTH = 6", "replace": "DEPTH = 8"}],
    "file": None,
}


def answer(*changes: tuple[str, str], path: str | None = None, file: str | None = None) -> Answer:
    return Answer("h", Operator.TUNE, None, tuple(Edit(path, *change) for change in changes), file)


def refusal(made: Answer, files: dict[str, str] = FILES) -> str:
    with pytest.raises(AnswerError) as error:
        apply(made, files)
    return one_line(error)


def misread(text: str) -> str:
    with pytest.raises(AnswerError) as error:
        parse(text)
    return one_line(error)


def line_of(made: Callable[[], object]) -> str | None:
    """What is refused as a line; None when it is not."""
    try:
        made()
    except AnswerError as error:
        return str(error)
    return None


def one_line(error: pytest.ExceptionInfo[AnswerError]) -> str:
    line = str(error.value)
    line.encode()  # it is sent back as it is
    assert line.isprintable()
    assert len(line) < 2_000
    return line


# ---- reading ----


def test_an_answer_is_read_alone_or_from_its_fenced_block():
    plain = json.dumps(GOOD)
    expected = Answer("more is better", Operator.TUNE, -0.01, (Edit(None, "DEPTH = 6", "DEPTH = 8"),))
    for text in (plain, f" \n{plain}\n", f"I think so:\n```json\n{plain}\n```\nThat is all.", f"```\r\n{plain}\r\n```"):
        assert parse(text) == expected


def test_keys_that_may_be_null_may_be_left_out():
    found = parse('{"hypothesis": "h", "operator": "draft", "file": "x = 1\\n"}')
    assert found == Answer("h", Operator.DRAFT, None, (), "x = 1\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the answer is empty; answer with exactly one"),
        ("I would raise DEPTH.", "the answer holds 0 JSON objects; answer with exactly one"),
        ("```\n{}\n```\nor\n```\n{}\n```", "the answer holds 2 JSON objects"),
        ("```\n{}", "the answer holds 0 JSON objects"),
        ("[1]", "the answer holds 0 JSON objects"),
        (json.dumps(GOOD)[:60], "the answer is no valid JSON: Unterminated string"),
        (json.dumps(GOOD) + "x", "Extra data"),
        ('{"hypothesis": NaN}', "the answer holds NaN, which is no JSON"),
        ('{"predicted_delta": -Infinity}', "the answer holds -Infinity"),
        ('{"hypothesis": "a", "hypothesis": "b"}', "has the key 'hypothesis' twice"),
        ("{" + '"a":{' * 100_000, "nested too deeply"),
        ('{"hypothesis": ' + "9" * 5_000 + "}", "the answer is no valid JSON: Exceeds the limit"),
        ("{}", "the answer does not fit its schema: Object missing required field `hypothesis`"),
        (json.dumps(GOOD | {"metric": 1}), "unknown field `metric`"),
        (json.dumps(GOOD | {"hypothesis": 3}), "Expected `str`, got `int` - at `$.hypothesis`"),
        (json.dumps(GOOD | {"predicted_delta": "-1"}), "at `$.predicted_delta`"),
        (json.dumps(GOOD | {"predicted_delta": True}), "at `$.predicted_delta`"),
        (json.dumps(GOOD | {"edits": [{"search": "a"}]}), "missing required field `replace` - at `$.edits[0]`"),
        (json.dumps(GOOD).replace("-0.01", "1e999"), "predicted_delta is inf"),
        (json.dumps(GOOD | {"operator": "transfer"}), "'transfer' is not allowed; take one of draft, tune, simplify"),
        (json.dumps(GOOD | {"hypothesis": " \n"}), "hypothesis is empty"),
        (json.dumps(GOOD | {"hypothesis": "a" * 1_001}), "hypothesis has 1001 characters; at most 1000"),
        (json.dumps(GOOD | {"hypothesis": "a\0b"}), "hypothesis holds a NUL character"),
        (json.dumps(GOOD | {"file": "\ud800"}), "file holds half a character"),
        (json.dumps(GOOD | {"edits": [GOOD["edits"][0], {"search": "\udfff", "replace": ""}]}), "edit 2 holds half"),
        (json.dumps(GOOD | {"edits": GOOD["edits"] * 101}), "the answer has 101 edits; at most 100"),
        ("{" + " " * 1_000_000, "the answer has 1000001 characters; at most 1000000 are read"),
    ],
)
def test_what_is_no_answer_is_refused_with_what_is_wrong(text: str, said: str):
    assert said in misread(text)


def test_the_operators_of_the_search_itself_are_not_for_models():
    assert {Operator.TRANSFER, Operator.REPLICATE} == set(Operator) - set(edits.OPERATORS)


def test_the_schema_is_strict_throughout_and_agrees_with_what_is_read():
    def strict(schema: Any) -> None:
        if isinstance(schema, dict):
            if schema.get("type") == "object":
                assert schema["additionalProperties"] is False
                assert schema["required"] == list(schema["properties"])
            for part in schema.values():
                strict(part)

    strict(SCHEMA)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(GOOD, SCHEMA)
    for wrong in (GOOD | {"operator": "transfer"}, GOOD | {"more": 1}, GOOD | {"edits": [{}]}, {}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)
        misread(json.dumps(wrong))


@given(st.text(), st.binary())
def test_anything_is_read_or_refused_and_nothing_else_happens(text: str, raw: bytes):
    for source in (text, "{" + text, raw.decode("utf-8", "surrogateescape"), json.dumps(GOOD)[: len(text)]):
        line = line_of(lambda source=source: parse(source))
        assert line is None or "\n" not in line


# ---- applying ----


def test_edits_are_looked_for_in_the_file_as_it_is():
    made = answer(("return LR * DEPTH", "return DEPTH"), ("LR = 0.02\n", ""), ("DEPTH = 6", "LR = 0.02\nDEPTH = 5"))
    assert apply(made, FILES) == {"train.py": "LR = 0.02\nDEPTH = 5\n\n\ndef train(run):\n    return DEPTH\n"}


def test_only_the_files_that_differ_come_back():
    files = {"a.py": "A = 1\n", "b.py": "B = 1\n", "c.py": "C = 1\n"}
    made = Answer("h", Operator.DRAFT, None, (Edit("b.py", "1", "2"), Edit("c.py", "C", "C")))
    assert apply(made, files) == {"b.py": "B = 2\n"}


def test_a_search_that_occurs_more_often_says_how_often_and_where():
    said = refusal(answer(("LR", "RATE")))
    assert said == "edit 1: SEARCH occurs 2 times in train.py, first in lines 1 and 6; copy more lines around it"
    assert "occurs 2 times" in refusal(answer(("aba", "x")), {"train.py": "ababa"})  # they overlap


def test_a_search_that_does_not_occur_shows_the_line_that_was_probably_meant():
    assert refusal(answer(("DEPTH=6", "DEPTH=8"))) == (
        "edit 1: SEARCH does not occur in train.py; not 'DEPTH=6' but, in line 2, 'DEPTH = 6'"
    )
    assert "in line 5, 'def train(run):'" in refusal(answer(("DEPTH = 6\n\n\ndef train(runs):\n", "")))
    assert "each of its lines does, but not one after the other" in refusal(answer(("DEPTH = 6\ndef train(run):", "")))
    assert "no line is like 'optimizer'" in refusal(answer(("optimizer", "")))
    assert "no line is like '\\ud800'" in refusal(answer(("\ud800", "")))


def test_the_line_that_was_meant_is_found_soon_in_huge_texts():
    huge = "".join(f"{'ab' * 500}{number}\n" for number in range(50_000))
    begun = time.process_time()
    assert "does not occur" in refusal(answer(("ba" * 100_000, "x")), {"train.py": huge})
    assert time.process_time() - begun < 5.0


def test_a_path_that_may_not_be_edited_is_refused_by_name():
    for path in ("harness.py", "../train.py", "/etc/passwd", "./train.py", ""):
        said = refusal(answer(("a", "b"), path=path))
        assert said == f"edit 1: {path!r} may not be edited; editable: train.py"
    two = {"b.py": "1", "a.py": "1"}
    assert refusal(answer(("1", "2")), two) == "edit 1: names no path; editable are a.py, b.py"
    assert refusal(answer(file="2"), two) == (
        "a whole file is for one editable file, there are 2: a.py, b.py; give edits"
    )


def test_all_that_is_wrong_with_edits_is_said_at_once():
    said = refusal(answer(("", "x"), ("LR", "x"), ("optimizer", "x"), ("scheduler", "x"), ("DEPTH = 6", "DEPTH = 7")))
    assert said.startswith("edit 1: SEARCH is empty; copy the lines that are to change; edit 2: SEARCH occurs 2 times")
    assert said.endswith("; and 1 more")


def test_an_edit_that_is_said_twice_is_made_once():
    change = ("DEPTH = 6", "DEPTH = 7")
    assert apply(answer(change, change), FILES) == apply(answer(change), FILES)


def test_edits_that_overlap_are_refused():
    assert refusal(answer(("= 6\n", "= 7\n"), ("DEPTH = 6", "DEPTH = 8"))) == (
        "edits 2 and 1 overlap in train.py; make them one"
    )
    assert apply(answer(("\nDEPTH", "\nD"), (" = 6", " = 7")), FILES)["train.py"].startswith("LR = 0.02\nD = 7\n")


def test_what_changes_nothing_or_says_two_things_is_refused():
    said = "the result is the program as it is; in each edit REPLACE is the same as SEARCH; write it as it shall be"
    assert refusal(answer(("DEPTH = 6", "DEPTH = 6"))) == said
    assert refusal(answer(file=PROGRAM)) == "the result is the program as it is; change something"
    assert refusal(answer()) == "the answer has neither edits nor a file; give one of them"
    assert refusal(answer(("6", "7"), file="x")).startswith("the answer has both edits and a file")
    assert refusal(answer(file=" \n")).startswith("the new train.py is empty")
    assert refusal(answer(file="x\n" * 10_001)) == "train.py would have 10001 lines; at most 10000 are allowed"


def test_a_whole_file_gets_the_line_ends_of_the_old_one_and_nothing_else():
    dos = {"train.py": PROGRAM.replace("\n", "\r\n")}
    new = "LR = 1\n\nDEPTH = 2  "
    for text in (new, new.replace("\n", "\r\n")):
        assert apply(answer(file=text), FILES) == {"train.py": new}
        assert apply(answer(file=text), dos) == {"train.py": new.replace("\n", "\r\n")}
        assert apply(answer(file=text), {"train.py": "a\nb\r\n"}) == {"train.py": text}
    assert refusal(answer(file=PROGRAM), dos) == "the result is the program as it is; change something"


def test_edits_with_other_line_ends_than_the_file_are_refused():
    dos = {"train.py": PROGRAM.replace("\n", "\r\n")}
    said = refusal(answer(("LR = 0.02\nDEPTH = 6", "LR = 1")), dos)
    assert said == "edit 1: the lines of train.py end in \\r\\n, those of SEARCH do not; write them so"
    assert "those of REPLACE do not" in refusal(answer(("DEPTH = 6", "A = 1\nDEPTH = 6")), dos)
    assert "end in \\n alone, those of REPLACE" in refusal(answer(("DEPTH = 6", "A = 1\r\nDEPTH = 6")))
    assert apply(answer(("LR = 0.02\r\n", "")), dos)["train.py"].startswith("DEPTH = 6\r\n")


def test_by_the_narrower_schema_any_line_that_is_shown_and_stands_once_can_be_replaced():
    text = "A = 1\nB = 2\n\nC = 3\n    pass\nD = 4\n    pass\nA = 11\nhidden()\n"
    files = {"other.txt": "E = 5\n", "train.py": text}
    items = schema_of_lines(files, "what is known\n" + text.replace("hidden()\n", "") + "E = 5\n")["properties"][
        "edits"
    ]
    other, train = (place["properties"] for place in items["items"]["anyOf"])
    assert (other["path"]["enum"], other["search"]["enum"]) == (["other.txt"], ["E = 5"])
    assert train["path"]["enum"] == ["train.py"]
    assert train["search"]["enum"] == ["B = 2", "C = 3", "D = 4", "A = 11"]  # "A = 1" begins another line too
    for line in train["search"]["enum"]:
        changed = apply(answer((line, "Z = 0"), path="train.py"), files)
        assert changed == {"train.py": text.replace(line, "Z = 0")}


def test_where_no_line_can_be_named_the_schema_is_the_wide_one():
    assert schema_of_lines({"train.py": PROGRAM}, "nothing of it") == SCHEMA
    dos = {"train.py": PROGRAM.replace("\n", "\r\n")}
    lines = schema_of_lines(dos, PROGRAM)["properties"]["edits"]["items"]["anyOf"][0]["properties"]["search"]["enum"]
    assert "DEPTH = 6" in lines


def test_lines_that_were_not_shown_are_not_lost_by_a_whole_file():
    said = refusal(answer(file=PROGRAM.replace("    return LR", f"    {note(12)}\n    return LR")))
    assert said.startswith("train.py would hold '# [12 lines are left out here]', which stands for lines that were not")


TEXTS = st.text(alphabet="ab\n\r é", max_size=12)


@given(
    files=st.dictionaries(st.sampled_from(["a.py", "b.py"]), TEXTS, min_size=1),
    changes=st.lists(st.builds(Edit, st.sampled_from([None, "a.py", "b.py", "../a.py"]), TEXTS, TEXTS), max_size=3),
    file=st.none() | TEXTS,
)
def test_what_applies_was_found_once_changes_something_and_touches_no_other_file(
    files: dict[str, str], changes: list[Edit], file: str | None
):
    before, made = dict(files), Answer("h", Operator.DRAFT, None, tuple(changes), file)
    line = line_of(lambda: apply(made, files))
    assert files == before
    if line is not None:
        assert "\n" not in line
        return
    changed = apply(made, files)
    assert changed
    assert changed.keys() <= files.keys()
    assert all(changed[path] != files[path] for path in changed)
    assert (file is None) != (not changes)
    for change in changes:
        text = files[change.path or next(iter(files))]
        assert sum(text.startswith(change.search, start) for start in range(len(text))) == 1
    if len(changes) == 1:
        (change,) = changes
        path = change.path or next(iter(files))
        assert changed == {path: files[path].replace(change.search, change.replace)}


@given(text=TEXTS.filter(bool), data=st.data())
def test_any_piece_that_occurs_once_can_be_replaced(text: str, data: st.DataObject):
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    piece, new = text[start:end], data.draw(st.text(alphabet="xy"))
    once = sum(text.startswith(piece, place) for place in range(len(text))) == 1
    dos = "\r\n" in text and {"\r", "\n"}.isdisjoint(text.replace("\r\n", ""))
    if dos and "\n" in piece.replace("\r\n", ""):  # it cuts the end of a line in two
        assert "those of SEARCH do not" in refusal(answer((piece, new)), {"train.py": text})
    elif once:
        assert apply(answer((piece, new)), {"train.py": text}) == {"train.py": text[:start] + new + text[end:]}
    else:
        assert "occurs" in refusal(answer((piece, new)), {"train.py": text})
