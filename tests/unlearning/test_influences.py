"""What each method says of its state after a request, through a stream: learn, learn, forget, learn, learn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from forgetting import Serves, differing, learned_and_forgotten
from prompts import PromptToy, prompt_stream

from contract import Row, all_rows, methods_elsewhere
from lightning_cl import L2P, CODAPrompt, ContinualCallback, DualPrompt, ProgressivePrompts, SPrompts
from lightning_cl.cli.methods import method_classes
from lightning_cl.core.requests import ForgetRequest, Influence

# a method's answers by its name in `lightning-cl methods`; the page of the documentation holds the same
SAMPLES = ("samples in memory", "removed")
ANCHORS = ("the weights to stay near", "recomputed")
IMPORTANCES = "the importances of the weights"
FACTORS = ("factors of finished tasks, in the module", "remains")
SLOW = ("the slow weights", "recomputed")
TEACHER = ("the weights of the teacher", "removed")
INPUTS = ("the subspaces of inputs", "recomputed")
ANSWERS: dict[str, list[tuple[str, str]]] = {
    **{name: [SAMPLES] for name in ("er", "er-ace", "agem", "gem", "mer", "mir", "pcr", "static-conpet")},
    **{name: [SAMPLES, ("class scores of retained samples", "remains")] for name in ("der", "derpp")},
    "icarl": [SAMPLES, TEACHER],
    "i-lora": [SAMPLES, SLOW],
    # shown in the method's own tests, with its model and data
    "self-rehearsal": [("answers to the samples", "removed"), ("answers to other samples", "removed")],
    **{name: [ANCHORS, (IMPORTANCES, "recomputed")] for name in ("ewc", "mas")},
    **{name: [ANCHORS, (IMPORTANCES, "remains")] for name in ("si", "rwalk")},
    "l2": [ANCHORS],
    **{name: [TEACHER] for name in ("lwf", "feature-distillation")},
    **{name: [SLOW] for name in ("momentum-interpolation", "reptile")},
    "gradient-projection": [INPUTS],
    "singular-subspaces": [("how far layers change their inputs", "recomputed")],
    "soft-mask": [("the importances of units", "recomputed")],
    **{name: [FACTORS] for name in ("adapter-slots", "codyra", "curlora", "growing-lora", "lora-fa", "o-lora")},
    **{name: [FACTORS] for name in ("periodic-lora", "sd-lora")},
    "inflora": [FACTORS, INPUTS],
    "color": [FACTORS, ("prototypes of tasks", "recomputed")],
    "dynamic-conpet": [("feature vectors in memory", "removed"), ("the selector", "recomputed"), FACTORS],
    "l2p": [("a pool of prompts and keys", "remains")],
    "dual-prompt": [("a prefix and a key per task", "remains")],
    "coda-prompt": [("components, keys and attention per task", "remains")],
    "progressive-prompts": [("a prompt per task", "remains")],
    "s-prompts": [("a prompt and k prototypes per task", "remains")],
    **{name: [] for name in ("block-expansion", "component-clip", "freeze-except", "gradient-mask", "hft")},
    **{name: [] for name in ("rewarm", "salient-layers", "spike-aware")},
}
# what a row's settings change of them, or its module, which has no layer with as many inputs as outputs
VARIANTS: dict[str, list[tuple[str, str]]] = {
    "singular-subspaces": [],
    "lwf-ema": [("the weights of the teacher", "recomputed")],
    "feature-distillation-filters": [TEACHER, ("the filters", "recomputed")],
}
ROWS = {name: row for name, row in all_rows().items() if "learn" in row.method.acts_on}
PROMPTS: dict[str, ContinualCallback] = {
    "l2p": L2P(4, length=2, top_k=2, diversify=True),
    "dual-prompt": DualPrompt(general_layers=[0], expert_layers=[1, 2], general_length=2, expert_length=3),
    "coda-prompt": CODAPrompt(per_task=3, length=2, layers=[0, 2], orthogonality=0.1),
    "progressive-prompts": ProgressivePrompts(length=3),
    "s-prompts": SPrompts(length=3, k=2),
}
# for four tasks: a direction for each and for the request, and subspaces that leave some room
SETTINGS: dict[str, dict[str, Any]] = {
    "sd-lora": {"capacity": 10},
    "inflora": {"capacity": 8, "threshold": 0.5, "final_threshold": 0.5},
    "gradient-projection": {"threshold": 0.5},
}


def answers(serves: Serves, method: ContinualCallback) -> list[tuple[str, str]]:
    """Return state and outcome of each answer; all are the method's."""
    found = [influence for influence in serves.influences if influence.owner != "Serves"]
    assert all(isinstance(influence, Influence) and influence.owner == type(method).__name__ for influence in found)
    return [(influence.state, influence.outcome) for influence in found]


def assert_rested(serves: Serves) -> None:
    """Nothing but a schedule of learning rates, which follows the steps of all tasks, has moved since the purge."""
    moved = [path for path in differing(serves.before, serves.after) if not path.startswith("/schedules/")]
    assert moved == []


def test_every_method_is_here() -> None:
    """A learning method without an entry fails here."""
    learning = {name: kind for name, kind in method_classes().items() if "learn" in kind.acts_on}
    assert ANSWERS.keys() == learning.keys()
    shown = {row.method for row in all_rows().values()} | methods_elsewhere().keys()
    assert set(learning.values()) <= shown


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_says_what_became_of_its_state_and_rests(row: Row, request: Any, tmp_path: Path) -> None:
    """During a request without a step no state moves: of callbacks, module, optimizers."""
    name = request.node.callspec.id
    method = row.method(**SETTINGS.get(name, row.settings))
    serves = learned_and_forgotten(tmp_path, method, module=row.module())
    assert answers(serves, method) == VARIANTS.get(name, ANSWERS[row.method.card.name])
    assert_rested(serves)
    assert method.resting is False


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_say_what_became_of_their_state_and_rest(name: str, tmp_path: Path) -> None:
    """What each task has learned is in the module."""
    asked = ForgetRequest("rows", rows=[0, 3, 7], after=1)
    stream = prompt_stream(tells_task=name == "progressive-prompts", requests=[asked])
    serves = learned_and_forgotten(tmp_path, PROMPTS[name], module=PromptToy(), stream=stream)
    assert answers(serves, PROMPTS[name]) == ANSWERS[name]
    assert_rested(serves)


PAGE = Path(__file__).parents[2] / "docs" / "guides" / "forgetting-and-memory.md"


def test_documentation_holds_the_same() -> None:
    """The table of the guide, line by line."""
    rows = [line.split("|")[1:-1] for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    found: dict[str, list[tuple[str, str]]] = {}
    for methods, state, outcome in rows:
        for method in methods.split(","):
            entry = found.setdefault(method.strip(" `"), [])
            if state.strip() != "nothing of samples":
                entry.append((state.strip(), outcome.strip()))
    assert {name: sorted(entry) for name, entry in found.items()} == {
        name: sorted(entry) for name, entry in ANSWERS.items()
    }


def test_examples_of_the_guide_run(capsys: pytest.CaptureFixture[str]) -> None:
    """And print what is there."""
    page = PAGE.read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "__main__"})
    printed = [line for line in capsys.readouterr().out.splitlines() if ": " in line or line.startswith("[")]
    assert len(printed) >= 4
    assert all(line in page for line in printed)
