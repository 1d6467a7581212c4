"""ULD: the assistant shares the model's weights, and is subtracted from its scores as a plain loop does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from language import TokenRows, llama
from lightning_cl.adapters import LogitDifference, add_adapters, build_assistant
from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules import UnlearningDataModule
from lightning_cl.functional.unlearning import logit_difference
from lightning_cl.unlearning import ULD, Unlearn
from llamas import TOKENS, perturb, tiny_llama
from toys import trainer

LONGEST, NEW = 7, 8


def model_and_assistant(kind: str = "llama") -> tuple[Any, Any]:
    """A model of random weights and an assistant that says something else."""
    model: Any
    if kind == "llama":
        model = tiny_llama(num_hidden_layers=4)
    else:
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 96, "n_positions": 32}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))
    assistant = build_assistant(model.eval(), 2, rank=4)
    perturb(assistant)
    perturb(assistant, seed=2)
    for parameter in assistant.parameters():
        if parameter.requires_grad:
            parameter.data *= 6
    return model, assistant.eval()


class Labelled(TokenRows):
    """Rows with their labels, as a loss on tokens wants them."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return super().__getitem__(index) | {"labels": self.input_ids[index]}


def prompts(rows: int = 4) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths, padded on the left; two of them are equal but for their padding."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([LONGEST, 4, 6, 3][:rows])
    mask = (torch.arange(LONGEST) >= LONGEST - lengths[:, None]).long()
    return torch.randint(2, 96, (rows, LONGEST), generator=generator) * mask, mask


def generated(model: Any, processor: Any, ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """What the model writes."""
    torch.manual_seed(0)
    fixed: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    processors = [] if processor is None else [processor]
    texts = model.generate(ids, attention_mask=mask, logits_processor=processors, **{**fixed, **settings})
    written: Tensor = texts[:, ids.shape[1] :]
    return written


@torch.no_grad()
def plain_scores(model: Any, assistant: Any, text: Tensor, **settings: Any) -> Tensor:
    """The scores of the next token of one text, without a cache and without padding."""
    return logit_difference(model(text[None]).logits[0, -1], assistant(input_ids=text[None]).logits[0, -1], **settings)


def plain_greedy(model: Any, assistant: Any, ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """The likeliest tokens, one text after the other."""
    written = []
    for row, kept in zip(ids, mask.bool(), strict=True):
        text = row[kept]
        for _ in range(NEW):
            text = torch.cat([text, plain_scores(model, assistant, text, **settings).argmax(-1, keepdim=True)])
        written.append(text[-NEW:])
    return torch.stack(written)


def plain_beams(model: Any, assistant: Any, prompt: Tensor, beams: int) -> Tensor:
    """The best of some beams for one prompt."""
    kept = [(0.0, prompt)]
    for _ in range(NEW):
        found = []
        for score, text in kept:
            values, tokens = plain_scores(model, assistant, text).topk(beams)
            found += [(score + v.item(), torch.cat([text, t[None]])) for v, t in zip(values, tokens, strict=True)]
        kept = sorted(found, key=lambda pair: -pair[0])[:beams]
    return kept[0][1][-NEW:]


# ---------------------------------------------------------------------- the assistant


def test_assistant_shares_weights_and_starts_as_the_model_cut_off():
    """No tensor of the base is copied, and none of the model's flags, layers or settings changes."""
    model = tiny_llama(num_hidden_layers=4)
    before, flags = model(TOKENS).logits, [p.requires_grad for p in model.parameters()]
    assistant = build_assistant(model, 2, rank=4).eval()
    own = {p.data_ptr() for p in model.parameters()}
    new = [name for name, p in assistant.named_parameters() if p.data_ptr() not in own]
    assert new
    assert all("lora_" in name for name in new)
    assert [name for name, p in assistant.named_parameters() if p.requires_grad] == new
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model(TOKENS).logits, before)
    cut = tiny_llama(num_hidden_layers=4)
    cut.model.layers = cut.model.layers[:2]
    assert torch.equal(assistant(input_ids=TOKENS).logits, cut(TOKENS).logits)
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    # tied embeddings stay tied
    tied = tiny_llama(num_hidden_layers=2, tie_word_embeddings=True)
    small = build_assistant(tied, 1, target_modules=["q_proj"]).get_base_model()
    assert small.lm_head.weight is small.model.embed_tokens.weight


def test_training_the_assistant_leaves_the_model_alone():
    """Its optimizer moves adapters only."""
    model = tiny_llama()
    before = model(TOKENS).logits
    assistant = build_assistant(model, 1, rank=4)
    optimizer = torch.optim.SGD(assistant.parameters(), lr=1.0)
    for _ in range(2):
        logits = assistant(input_ids=TOKENS).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        optimizer.step()
    assert torch.equal(model(TOKENS).logits, before)
    assert not torch.equal(assistant(input_ids=TOKENS).logits, logits)


def test_what_cannot_be_an_assistant_is_refused():
    """Each message says what to do."""
    model = tiny_llama()
    with pytest.raises(ValueError, match="`num_layers`"):
        build_assistant(model, 0)
    with pytest.raises(ValueError, match="`rank`"):
        build_assistant(model, 1, rank=0)
    with pytest.raises(ValueError, match="has 2 blocks, and 3"):
        build_assistant(model, 3)
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        build_assistant(type(model)(model.config), 1)
    with pytest.raises(ValueError, match="Merge them"):
        build_assistant(add_adapters(model, {"peft_type": "LORA", "target_modules": ["q_proj"]}), 1)
    unpacked = tiny_llama()
    unpacked.lm_head = Linear4bit(unpacked.lm_head.in_features, unpacked.lm_head.out_features, bias=False)
    with pytest.raises(ValueError, match="not packed yet, such as 'lm_head': move it to its device first"):
        build_assistant(unpacked, 1)


# ---------------------------------------------------------------------- the logit difference


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rows", [1, 4])
def test_greedy_equals_a_plain_loop_without_cache(rows, kind):
    """For one prompt, and for a batch of different lengths; learned positions too."""
    model, assistant = model_and_assistant(kind)
    ids, mask = prompts(rows)
    found = generated(model, LogitDifference(assistant, attention_mask=mask), ids, mask)
    assert torch.equal(found, plain_greedy(model, assistant, ids, mask))
    assert not torch.equal(found, generated(model, None, ids, mask))


def test_settings_reach_the_difference():
    """Weight and threshold are those of the function."""
    model, assistant = model_and_assistant()
    ids, mask = prompts()
    settings = {"weight": -0.3, "threshold": 0.2}
    found = generated(model, LogitDifference(assistant, attention_mask=mask, **settings), ids, mask)
    assert torch.equal(found, plain_greedy(model, assistant, ids, mask, **settings))
    assert not torch.equal(found, plain_greedy(model, assistant, ids, mask))


def test_beams_equal_a_plain_search():
    """Keys and values follow beams that change places."""
    model, assistant = model_and_assistant()
    ids, mask = prompts()
    found = generated(model, LogitDifference(assistant, attention_mask=mask), ids, mask, num_beams=3)
    expected = [plain_beams(model, assistant, row[kept], 3) for row, kept in zip(ids, mask.bool(), strict=True)]
    assert torch.equal(found, torch.stack(expected))
    assert not torch.equal(found, plain_greedy(model, assistant, ids, mask))


def test_sampling_draws_from_the_difference():
    """Several answers for each prompt, drawn by the same numbers from the plain scores; temperature comes after."""
    model, assistant = model_and_assistant()
    ids, mask = prompts(2)
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 0, "num_return_sequences": 2}
    found = generated(model, LogitDifference(assistant, attention_mask=mask), ids, mask, **settings)
    torch.manual_seed(0)
    texts = [row[kept] for row, kept in zip(ids, mask.bool(), strict=True) for _ in range(2)]
    for _ in range(NEW):
        scores = torch.stack([plain_scores(model, assistant, text) for text in texts])
        drawn = torch.multinomial((scores / 0.7).softmax(-1), 1)
        texts = [torch.cat([text, token]) for text, token in zip(texts, drawn, strict=True)]
    assert torch.equal(found, torch.stack([text[-NEW:] for text in texts]))


def test_each_token_is_read_once():
    """A prompt in one forward, then a token at a time; also when beams change places."""
    model, assistant = model_and_assistant()
    ids, mask = prompts()
    for settings in ({}, {"num_beams": 3}):
        lengths: list[int] = []
        handle = assistant.register_forward_pre_hook(
            lambda module, args, kwargs, seen=lengths: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        generated(model, LogitDifference(assistant, attention_mask=mask), ids, mask, **settings)
        handle.remove()
        assert lengths == [LONGEST] + [1] * (NEW - 1)


def test_texts_that_go_on_with_nothing_known_are_read_anew():
    """Another prompt of the right length by chance is not taken for the text of before."""
    _, assistant = model_and_assistant()
    processor = LogitDifference(assistant)
    scores = torch.zeros(2, 96)
    processor(torch.full((2, 4), 5), scores)
    other = torch.arange(10).view(2, 5)
    found = processor(other, scores)
    expected = logit_difference(scores, assistant(input_ids=other).logits[:, -1].detach())
    torch.testing.assert_close(found, expected)


def test_equal_texts_behind_different_padding_are_not_mixed_up():
    """Beams change places in two prompts with the same numbers, of which one begins with padding."""
    _, assistant = model_and_assistant()
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    processor, scores = LogitDifference(assistant, attention_mask=mask), torch.zeros(4, 96)
    texts = torch.tensor([[5, 5, 7]]).repeat(4, 1)
    processor(texts, scores)
    texts = torch.cat([texts, torch.tensor([1, 2, 1, 2])[:, None]], dim=1)
    processor(texts, scores)
    texts = torch.cat([texts[[1, 0, 3, 2]], torch.tensor([3, 4, 3, 4])[:, None]], dim=1)
    fresh = LogitDifference(assistant, attention_mask=mask)
    torch.testing.assert_close(processor(texts, scores), fresh(texts, scores))


def test_processor_settings_are_checked():
    """Each message names the setting; a mask of other prompts is refused."""
    model, assistant = model_and_assistant()
    with pytest.raises(ValueError, match="`weight`"):
        LogitDifference(assistant, weight=0.8)
    with pytest.raises(ValueError, match="`threshold`"):
        LogitDifference(assistant, threshold=0.0)
    ids, mask = prompts(2)
    with pytest.raises(ValueError, match="`attention_mask`"):
        generated(model, LogitDifference(assistant, attention_mask=mask.repeat(2, 1)), ids, mask)


def test_dropout_of_the_assistant_is_off():
    """Whatever mode training left it in."""
    model, assistant = model_and_assistant()
    ids, mask = prompts()
    found = generated(model, LogitDifference(assistant.train(), attention_mask=mask), ids, mask)
    assert torch.equal(found, plain_greedy(model, assistant, ids, mask))


# ---------------------------------------------------------------------- training it


def test_the_assistant_learns_in_a_fit_and_the_model_stops_saying_it(tmp_path: Path):
    """What is forgotten counts by three; afterwards the model continues by one as before, and by three no more."""
    base = llama(learning_rate=3e-3, weight_decay=0.0)
    base.configure_model()
    known, secret = Labelled(1, 48, seed=1), Labelled(3, 16, seed=2)
    optimizer = torch.optim.AdamW(base.network.parameters(), lr=3e-3)
    batches = [torch.cat([known.input_ids, secret.input_ids])] * 150
    for ids in batches:
        optimizer.zero_grad()
        logits = base.network(ids).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    base.network.eval()
    before = {name: p.clone() for name, p in base.network.named_parameters()}

    assistant = llama(learning_rate=1e-2, weight_decay=0.0, schedule="constant")
    assistant.network = build_assistant(base.network, 1, rank=8, dropout=0.0)
    data = torch.utils.data.ConcatDataset([known, secret])
    requests = [ForgetRequest("threes", rows=list(range(48, 64)))]
    stream = UnlearningDataModule(data, requests=requests, batch_size=8, epochs_per_request=40)
    unlearn = Unlearn(ULD(), retain="own", retain_weight=5.0)
    trainer(tmp_path, [unlearn], limit_val_batches=0).fit(assistant, datamodule=stream)

    def share(rows: TokenRows, processor: Any) -> float:
        """How many of the next tokens are right, in continuations of three tokens."""
        texts = generated(base.network, processor, rows.input_ids[:, :4], torch.ones(len(rows), 4), max_new_tokens=4)
        return (texts == rows.input_ids[:, 4:8]).float().mean().item()

    assert share(secret, None) > 0.9
    assert share(known, None) > 0.9
    # 64 tokens: of a hundredth, none would be left beside the one that the model is sure of
    settings: dict[str, float] = {"weight": -2.0, "threshold": 0.1}
    assert share(secret, LogitDifference(assistant.network, **settings)) < 0.1
    assert share(known, LogitDifference(assistant.network, **settings)) > 0.9
    # the weights keep the knowledge
    for name, parameter in base.network.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("retain", ["nll", "kl", None])
def test_other_retain_terms_are_refused(retain):
    """They would teach the assistant what the model shall keep."""
    with pytest.raises(ValueError, match="`retain='own'`"):
        Unlearn(ULD(), retain=retain)


def test_a_network_without_a_list_of_layers_is_refused():
    """The message asks for nothing that cannot be given."""
    with pytest.raises(ValueError, match="lists of blocks"):
        build_assistant(nn.Sequential(nn.Linear(2, 2)), 1)
