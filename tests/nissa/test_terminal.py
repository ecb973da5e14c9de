import io

from rich.console import Console

from esper.leyline import Event, Level, Record, StepRecord, SystemState
from esper.nissa.terminal import TerminalSink

STARTED = Event(
    name="run_started", time=0.0, message="",
    data={
        "run": "r1", "job": "digits", "parameters": 1234, "samples": 100, "validation_samples": 50,
        "epochs": 2, "steps_per_epoch": 10, "device": "cpu", "seed": 0, "drill": True,
    },
)  # fmt: skip
ENDED = Event(
    name="run_ended", time=9.0, message="",
    data={
        "outcome": "halted", "seconds": 1.5, "steps": 20, "validation": {"left": 0.5},
        "skipped": 1, "rollbacks": 2, "error": "it diverged",
    },
)  # fmt: skip
STEP = StepRecord(
    step=4, attempt=0, epoch=0, batch=4, time=0.0, action="commit", loss=1.0,
    losses={"left": 0.25}, learning_rate=0.1,
)  # fmt: skip
EPOCH = SystemState(
    epoch=0, step=10, attempt=0, time=1.0, losses={"left": 0.5}, validation={"left.acc": 0.75},
    conflict_share=0.4, samples_per_second=1000.0,
)  # fmt: skip
BARE = SystemState(epoch=1, step=10, attempt=0, time=1.0, losses={"left": 0.5})


def shown(records: list[Record], *, terminal: bool) -> str:
    file = io.StringIO()
    sink = TerminalSink(Console(file=file, force_terminal=terminal, width=120, highlight=False))
    for record in records:
        sink.write(record)
    sink.close()
    return file.getvalue()


def test_a_run_is_told_in_plain_lines_without_a_terminal() -> None:
    rollback = Event(name="rollback", time=0.0, message="went back", level=Level.WARNING)
    saved = Event(name="checkpoint_saved", time=0.0, message="saved quietly")
    text = shown([STARTED, STEP, EPOCH, BARE, rollback, saved, ENDED], terminal=False)
    assert "\x1b" not in text
    assert "r1" in text
    assert "poisoned on purpose" in text
    assert "epoch   1 │ loss left 0.5000 │ left.acc 0.7500 │ conflicts  40% │ 1,000/s" in text
    assert "epoch   2 │ loss left 0.5000\n" in text
    assert "went back" in text
    assert "saved quietly" not in text
    assert "halted" in text
    assert "it diverged" in text


def test_on_a_terminal_a_bar_shows_the_current_losses() -> None:
    text = shown([STARTED, STEP, ENDED], terminal=True)
    assert "5/20" in text
    assert "left 0.250" in text


def test_changes_of_seeds_are_one_plain_line_each_with_the_step() -> None:
    long = "seed 'trunk.3>trunk.8' (widen): dormant -> germinated; " + "it fits; " * 12
    changed = Event(name="seed_changed", time=0.0, message=long.strip(), step=1376)
    culled = Event(
        name="seed_changed", time=0.0, message="seed 'a' (mlp): training -> culled", step=1400,
        level=Level.WARNING,
    )  # fmt: skip
    lines = shown([changed, culled], terminal=False).splitlines()
    assert lines == [
        f"● step 1,376: {long.strip()}",
        "▲ step 1,400: seed 'a' (mlp): training -> culled",
    ]


def test_a_refused_command_says_what_was_refused() -> None:
    told = Event(
        name="seed_refused", time=0.0, message="advance seed 'a' refused: gate G2: no gain",
        step=7, level=Level.WARNING,
    )  # fmt: skip
    bare = Event(
        name="seed_refused", time=0.0, message="the executor does not take commands at present",
        step=8, level=Level.WARNING, data={"seed": "a", "operation": "germinate"},
    )  # fmt: skip
    assert shown([told, bare], terminal=False).splitlines() == [
        "▲ step 7: advance seed 'a' refused: gate G2: no gain",
        "▲ step 8: germinate seed 'a' refused: the executor does not take commands at present",
    ]
