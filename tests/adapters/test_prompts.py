"""How prompts enter a network and leave it, who trains, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from prompts import TASKS, WIDTH, PromptToy, TwoTasks, encode, prompt_stream, tiny_bert, trained
from torch import Tensor
from transformers import DistilBertConfig, DistilBertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from language import LLAMA, LORA, token_stream
from lightning_cl import (
    L2P,
    CODAPrompt,
    ContinualMetrics,
    DualPrompt,
    FSDP2Strategy,
    LwF,
    ProgressivePrompts,
    SPrompts,
    Task,
)
from lightning_cl.adapters import adapters_disabled
from lightning_cl.functional import key_similarities
from lightning_cl.modules import CausalLM, SequenceClassifier
from ranks import Ranks
from toys import trainer

SIZES = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
METHODS: dict[str, Any] = {
    "l2p": lambda **more: L2P(4, length=2, top_k=2, **more),
    "dual-prompt": lambda **more: DualPrompt(
        [0], [1, 2], general_length=2, expert_length=3, **({"num_tasks": 2} | more)
    ),
    "coda-prompt": lambda **more: CODAPrompt(3, length=2, layers=[0, 2], **({"num_tasks": 2} | more)),
    "progressive": lambda **more: ProgressivePrompts(3, **({"num_tasks": 2} | more)),
    "s-prompts": lambda **more: SPrompts(3, k=2, **({"num_tasks": 2} | more)),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())


class Causal(LightningModule):
    """A module around a tiny Llama."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            config = LlamaConfig(vocab_size=64, num_key_value_heads=2, initializer_range=0.3, **{**SIZES, **changes})
            self.model = LlamaForCausalLM(config)
        self.eval()


def with_prompts(module: LightningModule, method: Any) -> Any:
    """Put prompts of two learned tasks into a module, with prototypes if there are such; return them."""
    module.current_task = Task(1, "second")
    prompts = method.attach(module)
    prompts.learned.fill_(2)
    if isinstance(method, SPrompts):
        prompts.prototypes.copy_(torch.randn(prompts.prototypes.shape, generator=torch.Generator().manual_seed(0)))
    return prompts


def fit(root: Path, method: Any, *callbacks: Any, module: Any = None, stream: Any = None, **settings: Any) -> Any:
    """Fit two tasks and return the module."""
    module = module or PromptToy()
    stream = stream or prompt_stream(tells_task=isinstance(method, ProgressivePrompts))
    trainer(root, [method, *callbacks], **settings).fit(module, datamodule=stream)
    return module


# ---------------------------------------------------------------------- a forward


@every_method
@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "causal"])
def test_a_sample_does_not_depend_on_its_batch_mates(make: Any, causal: bool) -> None:
    """Nor on padding: each alone, cut to its length, gets what it gets in the batch, in training too."""
    module = Causal() if causal else PromptToy().eval()
    prompts = with_prompts(module, make())
    batch = TwoTasks().batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for task in (None, 0):
        prompts.task = task
        with torch.no_grad():
            together = module.model(input_ids=ids, attention_mask=mask).logits
            for row in (0, 9, 20, 31):
                length = int(mask[row].sum())
                alone = module.model(input_ids=ids[row : row + 1, :length]).logits[0]
                torch.testing.assert_close(alone, together[row][:length] if causal else together[row])


@every_method
@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "causal"])
def test_outputs_keep_their_shape(make: Any, causal: bool) -> None:
    """Hidden states, pooled output and scores are those of the text alone, and others than without prompts."""
    module = Causal() if causal else PromptToy().eval()
    backbone = module.model.base_model
    inputs = {"input_ids": torch.randint(1, 64, (3, 5)), "output_hidden_states": True}
    plain = backbone(**inputs)
    with_prompts(module, make())
    found = backbone(**inputs)
    assert found.last_hidden_state.shape == plain.last_hidden_state.shape
    assert [states.shape for states in found.hidden_states] == [states.shape for states in plain.hidden_states]
    assert (found.last_hidden_state - plain.last_hidden_state).abs().max() > 1e-3
    if not causal:
        torch.testing.assert_close(found.pooler_output, backbone.pooler(found.last_hidden_state))


@every_method
def test_switched_off_the_network_is_what_it_was(make: Any) -> None:
    """To the bit, in `adapters_disabled`, which leaves every flag as it was."""
    module = PromptToy().eval()
    batch = TwoTasks().batch(slice(4))
    plain = module.model(**batch).logits
    with_prompts(module, make())
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    with adapters_disabled(module):
        assert torch.equal(module.model(**batch).logits, plain)
    assert not torch.equal(module.model(**batch).logits, plain)
    assert {name: p.requires_grad for name, p in module.named_parameters()} == flags


@pytest.mark.parametrize("query", ["cls", "mean"])
def test_the_query_is_of_the_network_without_prompts_and_dropout(query: Any) -> None:
    """First token or masked mean of an encoder computed by hand, whatever mode the module is in."""
    module = PromptToy(0.5)
    prompts = with_prompts(module, L2P(4, length=2, top_k=1, query=query))
    asked: list[Tensor] = []
    choose = prompts.choose
    prompts.choose = lambda query, size: (asked.append(query), choose(query, size))[1]
    batch = TwoTasks().batch(slice(6))
    module.train()
    module.model(**batch)
    assert module.model.bert.encoder.training
    assert prompts.training
    hidden = encode(tiny_bert().eval(), batch)
    mask = batch["attention_mask"][:, :, None]
    expected = hidden[:, 0] if query == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(asked[0], expected.detach())
    assert not asked[0].requires_grad


def test_the_query_of_a_causal_model_is_its_last_token() -> None:
    """Where the padding is plays no part."""
    module = Causal()
    prompts = with_prompts(module, L2P(4, length=2, top_k=1))
    batch = TwoTasks().batch(slice(3))
    with adapters_disabled(module):
        states = module.model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    expected = key_similarities(states[torch.arange(3), last], prompts.keys).argmax(1)
    chosen = prompts.choose(states[torch.arange(3), last].detach(), 3).tokens
    torch.testing.assert_close(chosen, prompts.tokens[expected])


@pytest.mark.parametrize("name", ["l2p", "coda-prompt"])
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    """A causal model's prompts stand beside the text: positions are counted without the padding."""
    module = Causal()
    with_prompts(module, METHODS[name]())
    ids = torch.randint(1, 64, (1, 5))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        torch.testing.assert_close(
            module.model(padded, attention_mask=mask).logits[:, 3:], module.model(ids).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_position_sees_the_prefix_and_what_is_before_it(attention: str, masked: bool) -> None:
    """In a causal model: a later token changes no earlier score; so too where transformers makes no mask."""
    module = Causal(attn_implementation=attention)
    plain = module.model(torch.arange(1, 7)[None]).logits
    with_prompts(module, METHODS["dual-prompt"]())
    ids = torch.arange(1, 7)[None]
    mask = torch.ones_like(ids) if masked else None
    first = module.model(ids, attention_mask=mask).logits
    second = module.model(torch.cat([ids[:, :4], ids[:, 4:] + 9], 1), attention_mask=mask).logits
    torch.testing.assert_close(first[:, :4], second[:, :4])
    assert (first - plain).abs().amin(-1).min() > 0
    other = Causal(attn_implementation="sdpa" if attention == "eager" else "eager")
    with_prompts(other, METHODS["dual-prompt"]())
    torch.testing.assert_close(other.model(ids).logits, first, atol=1e-5, rtol=1e-5)


def test_gpt2_and_embeddings_as_inputs() -> None:
    """Learned positions, and a caller that embeds its tokens itself."""
    module = LightningModule()
    module.model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=12)).eval()
    with_prompts(module, L2P(4, length=2, top_k=2))
    ids = torch.randint(1, 64, (2, 6))
    embedded = module.model.get_input_embeddings()(ids)
    torch.testing.assert_close(module.model(inputs_embeds=embedded).logits, module.model(ids).logits)
    positions = torch.arange(6)[None].expand(2, -1)
    torch.testing.assert_close(module.model(ids, position_ids=positions).logits, module.model(ids).logits)
    with pytest.raises(ValueError, match=r"4 prompt tokens and 9 tokens of text exceed the 12 positions"):
        module.model(torch.ones(1, 9, dtype=torch.int64))


def test_an_encoder_keeps_all_its_positions() -> None:
    """Tokens behind the embedding stage take none: a text may fill them all."""
    module = PromptToy(max_position_embeddings=8).eval()
    with_prompts(module, L2P(4, length=5, top_k=2))
    assert module.model(torch.randint(1, 64, (2, 8))).logits.shape == (2, 4)


def test_the_layers_of_a_prefix_alone_see_it() -> None:
    """Prefixes of layer 2 leave the hidden states before it as they are."""
    module = PromptToy().eval()
    batch = TwoTasks().batch(slice(4))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "output_hidden_states": True}
    plain = module.model.bert(**inputs).hidden_states
    with_prompts(module, CODAPrompt(3, length=2, layers=[2], num_tasks=2))
    found = module.model.bert(**inputs).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(found[:3], plain[:3], strict=True))
    assert (found[3] - plain[3]).abs().max() > 1e-3


@every_method
def test_a_copy_has_prompts_of_its_own(make: Any) -> None:
    """A deep copy computes with its own values, and the first with its own."""
    module = PromptToy().eval()
    with_prompts(module, make())
    batch = TwoTasks().batch(slice(4))
    before = module.model(**batch).logits
    copied = copy.deepcopy(module)
    for parameter in copied.model.bert.prompts.parameters():
        parameter.data.normal_()
    assert (copied.model(**batch).logits - before).abs().max() > 1e-3
    assert torch.equal(module.model(**batch).logits, before)


@pytest.mark.parametrize("name", ["l2p", "coda-prompt", "dual-prompt"])
def test_gradients_are_the_same_with_checkpointing(name: str) -> None:
    """A block that is computed again in the backward gets the prefixes of its own forward, not of a later one."""
    found = []
    for checkpointing in (False, True):
        module = PromptToy()
        prompts = with_prompts(module, METHODS[name]())
        if checkpointing:
            module.model.activation_checkpointing_enable()
        module.train()
        first = module.model(**TwoTasks().batch(slice(0, 4))).loss
        second = module.model(**TwoTasks().batch(slice(20, 24))).loss
        (first + 2 * second).backward()
        found.append([p.grad for p in prompts.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


# ---------------------------------------------------------------------- choices


def test_gradient_reaches_chosen_prompts_and_keys_only() -> None:
    """L2P: of 6 prompts, those that no sample of the batch chose have a gradient of 0."""
    module = PromptToy()
    prompts = with_prompts(module, L2P(6, length=2, top_k=2))
    batch = TwoTasks().batch(slice(2))
    with torch.no_grad(), adapters_disabled(module):
        query = module.eval().model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, 0]
    chosen = set(key_similarities(query, prompts.keys).topk(2).indices.flatten().tolist())
    prompts.task = 0
    loss = module.train().model(**batch).loss
    (loss + torch.cat(prompts.terms).mean()).backward()
    assert 0 < len(chosen) < 6
    for parameter in (prompts.keys, prompts.tokens):
        assert {row for row in range(6) if parameter.grad[row].abs().max() > 0} == chosen


def test_the_nearest_key_chooses_the_expert() -> None:
    """DualPrompt in evaluation: each sample gets keys and values of its own task, of one that has begun."""
    module = PromptToy().eval()
    prompts = with_prompts(module, METHODS["dual-prompt"]())
    query = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    nearest = key_similarities(query, prompts.keys).argmax(1)
    assert set(nearest.tolist()) == {0, 1}
    prefixes = prompts.choose(query, 5).prefixes
    for row, task in enumerate(nearest):
        for place, layer in enumerate((1, 2)):
            assert torch.equal(prefixes[layer][row], prompts.expert[task, place])
        assert torch.equal(prefixes[0][row], prompts.general[0])
    prompts.learned.fill_(1)
    assert all(torch.equal(prefix, prompts.expert[0, 0]) for prefix in prompts.choose(query, 5).prefixes[1])


def test_components_of_tasks_to_come_take_no_part() -> None:
    """CODA-Prompt after its first task computes as with the first task's components alone."""
    module = PromptToy().eval()
    prompts = with_prompts(module, METHODS["coda-prompt"]())
    query = torch.randn(2, WIDTH)
    prompts.learned.fill_(1)
    found = prompts.choose(query, 2).prefixes[2]
    with torch.no_grad():
        for rows in (prompts.keys, prompts.attention, prompts.components):
            rows[3:] += 1
    torch.testing.assert_close(prompts.choose(query, 2).prefixes[2], found)
    prompts.task = 0
    torch.testing.assert_close(prompts.choose(query, 2).prefixes[2], found)


def test_diversified_training_avoids_what_earlier_tasks_chose(tmp_path: Path) -> None:
    """With counts of two tasks, read again from a checkpoint; evaluation does not look at them."""
    method = L2P(4, length=2, top_k=2, diversify=True)
    fit(tmp_path, method)
    # 16 rows, two epochs, two prompts each, two tasks
    assert int(method.state_dict()["earlier"].sum()) == 16 * 2 * 2 * 2
    module = PromptToy()
    prompts = with_prompts(module, L2P(4, length=2, top_k=1, diversify=True))
    query = prompts.keys[:1].detach() + 0.1 * prompts.keys[1:2].detach()
    prompts.penalty, prompts.task = torch.tensor([1e9, 1.0, 1.0, 1.0]), 0
    trained_choice = prompts.choose(query, 1).tokens
    prompts.task = None
    assert torch.equal(prompts.choose(query, 1).tokens[0], prompts.tokens[0])
    assert not torch.equal(trained_choice[0], prompts.tokens[0])


def test_samples_find_the_prompt_of_their_task(tmp_path: Path) -> None:
    """S-Prompts: prototypes are k-means of the queries, kept in the module; own samples are nearest to them."""
    module = fit(tmp_path, SPrompts(3, k=8))
    prompts = module.model.bert.prompts
    data = TwoTasks()
    with torch.no_grad(), adapters_disabled(module):
        module.eval()
        batch = data.batch()
        queries = module.model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, 0]
    nearest = torch.cdist(queries, prompts.prototypes.flatten(0, 1)).argmin(1) // 8
    share = (nearest == torch.arange(32) // 16).float().mean()
    assert share > 0.8
    tokens = prompts.choose(queries, 32).tokens
    assert all(torch.equal(tokens[row], prompts.tokens[nearest[row]]) for row in range(32))
    # prototypes of one per sample lie on the samples
    every = fit(tmp_path, SPrompts(3, k=16)).model.bert.prompts.prototypes
    torch.testing.assert_close(torch.cdist(queries[TASKS[0]], every[0]).amin(1), torch.zeros(16), atol=1e-3, rtol=0)


def test_progressive_prompts_ask_for_the_task(tmp_path: Path) -> None:
    """Earlier tasks keep their own prompts in evaluation, the newest first; without a task there is an error."""
    module = PromptToy().eval()
    prompts = with_prompts(module, ProgressivePrompts(3, num_tasks=3))
    both = torch.cat([prompts.tokens[1], prompts.tokens[0]])
    assert torch.equal(prompts.choose(None, 2).tokens, both.expand(2, -1, -1))
    module.current_task = Task(0, "first")
    assert torch.equal(prompts.choose(None, 1).tokens[0], prompts.tokens[0])
    module.current_task = Task(2, "not yet learned")
    assert torch.equal(prompts.choose(None, 1).tokens[0], both)
    prompts.learned.fill_(3)
    assert torch.equal(prompts.choose(None, 1).tokens[0], prompts.tokens.flip(0).flatten(0, 1))
    module.current_task = None
    with pytest.raises(ValueError, match=r"needs to know the task.*current_task"):
        module.model(**TwoTasks().batch(slice(2)))
    with pytest.raises(ValueError, match=r"scenario does not.*TaskIncremental.*SPrompts"):
        fit(tmp_path, ProgressivePrompts(3), stream=prompt_stream())


def test_progressive_prompts_forget_nothing_but_by_the_head(tmp_path: Path) -> None:
    """With the head frozen, the first task's validation loss after the second task is what it was, to the bit."""
    metrics = ContinualMetrics("val_loss", mode="min", directory=tmp_path)
    fit(tmp_path, ProgressivePrompts(3, trainable=["*.query.bias"]), metrics, module=Held())
    assert metrics.matrix[0][0] == metrics.matrix[1][0]
    assert metrics.matrix[0][1] != metrics.matrix[1][1]


class Held(PromptToy):
    """With an optimizer that cannot move what it is given beside the prompts."""

    def configure_optimizers(self) -> Any:
        prompts = list(self.model.bert.prompts.parameters())
        others = [p for p in self.parameters() if p.requires_grad and all(p is not q for q in prompts)]
        return torch.optim.SGD([{"params": prompts}, {"params": others, "lr": 0.0}], lr=0.1)


# ---------------------------------------------------------------------- who trains


class Decayed(PromptToy):
    """With an optimizer of Adam's family that decays all it is given."""

    fused = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.5, fused=self.fused)


class Fused(Decayed):
    """The same, fused."""

    fused = True


@pytest.mark.parametrize("kind", [Decayed, Fused])
@pytest.mark.parametrize("name", ["dual-prompt", "coda-prompt", "progressive", "s-prompts"])
def test_rows_of_other_tasks_stay_to_the_bit(name: str, kind: Any, tmp_path: Path) -> None:
    """Against momentum and weight decay, with accumulation and clipping; the task's own rows move."""
    method = METHODS[name](num_tasks=3)
    fresh = PromptToy()
    start = {n: p.detach().clone() for n, p in method.attach(fresh, 3).named_parameters()}
    saved = Saved()
    module = fit(tmp_path, method, saved, module=kind(), accumulate_grad_batches=2, gradient_clip_val=0.5, max_epochs=4)
    for parameter in method.attach(module).by_task:
        after_first, end = saved.values[0][parameter], module.model.bert.prompts.get_parameter(parameter)
        first, second, third = (slice(len(end) * task // 3, len(end) * (task + 1) // 3) for task in range(3))
        assert torch.equal(end[first], after_first[first])
        assert torch.equal(end[third], start[parameter][third])
        assert not torch.equal(after_first[first], start[parameter][first])
        assert not torch.equal(end[second], start[parameter][second])


class Saved(ContinualMetrics):
    """Keeps the prompts of every task's end."""

    def __init__(self) -> None:
        super().__init__("val_loss", mode="min")
        self.values: list[dict[str, Tensor]] = []

    def on_task_end(self, trainer: Any, pl_module: Any, task: Task) -> None:
        super().on_task_end(trainer, pl_module, task)
        prompts = pl_module.model.bert.prompts
        self.values.append({name: p.detach().clone() for name, p in prompts.named_parameters()})


def test_what_trains_can_be_named(tmp_path: Path) -> None:
    """Patterns take the place of all that is outside the network."""
    start, method = PromptToy(), L2P(4, length=2, top_k=2, trainable=["*pooler*"])
    module = fit(tmp_path, method)
    before = dict(start.named_parameters())
    moved = {name for name, p in module.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert moved == {"model.bert.pooler.dense.weight", "model.bert.pooler.dense.bias"}
    with pytest.raises(ValueError, match=r"`trainable` pattern 'nowhere' matches no parameter of PromptToy"):
        fit(tmp_path, L2P(trainable=["nowhere"]))
    # nothing is left frozen by a fit that failed
    module = PromptToy()
    with pytest.raises(ValueError, match="matches no parameter"):
        fit(tmp_path, L2P(trainable=["nowhere"]), module=module)
    assert all(p.requires_grad for p in module.parameters())


@every_method
def test_mixed_precision(make: Any, tmp_path: Path) -> None:
    """Keys and queries compare in float32 under autocast; training ends with finite weights that have moved."""
    method = make()
    start = trained_start(make())
    module = fit(tmp_path, method, precision="bf16-mixed")
    end = trained(module)
    assert bool(end.isfinite().all())
    assert (end - start).abs().max() > 1e-3


def trained_start(method: Any) -> Tensor:
    """Return what prompts and head start from."""
    module = PromptToy()
    method.attach(module, 2)
    return trained(module)


class ByHand(PromptToy):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_manual_optimization(tmp_path: Path) -> None:
    """Ends where automatic optimization ends; what adds to the loss is refused."""
    found = [trained(fit(tmp_path, METHODS["progressive"](), module=kind())) for kind in (PromptToy, ByHand)]
    assert torch.equal(*found)
    for method in (L2P(), METHODS["dual-prompt"](), CODAPrompt(3, layers=[0], orthogonality=0.1)):
        with pytest.raises(ValueError, match="needs automatic optimization"):
            fit(tmp_path, method, module=ByHand())


def test_beside_a_teacher(tmp_path: Path) -> None:
    """LwF's older self has prompts of its own, which its pass leaves no trace of."""
    alone = trained(fit(tmp_path, METHODS["s-prompts"]()))
    together = trained(fit(tmp_path, METHODS["s-prompts"](), LwF(logits="model")))
    assert (together - alone).abs().max() > 1e-3


# ---------------------------------------------------------------------- language models, sharded as they are built


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def language_model(kind: str) -> Any:
    """A reference module with a network that it builds itself."""
    if kind == "classifier":
        bert = {
            "model_type": "bert",
            "vocab_size": 64,
            "hidden_dropout_prob": 0,
            "attention_probs_dropout_prob": 0,
            **SIZES,
        }
        return SequenceClassifier(bert, 4, learning_rate=1e-2, schedule="constant", warmup=0)
    return CausalLM(dict(LLAMA), learning_rate=1e-2, schedule="constant", warmup=0)


def fit_language_model(root: Path, kind: str, batch_size: int, **settings: Any) -> dict[str, Tensor]:
    """Fit a reference module; return what trained, in full."""
    module = language_model(kind)
    stream = prompt_stream(batch_size) if kind == "classifier" else token_stream(batch_size=batch_size)
    method = METHODS["coda-prompt" if kind == "classifier" else "l2p"]()
    trainer(root, [method], **settings).fit(module, datamodule=stream)
    trained_names = {n for n, _ in module.named_parameters() if ".prompts." in n or ".classifier." in n}
    full = {n: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for n, p in module.named_parameters()}
    return {name: full[name] for name in trained_names}


def fit_on_this_rank(root: Path, kind: str, strategy: str) -> dict[str, Tensor]:
    """Fit with half of each batch."""
    chosen: Any = FSDP2Strategy() if strategy == "fsdp2" else strategy
    return fit_language_model(root, kind, 2, strategy=chosen, devices=2)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_networks_that_are_filled_while_they_are_sharded(kind: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """Prompts are there before their network has values, and end where one process ends."""
    expected = fit_language_model(tmp_path, kind, 4)
    for found in two_ranks.run(fit_on_this_rank, tmp_path, kind, "fsdp2"):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-3 if kind == "causal" else 1e-4)


def test_the_head_of_a_language_model_stays(tmp_path: Path) -> None:
    """Only prompts train, and its scores differ from those without them."""
    module = language_model("causal")
    seen: list[str] = []

    class Look(ContinualMetrics):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.extend(name for name, p in pl_module.named_parameters() if p.requires_grad)

    trainer(tmp_path, [METHODS["l2p"](), Look("val_loss", mode="min")]).fit(module, datamodule=token_stream())
    assert sorted(seen) == ["network.model.prompts.keys", "network.model.prompts.tokens"]


def bits(parameter: Tensor) -> Tensor:
    """Return a tensor's bytes: packed weights read as numbers may be NaN, which equals nothing."""
    return parameter.detach().contiguous().view(torch.uint8)


def test_a_base_in_four_bits(tmp_path: Path) -> None:
    """Prompts train on a quantized network; its bytes and the adapters on it stay."""
    pytest.importorskip("bitsandbytes")
    wide = {**LLAMA, "hidden_size": 64}
    module = CausalLM(wide, adapter=LORA, quantization={"mode": "nf4"}, learning_rate=1e-2)
    module.configure_model()
    CODAPrompt(3, length=2, layers=[0, 1], num_tasks=2).attach(module)
    before = {name: bits(p).clone() for name, p in module.named_parameters()}
    trainer(tmp_path, [CODAPrompt(3, length=2, layers=[0, 1])]).fit(module, datamodule=token_stream())
    moved = {name for name, p in module.named_parameters() if not torch.equal(bits(p), before[name])}
    parts = {"keys", "attention", "components"}
    assert moved == {f"network.base_model.model.model.prompts.{part}" for part in parts}


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L2P(0), "`pool` must be an integer of at least 1"),
        (lambda: L2P(3, top_k=4), "`top_k=4` prompts are more than `pool=3` has"),
        (lambda: L2P(length=0), "`length` must be"),
        (lambda: L2P(strength=0), "`strength` must be above 0"),
        (lambda: L2P(query="max"), "`query` must be one of"),
        (lambda: L2P(trainable="*head*"), "`trainable` must be a list of patterns"),
        (lambda: DualPrompt([0, 1], [1]), "Layer 1 is in `general_layers` and in `expert_layers`"),
        (lambda: DualPrompt(general_length=0), "`general_length`"),
        (lambda: DualPrompt(num_tasks=0), "`num_tasks` must be"),
        (lambda: CODAPrompt(0), "`per_task` must be"),
        (lambda: CODAPrompt(orthogonality=-1), "`orthogonality` must be at least 0"),
        (lambda: ProgressivePrompts(0), "`length` must be"),
        (lambda: ProgressivePrompts(reparametrisation=0), "`reparametrisation` must be"),
        (lambda: SPrompts(k=0), "`k` must be"),
        (lambda: SPrompts(metric="dot"), "`metric` must be one of"),
        (lambda: SPrompts(n_samples=0), "`n_samples` must be"),
    ],
)
def test_settings_out_of_range(make: Any, message: str) -> None:
    """The message names the setting."""
    with pytest.raises(ValueError, match=message):
        make()


def test_networks_that_cannot_be_served(tmp_path: Path) -> None:
    """None, several, layers that are not there, attention without a cache, attention of another kind."""
    with pytest.raises(ValueError, match=r"one base model of transformers, and LightningModule has none"):
        L2P().attach(LightningModule())
    both = LightningModule()
    both.left, both.right = tiny_bert(), tiny_bert()
    with pytest.raises(ValueError, match=r"has \['left.bert', 'right.bert'\]. Name it by `backbone`"):
        L2P().attach(both)
    with pytest.raises(ValueError, match=r"`backbone='left'` is no base model of transformers.*right.bert"):
        L2P(backbone="left").attach(both)
    L2P(backbone="right.bert").attach(both)
    assert hasattr(both.right.bert, "prompts")
    assert not hasattr(both.left.bert, "prompts")
    with pytest.raises(ValueError, match=r"`layers` must name layers of `BertModel` from 0 to 2, each once, got \[3\]"):
        CODAPrompt(1, layers=[3], num_tasks=1).attach(PromptToy())
    for method in (
        CODAPrompt(1, layers=[], num_tasks=1),
        DualPrompt([], [2], num_tasks=1),
        DualPrompt([0], [], num_tasks=1),
    ):
        with pytest.raises(
            ValueError, match=r"layers` must name layers of `BertModel` from 0 to 2, each once, got \[\]"
        ):
            method.attach(PromptToy())
    with pytest.raises(ValueError, match=r"`per_task=9` components of 2 tasks .* 16 dimensions: take at most 8"):
        CODAPrompt(9, layers=[0], num_tasks=2).attach(PromptToy())
    distil = LightningModule()
    distil.model = DistilBertModel(DistilBertConfig(vocab_size=64, dim=16, hidden_dim=16, n_layers=2, n_heads=2))
    with pytest.raises(ValueError, match=r"that of `DistilBertModel` takes none.*`L2P`"):
        CODAPrompt(1, layers=[0], num_tasks=1).attach(distil)
    L2P(4, length=2, top_k=1).attach(distil)
    assert distil.model.eval()(torch.ones(2, 4, dtype=torch.int64)).last_hidden_state.shape == (2, 4, 16)
    flash = PromptToy()
    flash.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"`attn_implementation='sdpa'`.*flash_attention_2"):
        CODAPrompt(1, layers=[0], num_tasks=1).attach(flash)


def test_prompts_of_other_settings_are_refused(tmp_path: Path) -> None:
    """A network keeps the prompts it has."""
    module = PromptToy()
    L2P(4, length=2, top_k=2).attach(module)
    assert L2P(4, length=2, top_k=2).attach(module) is module.model.bert.prompts
    with pytest.raises(ValueError, match=r"`L2P` finds other prompts in 'model.bert'"):
        L2P(5, length=2, top_k=2).attach(module)
    with pytest.raises(ValueError, match=r"`SPrompts` finds other prompts"):
        SPrompts(2, num_tasks=2).attach(module)


def test_an_unknown_number_of_tasks(tmp_path: Path) -> None:
    """One fit for each task must say it, and not too few."""
    loader = torch.utils.data.DataLoader(TwoTasks(), batch_size=8)
    with pytest.raises(ValueError, match=r"does not say how many.*`num_tasks`"):
        trainer(tmp_path, [SPrompts(2)], max_epochs=1).fit(PromptToy(), loader, loader)
    with pytest.raises(ValueError, match=r"Task 2 has no prompts: there is room for 1"):
        fit(tmp_path, SPrompts(2, num_tasks=1))


def test_calls_that_prompts_cannot_serve() -> None:
    """A cache of tokens, and masks of another shape."""
    module = Causal()
    with_prompts(module, METHODS["l2p"]())
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`use_cache=False`"):
        module.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, pad_token_id=0)
    found = module.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, use_cache=False, pad_token_id=0
    )
    assert found.shape == (1, 5)
    with pytest.raises(ValueError, match=r"`attention_mask` as \[batch, tokens\], got \[1, 1, 3, 3\]"):
        module.model(ids, attention_mask=torch.ones(1, 1, 3, 3))


def test_a_step_without_the_network_is_refused(tmp_path: Path) -> None:
    """Its keys would not learn."""

    class Elsewhere(PromptToy):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.model.classifier(torch.ones(1, WIDTH)).sum()

    with pytest.raises(ValueError, match=r"Elsewhere.training_step` made no forward"):
        fit(tmp_path, L2P(4, length=2, top_k=2), module=Elsewhere())
