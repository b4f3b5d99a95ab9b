"""The report of a subject's tests says what became of each, and never that none failed because none ran."""

from pathlib import Path

import pytest

from benchmarks.checks import SUBJECTS, read_junit

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.fuzz" name="test_bodies" time="12.345"><properties>
<property name="bodies" value="20000" /></properties></testcase>
<testcase classname="tests.fuzz" name="test_wrong" time="1"><failure message="no" /></testcase>
<testcase classname="tests.fuzz" name="test_left_out" time="0"><skipped message="no" /></testcase>
</testsuite></testsuites>"""


def test_each_test_has_its_outcome_and_what_it_recorded(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    found = read_junit(path)
    assert (found["passed"], found["other"]) == (1, 2)
    assert [test["outcome"] for test in found["tests"]] == ["passed", "failure", "skipped"]
    assert found["tests"][0] == {
        "name": "tests.fuzz.test_bodies",
        "outcome": "passed",
        "seconds": 12.35,
        "recorded": {"bodies": "20000"},
    }


def test_no_test_is_no_report(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text("<testsuites />")
    with pytest.raises(ValueError, match="no test was run"):
        read_junit(path)


def test_the_tests_that_are_named_are_there() -> None:
    for subject in SUBJECTS.values():
        for argument in subject.arguments:
            if argument.startswith("tests/"):
                assert (Path(__file__).parents[2] / argument).exists(), argument
