"""Squared per-sample gradients without a loop, against a loop over samples."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from lightning_cl.functional import (
    LayerTape,
    SampleLoop,
    absolute_sums_by_loop,
    layer_gradients,
    squared_sums_by_loop,
)
from ranks import Ranks

BATCH = 5


class Twice(nn.Module):
    """One layer called twice, with an activation in place between."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.relu_(self.layer(x)))


class Shared(nn.Module):
    """Two layers that share their weight, one without bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class TiedLanguageModel(nn.Module):
    """The table that embeds also reads out, both as layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x)))


class Scale(nn.Module):
    """A foreign layer with a keyword and a tensor that all samples share."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x, *, power, factor):
        return factor * x**power * self.scale


class CallsScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Scale()

    def forward(self, x):
        return self.inner(x, power=2, factor=torch.arange(4.0).to(x))


class OddConv(nn.Conv2d):
    """A subclass that computes something else must not get the rule of its base."""

    def forward(self, x):
        return super().forward(x) * 2


def _images(channels, *size):
    return torch.randn(BATCH, channels, *size, dtype=torch.float64)


def _vectors(*shape):
    return torch.randn(BATCH, *shape, dtype=torch.float64)


def _tokens(*shape):
    return torch.randint(0, 7, (BATCH, *shape))


CASES = {
    "linear": lambda: (nn.Linear(4, 3), _vectors(4)),
    "linear without bias": lambda: (nn.Linear(4, 3, bias=False), _vectors(4)),
    "linear over positions": lambda: (nn.Linear(4, 3), _vectors(6, 4)),
    "linear over two dimensions": lambda: (nn.Linear(4, 3), _vectors(2, 3, 4)),
    "linear over one position": lambda: (nn.Linear(4, 3), _vectors(1, 4)),
    "in place over vectors": lambda: (nn.Sequential(nn.Linear(4, 3), nn.ReLU(True), nn.Linear(3, 2)), _vectors(4)),
    "in place over positions": lambda: (
        nn.Sequential(nn.Linear(4, 3), nn.ReLU(True), nn.Dropout(0.5, True), nn.Linear(3, 2)),
        _vectors(6, 4),
    ),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, stride=2, padding=1), _images(4, 9)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1)), _images(4, 7, 6)),
    "conv2d groups, dilation": lambda: (nn.Conv2d(4, 6, 3, groups=2, dilation=2, bias=False), _images(4, 9, 8)),
    "conv2d depthwise, same": lambda: (nn.Conv2d(4, 8, (2, 3), groups=4, padding="same"), _images(4, 5, 6)),
    "conv2d reflect": lambda: (nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), _images(4, 5, 6)),
    "conv2d channels last": lambda: (
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(True), nn.Conv2d(6, 2, 1)).to(memory_format=torch.channels_last),
        _images(4, 5, 6).to(memory_format=torch.channels_last),
    ),
    "conv2d to one position": lambda: (nn.Conv2d(4, 3, 2), _images(4, 2, 2)),
    "conv3d": lambda: (nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), _images(2, 3, 4, 5)),
    "transposed convolution": lambda: (nn.ConvTranspose2d(4, 3, 2, stride=2), _images(4, 3, 3)),
    "subclass of conv2d": lambda: (OddConv(4, 3, 2), _images(4, 3, 3)),
    "embedding of one index": lambda: (nn.Embedding(7, 3), _tokens()),
    "embedding with padding": lambda: (nn.Embedding(7, 3, padding_idx=2), _tokens(9)),
    "layer norm": lambda: (nn.LayerNorm(4), _vectors(6, 4)),
    "layer norm over two dimensions": lambda: (nn.LayerNorm((6, 4), bias=False), _vectors(6, 4)),
    "rms norm": lambda: (nn.RMSNorm(4), _vectors(6, 4)),
    "group norm": lambda: (nn.GroupNorm(2, 4), _images(4, 3, 3)),
    "batch norm of vectors": lambda: (nn.BatchNorm1d(4), _vectors(4)),
    "batch norm of images": lambda: (nn.BatchNorm2d(4), _images(4, 3, 3)),
    "instance norm": lambda: (nn.InstanceNorm2d(4, affine=True), _images(4, 3, 3)),
    "parametric relu": lambda: (nn.PReLU(4), _images(4, 3)),
    "foreign layer": lambda: (CallsScale(), _vectors(3, 4)),
    "called twice": lambda: (Twice(nn.Linear(4, 4)), _vectors(4)),
    "called twice over positions": lambda: (Twice(nn.Linear(4, 4)), _vectors(3, 4)),
    "convolution called twice": lambda: (Twice(nn.Conv2d(4, 4, 3, padding=1)), _images(4, 3, 3)),
    "norm called twice": lambda: (Twice(nn.LayerNorm(4)), _vectors(4)),
    "shared weight": lambda: (Shared(), _vectors(4)),
    "shared table": lambda: (TiedLanguageModel(), _tokens(6)),
    "network": lambda: (
        nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten(), nn.Linear(36, 3)),
        _images(1, 5, 5),
    ),
}


def _case(name):
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    model = model.double().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0)  # running statistics that are not those of a fresh layer
    return model, inputs


def _losses(model, inputs):
    """A loss for each sample in which no gradient is constant or zero."""
    outputs = model(inputs)
    weights = torch.linspace(0.1, 1.0, outputs[0].numel(), dtype=outputs.dtype)
    return (outputs.flatten(1).sin() * weights).sum(1)


def _reference(model, inputs, wanted=None, by_loop=squared_sums_by_loop):
    params = {n: p for n, p in model.named_parameters() if p.requires_grad and (wanted is None or n in wanted)}
    return by_loop((_losses(model, inputs[i : i + 1]).sum() for i in range(BATCH)), params)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("chunk", [1, 100, 1 << 19])
@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop_over_samples(monkeypatch, name, chunk):
    """For every kind of layer, and whatever the number of samples taken at a time."""
    monkeypatch.setattr(layer_gradients, "_CPU_CHUNK", chunk)
    model, inputs = _case(name)
    expected = _reference(model, inputs)
    assert all(value.abs().max() > 0 for value in expected.values())
    with LayerTape(model, expected) as tape:
        losses = _losses(model, inputs)
        assert tape.uncovered(losses, batch_size=BATCH) == {}
        torch.testing.assert_close(tape.squared_sums(losses.sum(), batch_size=BATCH), expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("chunk", [100, 1 << 19])
@pytest.mark.parametrize("name", CASES)
def test_absolute_values_equal_a_loop_over_samples(monkeypatch, name, chunk):
    """A sample's gradient is summed over positions and calls before its absolute value is taken, and not after."""
    monkeypatch.setattr(layer_gradients, "_CPU_CHUNK", chunk)
    model, inputs = _case(name)
    params = dict(model.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in params.items()}
    for sample in inputs.split(1):
        for total, gradient in zip(
            sums.values(), torch.autograd.grad(_losses(model, sample).sum(), list(params.values())), strict=True
        ):
            total += gradient.abs()
    torch.testing.assert_close(_reference(model, inputs, by_loop=absolute_sums_by_loop), sums)
    with LayerTape(model, params) as tape:
        torch.testing.assert_close(tape.absolute_sums(_losses(model, inputs).sum(), batch_size=BATCH), sums)


@pytest.mark.parametrize("name", ["linear", "conv2d", "batch norm of images", "layer norm", "foreign layer", "network"])
def test_single_precision(name):
    """1e-5 of the largest entry in float32."""
    model, inputs = _case(name)
    expected = _reference(model, inputs)
    with LayerTape(model.float(), expected) as tape:
        actual = tape.squared_sums(_losses(model, inputs.float()), batch_size=BATCH)
    for key, value in expected.items():
        assert actual[key].dtype == torch.float32
        torch.testing.assert_close(actual[key].double(), value, rtol=1e-5, atol=1e-5 * value.max().item())


@pytest.mark.parametrize(
    "trainable", [["0.bias", "3.weight"], ["0.weight"], ["1.bias", "3.bias"], ["1.weight"]], ids=str
)
def test_partly_frozen_model(trainable):
    """Only what is wanted is formed, be it one of a layer's two parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(True), nn.Linear(6, 3)).double()
    for name, param in model.named_parameters():
        param.requires_grad_(name in trainable)
    inputs = _vectors(4)
    with LayerTape(model, trainable) as tape:
        actual = tape.squared_sums(_losses(model, inputs), batch_size=BATCH)
    assert set(actual) == set(trainable)
    torch.testing.assert_close(actual, _reference(model, inputs))


def test_wanted_subset_of_trainable_parameters():
    """A name left out is left alone."""
    model, inputs = _case("network")
    with LayerTape(model, ["1.bias", "4.weight"]) as tape:
        actual = tape.squared_sums(_losses(model, inputs), batch_size=BATCH)
    torch.testing.assert_close(actual, _reference(model, inputs, {"1.bias", "4.weight"}))


@pytest.mark.parametrize("name", ["linear", "called twice", "conv2d", "embedding with padding", "network"])
def test_batches_add_up_in_accumulators(name):
    """Batches of 2 and 3 add to what was there, in the tensors that were given."""
    model, inputs = _case(name)
    expected = _reference(model, inputs)
    into = {key: torch.ones_like(value) for key, value in expected.items()}
    with LayerTape(model, expected) as tape:
        for batch in inputs.split([2, 3]):
            returned = tape.squared_sums(_losses(model, batch), batch_size=len(batch), into=into)
    assert all(returned[key] is into[key] for key in into)
    torch.testing.assert_close(into, {key: value + 1 for key, value in expected.items()})


@pytest.mark.parametrize("name", ["network", "shared weight", "linear over positions"])
def test_several_cotangents(name):
    """Squares of several losses of one graph add up."""
    model, inputs = _case(name)
    params = dict(model.named_parameters())
    with LayerTape(model, params) as tape:
        outputs = model(inputs)
        cotangents = [torch.randn_like(outputs) for _ in range(3)]
        actual = tape.squared_sums(outputs, iter(cotangents), batch_size=BATCH)
    loop = SampleLoop(params).squared_sums(model(inputs), iter(cotangents), batch_size=BATCH)
    torch.testing.assert_close(actual, loop)
    rows = [(model(inputs)[i] * c[i]).sum() for c in cotangents for i in range(BATCH)]
    torch.testing.assert_close(actual, squared_sums_by_loop(rows, params))
    with LayerTape(model, params) as tape:
        absolute = tape.absolute_sums(model(inputs), iter(cotangents), batch_size=BATCH)
    torch.testing.assert_close(absolute, absolute_sums_by_loop(rows, params))
    loop = SampleLoop(params).absolute_sums(model(inputs), iter(cotangents), batch_size=BATCH)
    torch.testing.assert_close(absolute, loop)


def test_graph_and_records_are_kept_on_request():
    """A second use gives the same; after the last one the tape is empty."""
    model, inputs = _case("network")
    names = [name for name, _ in model.named_parameters()]
    with LayerTape(model, names) as tape:
        losses = _losses(model, inputs)
        first = tape.squared_sums(losses, batch_size=BATCH, retain_graph=True)
        torch.testing.assert_close(tape.squared_sums(losses, batch_size=BATCH), first)
        assert not tape._calls


def test_forward_passes_that_do_not_belong_to_the_loss():
    """A forward without gradients is not recorded; one of another size is no obstacle, and can be dropped."""
    model, inputs = _case("network")
    expected = _reference(model, inputs)
    with LayerTape(model, expected) as tape:
        with torch.no_grad():
            model(inputs)
        assert not tape._calls
        model(inputs[:2])
        torch.testing.assert_close(tape.squared_sums(_losses(model, inputs), batch_size=BATCH), expected)
        model(inputs)
        tape.clear()
        assert not tape._calls


def test_half_precision_model_and_autocast():
    """Squares are formed in float32 from what the half-precision pass gives."""
    model, inputs = _case("network")
    expected = _reference(model, inputs)
    half = {}
    with LayerTape(model.float(), expected) as tape, torch.autocast("cpu", torch.bfloat16):
        half["autocast"] = tape.squared_sums(_losses(model, inputs.float()), batch_size=BATCH)
    with LayerTape(model.bfloat16(), expected) as tape:
        half["bfloat16"] = tape.squared_sums(_losses(model, inputs.bfloat16()), batch_size=BATCH)
    for actual in half.values():
        for key, value in expected.items():
            assert actual[key].dtype == torch.float32
            torch.testing.assert_close(actual[key].double(), value, rtol=0.1, atol=0.02 * value.max().item())


def test_hooks_of_others_and_keyword_calls():
    """A hook that replaces the output comes after the record, one on the input before it."""

    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3).double()
            self.layer.register_forward_pre_hook(
                lambda layer, args, kwargs: ((), {"input": kwargs["input"] + 1}), with_kwargs=True
            )
            self.layer.register_forward_hook(lambda layer, args, output: output * 2)

        def forward(self, x):
            return self.layer(input=x)

    torch.manual_seed(0)
    model, inputs = Keyword(), _vectors(4)
    expected = _reference(model, inputs)
    with LayerTape(model, expected) as tape:
        torch.testing.assert_close(tape.squared_sums(_losses(model, inputs), batch_size=BATCH), expected)
    assert len(model.layer._forward_hooks) == 1


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class TiedByFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.bias = nn.Embedding(7, 4), nn.Parameter(torch.zeros(7))

    def forward(self, x):
        return F.linear(self.embed(x), self.embed.weight, self.bias)


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x.transpose(0, 1)).transpose(0, 1))


class Flattened(SequenceFirst):
    def forward(self, x):
        return self.head(self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x + self.table(torch.arange(x.shape[1]).unsqueeze(0)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0])


class Mixing(SequenceFirst):
    """A sample sees the mean of the batch."""

    def forward(self, x):
        hidden = self.layer(x)
        return self.head(hidden + hidden.mean(0))


@pytest.mark.parametrize(
    ("model", "inputs", "uncovered", "reason"),
    [
        (Attention, (6, 4), {"attention.in_proj_weight", "attention.out_proj.weight"}, "acts outside|child modules"),
        (TiedByFunction, (6,), {"embed.weight", "bias"}, "acts outside|child modules"),
        (SequenceFirst, (6, 4), {"layer.weight", "layer.bias"}, "6 rows for 5 samples"),
        (SequenceFirst, (BATCH, 4), {"layer.weight", "layer.bias"}, "samples are mixed"),
        (Flattened, (6, 4), {"layer.weight", "layer.bias"}, "30 rows for 5 samples"),
        (Positions, (6, 4), {"table.weight"}, "1 rows for 5 samples"),
        (Recurrent, (6, 4), {"cell.weight_ih_l0"}, "several tensors"),
        (Mixing, (6, 4), {"layer.weight", "layer.bias"}, "samples are mixed"),
    ],
)
def test_uncovered_parameters_are_detected(model, inputs, uncovered, reason):
    """Also where the sum of the per-sample gradients would be right; the loop serves those left over."""
    torch.manual_seed(0)
    model = model().double()
    inputs = _tokens(*inputs) if len(inputs) == 1 else _vectors(*inputs)
    params = dict(model.named_parameters())
    with LayerTape(model, params) as tape:
        reasons = tape.uncovered(_losses(model, inputs), batch_size=BATCH)
    assert uncovered <= set(reasons)
    assert not any(name.startswith("head.") for name in reasons)
    for name in uncovered:
        assert re.search(reason, reasons[name])
    with LayerTape(model, params.keys() - reasons.keys()) as tape:
        assert tape.uncovered(_losses(model, inputs), batch_size=BATCH) == {}


def test_what_is_uncovered_is_not_returned():
    """Rows that are not samples, or an output that is no tensor, raise also without the check."""
    for model, match in ((Flattened(), "'layer' was called with 30 rows for 5"), (Recurrent(), "several tensors")):
        model, inputs = model.double(), _vectors(6, 4)
        with LayerTape(model, dict(model.named_parameters())) as tape, pytest.raises(ValueError, match=match):
            tape.squared_sums(_losses(model, inputs), batch_size=BATCH)


def test_nothing_is_covered_where_nothing_can_be_compared():
    """A loss without gradient tells nothing."""
    model, inputs = _case("linear")
    with LayerTape(model, ["weight"]) as tape:
        reasons = tape.uncovered(model(inputs).sum(1) * 0.0, batch_size=BATCH)
    assert "nothing is known" in reasons["weight"]


def test_gradients_that_are_zero_but_for_rounding_are_covered():
    """The softmax of attention does not see a bias of the keys."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))

    torch.manual_seed(0)
    model, inputs = Heads(), torch.randn(BATCH, 6, 4)
    with LayerTape(model, dict(model.named_parameters())) as tape:
        assert tape.uncovered(_losses(model, inputs), batch_size=BATCH) == {}


def test_batch_normalisation_in_training_mode_is_refused():
    """Samples have no gradients of their own there, also not in the other layers."""
    model, inputs = _case("network")
    with LayerTape(model.train(), ["4.weight"]), pytest.raises(ValueError, match=r"'1' uses the statistics.*eval\(\)"):
        model(inputs)


def test_input_changed_in_place_after_the_call_is_refused():
    """The record would hold another value than the layer saw."""

    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            output = self.layer(x)
            x.add_(1)
            return output

    model = Changes().double()
    with LayerTape(model, ["layer.weight"]) as tape, pytest.raises(RuntimeError, match="'layer' was changed in place"):
        # autograd itself would notice only when it forms the weight gradient
        tape.squared_sums(_losses(model, _vectors(4)), batch_size=BATCH)


def test_mistakes_are_named():
    """Unknown names, losses of another shape, use after the block, frequency-scaled tables, scalar losses in a loop."""
    model, inputs = _case("linear")
    with pytest.raises(ValueError, match=r"`names` holds \['wieght'\]"):
        LayerTape(model, ["wieght"])
    with LayerTape(model, ["weight"]) as tape:
        losses = _losses(model, inputs)
        with pytest.raises(ValueError, match=r"`losses` must have shape \(5,\)"):
            tape.uncovered(losses.sum(), batch_size=BATCH)
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        tape.squared_sums(losses, batch_size=BATCH)
    assert not model._forward_hooks
    with pytest.raises(ValueError, match="outputs with 5 rows"):
        SampleLoop(dict(model.named_parameters())).squared_sums(losses.sum(), batch_size=BATCH)

    table = nn.Embedding(7, 3, scale_grad_by_freq=True).double()
    with LayerTape(table, ["weight"]) as tape:
        losses = _losses(table, _tokens(6))
        assert "scale_grad_by_freq" in tape.uncovered(losses, batch_size=BATCH)["weight"]


class RootMeanSquare(nn.Module):
    """A norm that has no rule here, like those of many language models."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return self.weight * x * x.square().mean(-1, keepdim=True).rsqrt()


class ToBeSharded(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(7, 8), RootMeanSquare(), nn.Linear(8, 8), nn.ReLU(True))
        self.head, self.called_by_function = nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.head(self.body(x))
        return F.linear(hidden, self.called_by_function.weight)


def _sharded_sums():
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = ToBeSharded()
    inputs = torch.randint(0, 7, (6, 5))
    served = [name for name, _ in model.named_parameters() if "function" not in name]
    with LayerTape(model, served) as tape:
        expected = tape.squared_sums(_losses(model, inputs), batch_size=6)

    for block in (model.body[2], model.body, model):
        fully_shard(block)
    params = dict(model.named_parameters())
    inputs = inputs[3 * rank : 3 * rank + 3]
    with LayerTape(model, params) as tape:
        reasons = tape.uncovered(_losses(model, inputs), batch_size=3)
    with LayerTape(model, served) as tape:
        losses = _losses(model, inputs)
        assert tape.uncovered(losses, batch_size=3) == {}
        actual = tape.squared_sums(losses, batch_size=3)
    assert all(value.placements == params[name].placements for name, value in actual.items())
    actual = {name: value.full_tensor() for name, value in actual.items()}
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"sharded parameters such as 'body\.0\.weight'"):
        squared_sums_by_loop([], params)
    return reasons


@pytest.mark.distributed
def test_sharded_model():
    """Under fully_shard, ranks add up to the joined batch; what autograd cannot reach is named, never zero."""
    group = Ranks(2)
    reasons = group.run(_sharded_sums)
    group.close()
    assert reasons[0] == reasons[1]
    assert "acts outside" in reasons[0]["called_by_function.weight"]
    assert {name for name in reasons[0] if "function" not in name} == set()
