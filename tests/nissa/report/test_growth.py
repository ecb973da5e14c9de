import math
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from esper.leyline import Record, SeedState, Stage
from esper.nissa import JsonlSink
from esper.nissa.report import Story, render, write_report
from esper.nissa.report.growth import GrowthStory
from esper.nissa.report.html import ABSENT
from esper.nissa.report.lanes import life_of_seeds
from esper.nissa.report.lives import lives, segments
from nissa.report.browser import drawn
from nissa.report.growing import (
    GAIN,
    STARTED,
    changed,
    decided,
    event,
    germinated,
    real_run,
    records,
    state,
    step,
)


def read(given: list[Record]) -> GrowthStory:
    story = GrowthStory()
    for record in given:
        story.take(record)
    return story


def drawing(story: GrowthStory) -> ET.Element:
    """Parse the drawing strictly, as XML."""
    text = life_of_seeds(story)
    return ET.fromstring(text[text.index("<svg") : text.index("</svg>") + len("</svg>")])


def titles(root: ET.Element) -> list[str]:
    return [title.text or "" for title in root.iter("title")]


def test_the_summary_names_growth() -> None:
    told = Story.of(records()).sentence()
    assert "; one seed was fossilised (1,000 → 1,200 parameters), one was culled" in told
    assert Story.of([event("run_started", 0, **STARTED)]).sentence() == "0 epochs."


def test_a_seed_that_still_grows_is_told_of_as_such() -> None:
    told = Story.of([*records(), germinated(300, "b", 7, attempt=1)]).sentence()
    assert "one was culled, one was still growing" in told
    alone = Story.of([event("run_started", 0, **STARTED), germinated(300, "b", 7)]).sentence()
    assert "no seed was fossilised, one was still growing (1,000 → 1,007 parameters)." in alone
    nothing = Story.of([state(50, 10, a=SeedState(Stage.DORMANT))]).sentence()
    assert "no seed has grown" in nothing


def test_what_a_rollback_took_back_does_not_count() -> None:
    story = read(records())
    assert [(c.step, c.report.seed, c.report.after) for c in story.changes if c.step > 150] == [
        (181, "a", Stage.HOLDING),
        (200, "a", Stage.FOSSILISED),
        (200, "b", Stage.CULLED),
        (201, "b", Stage.EMBARGOED),
    ]
    (course,) = story.courses
    assert (course.first, course.last, course.cause) == (160, 190, "rollback")
    assert [(c.step, c.report.seed) for c in course.changes] == [(180, "a"), (185, "b")]


def test_a_stage_that_a_rollback_tells_counts_more_than_the_changes() -> None:
    given: list[Record] = [germinated(10, "a", 5), changed(11, "a", "germinated", "training")]
    told = [changed(11, "a", "training", "dormant", command="rollback")]
    back = event("rollback", 11, 1, from_step=20, to_step=11)
    story = read([*given, step(20), *told, back])
    assert story.stage_at("a", 11) is Stage.DORMANT
    assert lives(story)[0].outcome == "taken back"


def test_a_resume_takes_back_what_came_after_the_checkpoint() -> None:
    given: list[Record] = [germinated(10, "a", 5), changed(11, "a", "germinated", "training")]
    story = read([*given, step(30), event("run_resumed", 10, 1, from_step=10)])
    assert story.stage_at("a", 99) is Stage.GERMINATED
    assert story.courses[0].cause == "resume"
    assert story.courses[0].last == 31


def test_the_table_tells_every_life() -> None:
    found = {(life.slot, life.outcome): life for life in lives(read(records()))}
    fossil = found["a", "fossilised"]
    assert (fossil.begin, fossil.end, fossil.gain) == (50, 200, GAIN)
    assert "gain on held-out data 0.5" in fossil.reason
    culled = found["b", "culled"]
    assert (culled.blueprint, culled.begin, culled.end) == ("bad", 100, 200)
    assert culled.reason == "seed 'b' is harmful"
    lost = found["b", "taken back"]
    assert "training → blending; the rollback went back to step 160" in lost.reason
    assert len(found) == 4


def test_the_ramp_is_drawn_by_the_shares_that_epochs_saw() -> None:
    ramp = next(s for s in segments(read(records()), "a") if s.stage is Stage.BLENDING)
    assert ramp.alpha == ((100, 0.0), (150, 0.25), (181, 1.0))


def test_a_seed_that_fades_out_falls_to_zero() -> None:
    held = SeedState(Stage.HOLDING, blueprint="mlp", alpha=1.0, parameters=5)
    story = read(
        [
            germinated(10, "a", 5),
            changed(12, "a", "training", "blending", command="seed", operation="advance"),
            changed(40, "a", "blending", "holding"),
            state(50, 15, a=held),
            decided(50, "cull", "seed 'a' harms"),
            changed(50, "a", "holding", "blending", command="seed", operation="cull"),
            changed(70, "a", "blending", "culled"),
            step(80),
        ]
    )
    fading = [s for s in segments(story, "a") if s.fading]
    assert [(s.name, s.alpha) for s in fading] == [("fading out", ((50, 1.0), (70, 0.0)))]
    assert lives(story)[0].reason == "seed 'a' harms"


def test_what_was_fossilised_stays_while_the_slot_is_open_again() -> None:
    reopened = changed(202, "a", "fossilised", "dormant", attempt=1)
    again = germinated(250, "a", 9, attempt=1)
    found = segments(read([*records(), reopened, again]), "a")
    fossil = next(s for s in found if s.stage is Stage.FOSSILISED)
    assert (fossil.begin, fossil.end) == (200, 250)
    assert found[-1].stage is Stage.GERMINATED


def test_parameters_are_known_at_every_change() -> None:
    points = dict(read(records()).parameters)
    assert points[0] == 1000
    assert points[50] == 1200
    assert points[100] == 1230
    assert points[200] == 1200
    chart = next(c for c in Story.of(records()).charts() if c.key == "parameters")
    assert chart.x[-1] == 300
    assert chart.series[0].values[-1] == 1200


def test_gains_are_drawn_between_the_ends_of_their_intervals() -> None:
    chart = next(c for c in Story.of(records()).charts() if c.key == "gain")
    assert [(s.label, s.kind) for s in chart.series] == [
        ("a", "points"), ("a", "high"), ("a", "low"),
    ]  # fmt: skip
    at = chart.x.index(100)
    assert [s.values[at] for s in chart.series] == [0.5, 0.75, 0.25]
    assert chart.series[0].values[chart.x.index(50)] is None


def test_structural_changes_are_marked_across_the_charts() -> None:
    marks = [m for m in Story.of(records()).marks() if m["kind"] == "seed"]
    assert [(m["at"], m["label"]) for m in marks] == [
        (50, "+ mlp"), (100, "+ bad"), (200, "◆ mlp"), (200, "✕ bad"),
    ]  # fmt: skip


def test_the_drawing_has_a_lane_for_each_slot_and_says_why() -> None:
    root = drawing(read(records()))
    assert [t.text for t in root.iter("text") if t.get("class") == "blueprint"] == ["mlp", "bad"]
    told = titles(root)
    assert any("a (mlp): fossilised" in text and "gain on held-out" in text for text in told)
    lost = [text for text in told if text.startswith("taken back by the rollback")]
    assert len(lost) == 2
    assert any("b (bad): blending" in text for text in lost)
    bars = [g for g in root.iter("g") if (g.get("class") or "").startswith("seed ")]
    for bar in bars:
        box = bar.find("rect")
        assert box is not None
        right = float(box.get("x", "")) + float(box.get("width", ""))
        assert 150 <= float(box.get("x", "")) < right <= 1000
    assert {(g.get("class") or "").split()[1] for g in bars} >= {
        "training",
        "blending",
        "embargoed",
    }


def test_decisions_are_told_newest_first_with_values_against_thresholds() -> None:
    page = render(Story.of(records()), "r", "")
    why = page[page.index("<h2>Why</h2>") : page.index("<h2>Where a step")]
    rules = ["cull", "fossilise", "blend", "germinate"]
    places = [why.index(f'<span class="rule">{rule}</span>') for rule in rules]
    assert places == sorted(places)
    assert why.count('<details class="quiet">') == 1
    assert "no change, once" in why
    assert "<td><code>gap</code></td><td>0.1</td><td>0.3</td>" in why
    assert "<td><code>x</code></td><td>2</td><td></td>" in why
    assert f"<td><code>y</code></td><td>{ABSENT}</td><td>1.5</td>" in why
    assert "gap above 0.3" in why
    assert "carried out: seed &#x27;b&#x27;: training -&gt; culled" in why


def test_a_decision_that_was_refused_or_taken_back_says_so() -> None:
    refusal = {"command": "seed", "applied": False, "detail": "it is embargoed", "seed": "b"}
    given: list[Record] = [
        decided(10, "germinate", "'mlp' in 'b'"),
        event("seed_refused", 10, **refusal),
        step(20),
        event("rollback", 5, 1, from_step=20, to_step=5, latency_ms=1.0),
    ]
    story = read(given)
    (decision,) = story.decisions
    assert decision.lost
    assert decision.outcome is not None
    assert not decision.outcome.applied
    page = render(Story.of(given), "r", "")
    assert "refused: it is embargoed" in page
    assert '<span class="gone">taken back</span>' in page


def test_with_several_decisions_open_a_report_answers_the_one_that_names_its_seed() -> None:
    story = read(
        [
            decided(10, "germinate", "'mlp' in 'a'"),
            decided(20, "blend", "seed 'b' gains"),
            changed(20, "b", "training", "blending", command="seed", operation="advance"),
            germinated(30, "a", 3),
        ]
    )
    assert [d.outcome and d.outcome.seed for d in story.decisions] == ["a", "b"]


def test_a_run_without_growth_has_none_of_it() -> None:
    given: list[Record] = [event("run_started", 0, **STARTED), *map(step, range(50))]
    given.append(decided(50, "plateau", "the loss stands still", decision="no_change"))
    story = Story.of(given)
    page = render(story, "r", "")
    assert not story.growth.present
    assert {c.key for c in story.charts()} == {"loss", "rate"}
    assert not story.marks()
    main = page[page.index("<main>") : page.index("</main>")]
    for word in ("Life of the seeds", "<h2>Why", "seeds", "parameters at the end", "baseline"):
        assert word not in main
    # Only where the page has a list of decisions are they routine in the list of events.
    assert '<tr class="routine"><td>01:46:40</td><td>50</td>' not in main


@pytest.mark.parametrize("broken", [None, "NaN", "a lot"])
def test_values_that_are_no_numbers_are_left_out(broken: Any) -> None:
    gates = [{"gate": "G2", "passed": False, "reason": "no", "values": {"gain": broken, "age": 3}}]
    change = event("seed_changed", 9, command="seed", applied=True, detail="", seed="a",
                   before="dormant", after="germinated", gates=gates)  # fmt: skip
    story = read([change, decided(9, "r", "why", values={"gap": broken, "age": 1})])
    assert story.changes[0].report.gates[0].values == {"age": 3.0}
    assert story.decisions[0].explanation.values == {"age": 1.0}


def test_events_of_others_that_carry_no_report_are_left_alone() -> None:
    odd = [
        event("seed_changed", 1, anything="else"),
        event("seed_changed", 1, command="seed", applied=True, detail="", after="no such stage"),
        event("seed_refused", 1, command=7),
        event("policy_decided", 1, rule="r"),
    ]
    story = read([*odd])
    assert not story.present
    assert not story.decisions
    assert "r</h1>" not in render(Story.of([*odd]), "r", "")


def test_hostile_names_are_text() -> None:
    name = "</script></svg><b>bold</b>"
    given = [
        germinated(10, name, 3, blueprint=name),
        decided(20, name, name, otherwise=name, values={name: 1.0}),
        decided(21, name, name, decision="no_change", otherwise=name),
        step(90),
    ]
    page = render(Story.of(given), "r", "")
    main = page[page.index("<main>") : page.index("</main>")]
    assert "<b>bold" not in main
    assert name not in main
    drawing(read([*given]))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("theme", "scheme"),
    [("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])],
)
def test_growth_is_drawn_in_a_real_browser(theme: str, scheme: list[str], tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "events.jsonl")
    for record in records():
        sink.write(record)
    sink.close()
    result = drawn(write_report(tmp_path), tmp_path, *scheme)
    # Loss, learning rate, parameters and gains.
    assert result.stdout.count("<canvas") == 4
    assert f'data-theme="{theme}"' in result.stdout
    assert "Life of the seeds" in result.stdout
    assert "CONSOLE" not in result.stderr


@pytest.mark.timeout(60)
@pytest.mark.parametrize("spoil", [False, True])
def test_the_story_of_a_real_run_ends_with_the_stages_of_its_executor(
    spoil: bool, tmp_path: Path
) -> None:
    memory, stages = real_run(tmp_path, spoil=spoil)
    story = read(memory.records)
    assert {name: story.stage_at(name, story.now) for name in stages} == stages
    assert set(story.slots) == set(stages)
    assert bool(story.courses) == spoil
    last = story.states[-1].growth
    assert last is not None
    assert story.parameters[-1][1] == last.parameters
    for slot in stages:
        found = segments(story, slot)
        assert all(a.end == b.begin for a, b in pairwise(found))
        ramps = [s.alpha for s in found if s.alpha]
        assert ramps or spoil
        assert all(0 <= share <= 1 for ramp in ramps for _, share in ramp)
    # In conservative mode, after the rollback, nothing grows on.
    expected = "taken back" if spoil else "fossilised"
    assert expected in {life.outcome for life in lives(story)}
    gains = [life.gain for life in lives(story) if life.outcome == "fossilised"]
    assert all(gain is not None and gain.low > 0 and math.isfinite(gain.high) for gain in gains)
    root = drawing(story)
    assert len([t for t in root.iter("text") if t.get("class") == "slot"]) == len(stages)
