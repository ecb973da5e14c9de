import complexity_report
import size_gate


def test_what_is_too_large_is_named_with_its_size() -> None:
    parameters = ", ".join(f"p{n}" for n in range(8))
    source = f"def wide(self, {parameters}):\n    pass\n"
    assert list(size_gate.problems(source, strict=True)) == [":1 wide: 8 parameters, at most 7"]
    long = "def long():\n    'doc'\n" + "    x = 1\n" * 51
    assert list(size_gate.problems(long, strict=True)) == [":1 long: 51 lines, at most 50"]
    assert list(size_gate.problems("x = 1\n" * 401, strict=False)) == [": 401 lines, at most 400"]
    assert not list(size_gate.problems(source + long, strict=False))


def test_a_command_may_have_many_options() -> None:
    parameters = ", ".join(f"p{n}" for n in range(12))
    source = f"@app.command()\ndef train({parameters}):\n    pass\n"
    assert not list(size_gate.problems(source, strict=True))


def test_classes_are_measured_too() -> None:
    source = "class Big:\n" + "    x = 1\n" * 260
    assert list(size_gate.problems(source, strict=True)) == [":1 class Big: 261 lines, at most 250"]


def test_the_project_keeps_its_own_limits() -> None:
    assert size_gate.main() == 0
    assert max(block[0] for block in complexity_report.measure()) <= complexity_report.LIMIT


def test_the_complexity_report_lists_packages_and_the_worst() -> None:
    text = complexity_report.render([(9, "core/a.py", "f"), (2, "b.py", "g")])
    assert "| core | 1 | 9.0 | 9 |" in text
    assert "| 9 | `f` | `core/a.py` |" in text
