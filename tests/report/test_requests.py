"""The report of a ledger: its numbers and words, escaping, and that each page stands alone."""

from __future__ import annotations

import base64

import pytest
import torch

from html_page import Page
from lightning_cl.core.requests import Influence
from lightning_cl.report.requests import request_matrix, write_request_report
from lightning_cl.unlearning import Ledger, RequestRecord

pytest.importorskip("matplotlib", reason="needs the extra `report`")
pytest.importorskip("jinja2", reason="needs the extra `report`")


def make_ledger(*changes: dict) -> Ledger:
    """Build a ledger with a record for each set of changes."""
    ledger = Ledger()
    for position, change in enumerate(changes):
        arguments = {
            "name": f"request {position}",
            "asked": 120,
            "ids": list(range(100)),
            "ids_hash": f"hash of ids {position}",
            "samples_hash": f"hash of content {position}",
            "method": "npo",
            "settings": {"measure_samples": 64, "method": {"class": "NPO", "beta": 0.1}},
            "seed": 5,
            "reference_hash": None,
            "weights_hash": "hash of weights",
            "started": "2026-01-31T10:00:00+00:00",
            "ended": "2026-01-31T10:02:05+00:00",
            "steps": 16,
            "stopped": None,
            "before": measured(0.9, auc=0.8),
            "after": measured(0.3),
            "influences": [],
            "previous": ledger.last_hash,
        }
        ledger.append(RequestRecord(**{**arguments, **change}))
    return ledger


def measured(forgotten: float, auc: float = 0.5, **further: float) -> dict[str, float]:
    """Return the measurements of a record; ``a__b`` is ``request:a/b``."""
    values = {
        "forget/accuracy": forgotten,
        "forget/probability": forgotten,
        "forget/membership_auc": auc,
        "forget/samples": 64,
        "holdout/samples": 64,
        "holdout/accuracy": 0.55,
        "holdout/probability": 0.5,
        "retain/accuracy": 0.875,
        "retain/probability": 0.75,
    }
    return values | {f"request:{name.replace('__', '/').replace('_', ' ')}": value for name, value in further.items()}


THREE = (
    {"after": measured(0.1)},
    {"after": measured(0.2, request_0__probability=0.4, request_0__accuracy=0.1)},
    {
        "after": measured(
            0.3,
            request_0__probability=0.25,
            request_0__accuracy=0.1,
            request_1__probability=0.15,
            request_1__accuracy=0.1,
        )
    },
)


def report(tmp_path, *changes: dict, **arguments) -> tuple[Page, list[Page]]:
    """Write a ledger and its report; return the overview and the pages of the requests."""
    make_ledger(*changes).write(tmp_path / "requests.jsonl")
    path = write_request_report(tmp_path / "requests.jsonl", tmp_path / "report", **arguments)
    assert path == tmp_path / "report" / "requests.html"
    pages = sorted(path.parent.glob("request_*.html"))
    return Page(path.read_text(encoding="utf-8")), [Page(page.read_text(encoding="utf-8")) for page in pages]


def test_matrix_and_revival(tmp_path) -> None:
    """A[i][j] is read from each record, and what came back is the largest later value minus the first."""
    records = make_ledger(*THREE).records
    expected = [[0.1, None, None], [0.4, 0.2, None], [0.25, 0.15, 0.3]]
    assert request_matrix(records, "probability") == expected
    overview, pages = report(tmp_path, *THREE)
    summary, accuracy, probability = overview.tables
    assert probability[0] == ["After request", "request 0", "request 1", "request 2"]
    assert [row[1:] for row in probability[1:4]] == [
        ["0.100", "–", "–"],
        ["0.400", "0.200", "–"],
        ["0.250", "0.150", "0.300"],
    ]
    assert probability[4] == ["Came back", "+0.300", "-0.050", "–"]
    assert accuracy[4][1:] == ["+0.000", "-0.100", "–"]
    assert summary[1] == [
        "request 0",
        "100",
        "npo",
        "Not told apart any more",
        "90.0 %",
        "10.0 %",
        "87.5 %",
        "87.5 %",
        "0",
    ]
    assert "rose by up to 30.0 percentage points" in " ".join(pages[0].text.split())
    assert "did not rise again" in pages[1].text
    assert "later requests" not in pages[2].text


def test_a_set_that_was_not_measured_again_is_not_called_gone(tmp_path) -> None:
    """A missing row stands as missing; only the columns that it belongs to are without a revival."""
    changes = [THREE[0], {"after": measured(0.2)}, {"after": measured(0.3, request_1__probability=0.6)}]
    overview, pages = report(tmp_path, *changes)
    assert overview.tables[-1][4] == ["Came back", "–", "+0.400", "–"]
    assert "they may have come back" in pages[0].text


def test_measurements_that_are_no_numbers(tmp_path) -> None:
    """Of a model that was destroyed: they stand as such, and nothing is made of them."""
    nan = float("nan")
    changes = [{"after": {**measured(nan), "retain/accuracy": nan, "own": nan}}, {"after": measured(0.2)}]
    overview, pages = report(tmp_path, *changes)
    assert overview.tables[0][1][4:8] == ["90.0 %", "no number", "87.5 %", "no number"]
    assert overview.tables[-1][1:] == [["request 0", "–", "–"], ["request 1", "–", "0.200"], ["Came back", "–", "–"]]
    rows = next(table for table in pages[0].tables if table[0][0] == "Measured")
    assert rows[1] == ["Right answers on the forgotten samples", "90.0 %", "no number"]
    assert ["own", "–", "no number"] in next(table for table in pages[0].tables if table[0][0] == "Name")
    assert "percentage points" not in pages[0].text
    assert "as many of the kept samples" not in pages[0].text
    assert "nan" not in pages[0].text + overview.text


def test_a_missing_row_leaves_the_columns_before_it(tmp_path) -> None:
    """Of the first request all is known, of the second one not."""
    after = measured(0.2, request_0__probability=0.4), measured(0.3, request_0__probability=0.2)
    overview, _ = report(tmp_path, THREE[0], *({"after": values} for values in after))
    assert overview.tables[-1][4] == ["Came back", "+0.300", "–", "–"]


@pytest.mark.parametrize(
    ("before", "after", "reference", "title"),
    [
        (0.8, 0.5, None, "Not told apart any more"),
        (0.8, 0.7, None, "Still recognised"),
        (0.8, 0.3, None, "Conspicuously unknown"),
        (0.55, 0.5, None, "No evidence from this test"),
        (0.8, 0.7, 0.68, "Not told apart any more"),
        (0.8, 0.5, 0.68, "Conspicuously unknown"),
        (0.5, 0.04, 0.02, "Not told apart any more"),
        (0.8, None, None, "Not measured"),
    ],
)
def test_verdict(before, after, reference, title, tmp_path) -> None:
    """Against one half or the retrained model's, allowing for chance, and never good where nothing was recognised."""
    values = measured(0.2, auc=after or 0.0)
    if after is None:
        del values["forget/membership_auc"]
    retrained = None if reference is None else {"request 0": {"forget/membership_auc": reference}}
    overview, pages = report(tmp_path, {"before": measured(0.9, auc=before), "after": values}, retrained=retrained)
    assert overview.tables[0][1][3] == title
    assert f"{title}" in pages[0].text
    assert ("No model trained again without the samples was given" in pages[0].text) == (reference is None)
    if after is not None:
        # two standard errors of 64 against 64 scores: 2 * sqrt(129 / (12 * 64 * 64))
        assert "give or take 10" in pages[0].text


def test_page_answers_the_five_questions(tmp_path) -> None:
    """Numbers before and after, the retrained model's beside them, what carries influence, hashes, time."""
    influences = [
        Influence("ExperienceReplay", "samples in memory", "removed", 1),
        Influence("EWC", "importances", "recomputed"),
        Influence("SI", "path integral", "remains"),
    ]
    change = {
        "influences": influences,
        "stopped": "the floor was reached",
        "after": {**measured(0.3), "retain/accuracy": 0.75, "own": 1.5},
        "reference_hash": "hash of reference",
    }
    retrained = {"request 0": {"forget/accuracy": 0.4}}
    overview, (page,) = report(tmp_path, change, retrained=retrained)
    text = " ".join(page.text.split())
    for heading in ("What was asked", "What was done", "Is it gone?", "What did it cost?", "What still carries its"):
        assert heading in text
    gone = next(table for table in page.tables if table[0][0] == "Measured")
    assert gone[0][1:] == ["Before", "After", "Trained again without them"]
    assert gone[1] == ["Right answers on the forgotten samples", "90.0 %", "30.0 %", "40.0 %"]
    assert "12.5 percentage points fewer" in text
    assert "16 training steps" in text
    assert "for 2 min 5 s" in text
    assert "31 January 2026, 10:00:00 UTC" in text
    assert "It ended before its last step: the floor was reached." in text
    states = next(table for table in page.tables if table[0][0] == "Part of the training")
    assert [row[2] for row in states[1:]] == [
        "1 entry removed",
        "made anew without the samples",
        "still carries their influence",
    ]
    assert overview.tables[0][1][-1] == "1"
    assert ["own", "–", "1.5"] in next(table for table in page.tables if table[0][0] == "Name")
    record = make_ledger(change).records[0]
    for value in ("hash of ids 0", "hash of content 0", "hash of weights", "hash of reference", record.hash):
        assert value in text
    assert record.hash in overview.text
    assert "100 samples of the training data" in text
    assert ["method", "beta: 0.1, class: NPO"] in next(table for table in page.tables if table[0][0] == "Setting")


def test_the_least_there_can_be(tmp_path) -> None:
    """A request without identities, steps, settings or measurements says so, and claims nothing."""
    bare = {"ids": [], "ids_hash": "", "settings": {}, "steps": 0, "before": {}, "after": {}}
    overview, (page,) = report(tmp_path, bare)
    text = " ".join(page.text.split())
    assert "cannot say which they were" in text
    assert "at once, without a training step" in text
    assert text.count("It was not measured.") == 2
    assert "No other part of the training kept anything" in text
    assert overview.tables[0][1][1:] == ["–", "npo", "Not measured", "–", "–", "–", "–", "0"]
    assert len(overview.tables) == 1
    assert not (tmp_path / "report" / "request_matrix.png").exists()


def test_pages_stand_alone_and_point_to_each_other(tmp_path) -> None:
    """Figures are inside in both themes, links lead to files that are there, nothing comes from the network."""
    overview, pages = report(tmp_path, *THREE)
    folder = tmp_path / "report"
    sources = overview.values("src") + overview.values("srcset")
    light = base64.b64decode(overview.values("src")[0].partition(";base64,")[2], validate=True)
    assert light == (folder / "request_matrix.png").read_bytes()
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert overview.values("href") == [f"request_{i}_request-{i - 1}.html" for i in (1, 2, 3)]
    assert all((folder / link).exists() for link in overview.values("href"))
    assert [page.values("href") for page in pages] == [["requests.html"]] * 3
    for path in folder.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert "http" not in text
        assert "url(" not in text
        assert "<script" not in text
        assert "prefers-color-scheme: dark" in text
    for page in (overview, *pages):
        assert page.values("lang", "html") == ["en"]
        assert set(page.values("aria-labelledby")) <= set(page.values("id"))
        assert page.values("scope", "th")


def test_text_is_escaped(tmp_path) -> None:
    """No name, setting or state can add a tag or a file outside of the folder."""
    evil = '<script>alert("1")</script>&amp;../'
    change = {
        "name": evil,
        "method": evil,
        "settings": {evil: evil},
        "influences": [Influence(evil, evil, "remains")],
        "stopped": evil,
    }
    overview, (page,) = report(tmp_path, change)
    assert evil in overview.text
    assert page.text.count(evil) >= 6
    for path in (tmp_path / "report").glob("*.html"):
        assert "<script" not in path.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "requests.jsonl"]


def test_refuses(tmp_path) -> None:
    """An empty ledger, a changed one, and a retrained model of a request that was not served."""
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match="holds no record"):
        write_request_report(empty, tmp_path / "report")
    path = tmp_path / "requests.jsonl"
    make_ledger({}, {}).write(path)
    with pytest.raises(ValueError, match=r"`retrained` names \['other'\]"):
        write_request_report(path, tmp_path / "report", retrained={"other": {}})
    path.write_text(path.read_text().replace('"steps": 16', '"steps": 17', 1))
    with pytest.raises(ValueError, match="does not follow"):
        write_request_report(path, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_of_a_real_run(tmp_path) -> None:
    """What a callback writes is read: a request in a stream, with its measurements and purged memory."""
    from lightning.pytorch import Trainer

    from lightning_cl import ExperienceReplay
    from lightning_cl.core.requests import ForgetRequest
    from lightning_cl.unlearning import Unlearn
    from toys import ToyModule, toy_stream

    torch.manual_seed(0)
    requests = [ForgetRequest("class 0", classes=[0], after=1), ForgetRequest("rows", rows=[2, 3, 6])]
    callbacks = [Unlearn("npo", ledger_file=str(tmp_path / "requests.jsonl")), ExperienceReplay(8)]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=-1, callbacks=callbacks, enable_model_summary=False, **quiet)
    trainer.fit(ToyModule(), datamodule=toy_stream(requests=requests))
    path = write_request_report(tmp_path / "requests.jsonl", tmp_path / "report")
    overview = Page(path.read_text(encoding="utf-8"))
    summary, accuracy, probability = overview.tables
    assert [row[0] for row in summary[1:]] == ["class 0", "rows"]
    assert summary[1][1] == "12"
    record = callbacks[0].ledger.records[1]
    assert probability[2][1] == f"{record.after['request:class 0/probability']:.3f}"
    assert accuracy[2][2] == f"{record.after['forget/accuracy']:.3f}"
    page = Page((path.parent / "request_1_class-0.html").read_text(encoding="utf-8"))
    assert "ExperienceReplay" in page.text
