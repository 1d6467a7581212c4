"""The HTML report: its numbers, its parts, escaping, and that it stands alone."""

from __future__ import annotations

import base64
import math

import pytest

from html_page import Page
from lightning_cl.report import summarise, write_report
from lightning_cl.report.style import png
from lightning_cl.report.table import COLUMNS

pytest.importorskip("matplotlib", reason="needs the extra `report`")
pytest.importorskip("jinja2", reason="needs the extra `report`")

from lightning_cl.report import plots


@pytest.fixture(scope="module")
def records(make_record, make_within):
    """Four methods, two seeds each; one run with evaluations within tasks."""
    made = [make_record(m, s, keep=k) for m, k in (("finetune", 0), ("ewc", 0.5), ("er", 0.8)) for s in (0, 1)]
    made[2] = make_record("ewc", 0, within=make_within(3))
    return made + [make_record("joint", seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def report(records, tmp_path_factory):
    """The path of the report of ``records``."""
    return write_report(records, tmp_path_factory.mktemp("run") / "report")


def test_numbers_equal_the_summary(records, report):
    """Every cell of the summary is the table's, every cell of the matrices the record's."""
    page = Page(report.read_text(encoding="utf-8"))
    summary, *matrices = page.tables
    for cells, row in zip(summary[1:], summarise(records), strict=True):
        assert cells[0].split()[0] == row.method
        assert cells[1:] == [str(row.runs), *(row.values[column.key].text(column.digits) for column in COLUMNS)]
    assert summary[2][2] == "0.603 ± 0.005"  # 0.9 * 2 / 3 and 0.91 * 2 / 3
    assert len(matrices) == len(records)
    for matrix, record in zip(matrices, records, strict=True):
        assert matrix[0][1:] == record.task_names
        for row, (cells, scores) in enumerate(zip(matrix[1:], record.matrix, strict=True)):
            assert cells[0] == record.row_name(row)
            assert cells[1:] == ["–" if score is None else f"{score:.3f}" for score in scores]


def test_page_stands_alone(report):
    """Images are inside the file in both themes; no address of the network, no script."""
    text = report.read_text(encoding="utf-8")
    page = Page(text)
    sources = page.values("src") + page.values("srcset") + page.values("href")
    assert len(sources) == 2 * len(list(report.parent.glob("*.png"))) == 18
    for source in sources:
        kind, _, content = source.partition(";base64,")
        assert kind == "data:image/png"
        assert base64.b64decode(content, validate=True).startswith(b"\x89PNG")
    assert "http" not in text
    assert "url(" not in text
    assert "<script" not in text


def test_pngs_lie_beside_the_page(report):
    """The light figures, the ones inside the page."""
    page = Page(report.read_text(encoding="utf-8"))
    embedded = {base64.b64decode(source.partition(",")[2]) for source in page.values("src", "img")}
    written = {path.name: path.read_bytes() for path in report.parent.glob("*.png")}
    assert set(written.values()) == embedded
    assert sorted(written) == [
        "1_finetune_matrix.png",
        "1_finetune_tasks.png",
        "2_ewc_matrix.png",
        "2_ewc_tasks.png",
        "3_er_matrix.png",
        "3_er_tasks.png",
        "4_joint_matrix.png",
        "average_accuracy.png",
        "forgetting.png",
    ]


def test_accessible_parts(report):
    """Images have text with the numbers, headings of tables have their scope, labels point to something."""
    page = Page(report.read_text(encoding="utf-8"))
    alternatives = page.values("alt", "img")
    assert len(alternatives) == len(page.values("src", "img"))
    assert "er 0.784" in alternatives[0]  # (0.9 + 0.91) / 2 * (0.8 + 0.8 + 1) / 3
    assert page.values("scope", "th").count("row") == sum(len(table) - 1 for table in page.tables)
    assert set(page.values("aria-labelledby")) <= set(page.values("id"))
    assert page.values("lang", "html") == ["en"]


def test_config_and_versions_are_shown(records, report):
    """In collapsible blocks, one for each run."""
    page = Page(report.read_text(encoding="utf-8"))
    assert page.text.count("model:\n  lr: 0.1\n") == len(records)
    assert page.text.count("torch 2.13.0") == len(records)


def test_text_is_escaped(make_record, tmp_path):
    """No name, configuration or version can add a tag, an attribute or a file outside the folder."""
    evil = '<script>alert("1")</script>&amp;'
    record = make_record(
        f"../{evil}",
        monitor=evil,
        task_names=[evil, '"><img src=x onerror=alert(1)>', "c"],
        config=f"</pre>{evil}",
        versions={evil: evil},
        created=f'"{evil}',
    )
    text = write_report([record], tmp_path / "report").read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text
    assert all(source.startswith("data:") for source in page.values("src"))
    assert page.values("onerror") == []
    assert f"</pre>{evil}" in page.text
    assert page.tables[1][0][1:] == record.task_names
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_perplexities_further_values_and_samples_are_shown(make_record, tmp_path):
    """Lower is better, in words and in tables; texts of the model are shown as text, line breaks and tags included."""
    record = make_record(
        monitor="val_perplexity",
        better="lower",
        further={"val_acc": [[0.25, math.nan, math.nan], [0.5, 0.125, math.nan], [0.5, 0.5, 0.75]]},
        samples=[{"<b>Once": "upon\n<script>"}, {}, {"<b>Once": "&amp; more"}],
    )
    text = write_report([record], tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert "val_perplexity, lower is better" in page.text
    assert "<script" not in text
    assert "accuracy" not in page.text.replace("average_accuracy", "").lower()
    further, samples = page.tables[2:]
    assert [row[1:] for row in further[1:]] == [
        ["0.250", "–", "–"],
        ["0.500", "0.125", "–"],
        ["0.500", "0.500", "0.750"],
    ]
    assert samples[1:] == [["digits 0-1", "upon\n<script>"], ["digits 4-5", "&amp; more"]]
    assert "<b>Once" in page.text
    assert not any("accuracy matrix" in alt.lower() for alt in page.values("alt", "img"))


def test_one_run_of_one_task(make_record, tmp_path):
    """The least there can be: forgetting is undefined and has neither a column nor a figure."""
    page = Page(write_report([make_record(tasks=1)], tmp_path).read_text(encoding="utf-8"))
    assert "Forgetting" not in page.tables[0][0]
    assert "1 method," in page.text
    assert not (tmp_path / "forgetting.png").exists()


def test_sweep_is_drawn_and_the_other_figures_show_its_largest_values(make_record, tmp_path):
    """Every run has its row and its matrix, but only the largest memory a line and a section."""
    names = ["finetune", "er/capacity-500", "er/capacity-50"]
    records = [
        make_record(name, seed, keep=keep) for name, keep in zip(names, (0, 0.9, 0.5), strict=True) for seed in (0, 1)
    ]
    page = Page(write_report(records, tmp_path).read_text(encoding="utf-8"))
    summary, *matrices = page.tables
    assert [row[0].split()[0] for row in summary[1:]] == names
    assert len(matrices) == 6
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "1_finetune_matrix.png",
        "1_finetune_tasks.png",
        "2_er-capacity-500_matrix.png",
        "2_er-capacity-500_tasks.png",
        "average_accuracy.png",
        "capacity_average_accuracy.png",
        "capacity_forgetting.png",
        "forgetting.png",
    ]
    sweep, _, averages, _ = page.values("alt")[:4]
    assert "er 0.603 ± 0.005 at 50, 0.845 ± 0.007 at 500; finetune 0.302 ± 0.002." in sweep
    assert "er/capacity-500 0.845" in averages
    assert "er/capacity-50 " not in averages
    drawn = (tmp_path / "average_accuracy.png").read_bytes()
    assert drawn == png(plots.average_figure(records[:4], (0.0, 1.0)))
