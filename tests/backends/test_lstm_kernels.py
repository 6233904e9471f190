"""LSTMs in int8: a trained classifier, the reference, and IPEX's kernel against both."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated
from models import normal
from processor import exact_weights
from torch import Tensor, nn

from torch_quant import Backend, ModuleFilter, QConfig, Quantizer, QuantSpec, load, save, sqnr
from torch_quant.backends import IPEXBackend, available_backends
from torch_quant.backends.ipex.lstm import LSTM_KERNEL

LSTM_KERNELS = {b.name: b.kernels().of("lstm") for b in available_backends()}
BACKENDS = [
    name for name, rows in LSTM_KERNELS.items() if rows and not rows[0].input.default.dynamic
]
needs_ipex = pytest.mark.skipif(
    Backend.IPEX.unavailable() is not None, reason=f"Backend.IPEX: {Backend.IPEX.unavailable()}"
)

# ---- a digit, read row by row


class Reader(nn.Module):
    """Rows of a digit as bags of words, an LSTM in both directions, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.EmbeddingBag(8 * 5, 16, mode="sum")
        self.lstm = nn.LSTM(16, 48, batch_first=True, bidirectional=True)
        self.head = nn.Linear(96, 10)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.pixels(ids.reshape(-1, 8)).reshape(ids.size(0), -1, 16)
        return self.head(self.lstm(rows)[0].mean(1))


def digits() -> tuple[Tensor, Tensor]:
    """Ids ``[1797, 8, 8]``, a word for each place in a row and each brightness, and labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    places = torch.arange(8) * 5
    return torch.tensor(images).reshape(-1, 8, 8).long() // 4 + places, torch.tensor(labels)


@pytest.fixture(scope="module")
def reader() -> Reader:
    """Trained on four digits of five."""
    torch.manual_seed(0)
    ids, labels = digits()
    known = (torch.arange(len(ids)) % 5).nonzero()[:, 0]
    model = Reader()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    with pytest.MonkeyPatch.context() as patch:  # IPEX, once imported, puts one without gradients
        patch.setattr(torch, "embedding_bag", torch._VF.embedding_bag)
        for _ in range(12):
            for batch in known[torch.randperm(len(known))].split(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(ids[batch]), labels[batch]).backward()
                optimizer.step()
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_classifier_of_sequences_keeps_its_accuracy(reader: Reader, backend: str) -> None:
    ids, labels = (x[::5] for x in digits())
    quantizer = calibrated(reader, [((ids[:64],), {})], backend=backend)
    quant_model = quantizer.quantize(reader)
    assert set(quantizer.plan.quantized) == {"pixels", "lstm", "head"}
    exact = (reader(ids).argmax(-1) == labels).float().mean()
    int8 = (quant_model(ids).argmax(-1) == labels).float().mean()
    assert float(exact) > 0.9
    assert float(int8) >= float(exact) - 0.01
    assert sqnr(reader(ids), quant_model(ids)) > 25


def test_scores_and_fallback(reader: Reader) -> None:
    ids, _ = digits()
    quantizer = calibrated(reader, [((ids[:32],), {})], backend="reference")
    amp_model = quantizer.amp(reader)
    for batch in ids[:64].split(32):
        assert torch.equal(amp_model(batch), reader(batch))
    ranking = quantizer.sensitivity(amp_model)
    assert {site.name for site in ranking} == {"pixels", "lstm", "head"}
    assert all(site.score > 0 for site in ranking)
    lstm = next(site for site in ranking if site.name == "lstm")
    assert 0.0 < lstm.weight_share < 1.0
    measured = sqnr(reader(ids[:64]), quantizer.quantize(reader)(ids[:64]))
    names = quantizer.fallback(amp_model, num=3)
    assert set(names) == {"pixels", "lstm", "head"}
    quantizer.reset_fallback()
    quantizer.fallback(amp_model, num=1)
    assert sqnr(reader(ids[:64]), quantizer.quantize(reader)(ids[:64])) > measured


def test_ranges_and_plan_are_saved_and_loaded(reader: Reader, tmp_path: Path) -> None:
    ids, _ = digits()
    quantizer = calibrated(reader, [((ids[:32],), {})], backend="reference")
    expected = quantizer.quantize(reader)(ids[:5])
    other = Quantizer("reference")
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.quantize(reader, example_inputs=ids[:3])(ids[:5]), expected)
    quantizer.save_summary(tmp_path / "summary.json")
    third = Quantizer("reference")
    third.load_summary(tmp_path / "summary.json")
    assert torch.equal(third.quantize(reader, example_inputs=ids[:32])(ids[:5]), expected)
    assert dict(third.plan) == dict(quantizer.plan)
    assert third.plan["lstm"].inputs[1] == "lstm.hidden"


# ---- one LSTM in every form

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False, "batch_first": True},
    "layers": {"num_layers": 2},
    "both": {"bidirectional": True},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


class Whole(nn.Module):
    """An LSTM whose results are all read; a state may be given."""

    def __init__(self, size: float = 1.0, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(16, 32, **options)
        with torch.no_grad():
            self.lstm.weight_ih_l0.div_(size)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, (h_n, c_n) = self.lstm(x, state or None)
        return output, h_n, c_n


def data(
    model: Whole, batch: int, length: int, *, given: bool, size: float = 1.0
) -> tuple[Tensor, ...]:
    lstm = model.lstm
    shape = (batch, length) if lstm.batch_first else (length, batch)
    cells = lstm.num_layers * (2 if lstm.bidirectional else 1)
    state = [normal(cells, batch, 32, salt=i).tanh() for i in (1, 2)]
    return ((normal(*shape, 16) + 0.3) * size, *(state if given else ()))


@pytest.mark.thin
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "given"])
@pytest.mark.parametrize("form", FORMS)
def test_every_backend_gives_the_numbers_of_the_reference(form: str, given: bool) -> None:
    model = Whole(**FORMS[form]).eval()
    batches = [(data(model, batch, 10, given=given), {}) for batch in (8, 16)]
    quantizer = calibrated(model, batches, backend="reference", qconfig=exact_weights())
    reference = quantizer.quantize(model)
    for batch, length in ((8, 10), (3, 10), (3, 5), (5, 17)):
        inputs = data(model, batch, length, given=given)
        exact, expected = model(*inputs), reference(*inputs)
        least = [sqnr(x, y) for x, y in zip(exact, expected, strict=True)]
        assert min(least) > 25
        for backend in BACKENDS:
            quant_model = quantizer.quantize(model, backend=backend)
            for _ in range(3):
                actual = quant_model(*inputs)
            for got, same, float_ in zip(actual, expected, exact, strict=True):
                assert sqnr(same, got) > 40  # the same codes, but for a few that flip
                assert sqnr(float_, got) > sqnr(float_, same) - 0.5


@pytest.mark.thin
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0.01, 100.0])
def test_inputs_far_larger_or_smaller_than_hidden_states(backend: str, size: float) -> None:
    """One grid for both, as IPEX has it, would lose one of them altogether."""
    model = Whole(size).eval()
    inputs = data(model, 8, 10, given=False, size=size)
    quant_model = calibrated(model, [(inputs, {})], backend=backend).quantize(model)
    assert sqnr(model(*inputs), quant_model(*inputs)) > 30


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_stored_as_int8(backend: str) -> None:
    model = nn.LSTM(64, 256, 2).eval()
    quant_model = calibrated(model, [((normal(3, 2, 64),), {})], backend=backend).quantize(model)
    size = sum(x.numel() * x.element_size() for x in quant_model.state_dict().values())
    assert size < 0.3 * sum(4 * x.numel() for x in model.parameters())


@pytest.mark.parametrize("backend", ["onnx"])
def test_backends_without_a_kernel_say_so(backend: str) -> None:
    if Backend.get(backend).unavailable() is not None:
        pytest.skip(str(Backend.get(backend).unavailable()))
    model = nn.Sequential(nn.Linear(16, 16), Whole()).eval()
    x = normal(5, 2, 16)
    quantizer = calibrated(model, [((x,), {})], backend=backend)
    quant_model = quantizer.quantize(model)
    assert quantizer.plan["1.lstm"].reason == f"{backend} has no int8 kernel for lstm"
    assert sqnr(model(x), quant_model(x)) > 25


@pytest.mark.thin
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_an_lstm_that_fell_back_has_the_models_own_values(
    backend: str, precision: torch.dtype
) -> None:
    model = nn.Sequential(nn.Linear(16, 16), Whole()).eval()
    x = normal(9, 4, 16)
    quantizer = calibrated(model, [((x,), {})], backend=backend)
    amp_model = quantizer.amp(model)
    amp_model(x)
    assert "1.lstm" in quantizer.fallback(amp_model, num=2, dtype=precision)
    fallen = quantizer.quantize(model)(x)
    assert sqnr(model(x), fallen) > (100 if precision == torch.float32 else 25)
    quantizer.reset_fallback()
    quantizer = calibrated(
        model, [((x,), {})], backend=backend, module_filter=ModuleFilter(exclude_op_types=["lstm"])
    )
    kept = list(quantizer.quantize(model).state_dict().values())
    for x in model[1].lstm.parameters():
        assert any(torch.equal(x, y) for y in kept)


# ---- IPEX


class Two(nn.Module):
    """Two LSTMs, one behind the other."""

    def __init__(self, **second: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.LSTM(16, 16), nn.LSTM(16, 16, **second)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)[0])[0]


@needs_ipex
@pytest.mark.parametrize("form", FORMS)
def test_ipex_runs_it_on_its_kernel(form: str) -> None:
    model = Whole(**FORMS[form]).eval()
    inputs = data(model, 4, 6, given=False)
    quant_model = calibrated(model, [(inputs, {})], backend="ipex").quantize(model)
    report = IPEXBackend().verify(quant_model, inputs)
    assert report.complete, str(report)
    assert report.int8 == report.expected == {"lstm": 1}


@needs_ipex
@pytest.mark.parametrize("form", ["plain", "all"])
def test_ipex_runs_it_on_its_kernel_if_only_the_last_state_is_read(form: str) -> None:
    class Last(Whole):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.lstm(x)[1][0]

    model = Last(**FORMS[form]).eval()
    inputs = data(model, 4, 6, given=False)
    quantizer = calibrated(model, [(inputs, {})], backend="ipex", qconfig=exact_weights())
    quant_model = quantizer.quantize(model)
    assert IPEXBackend().verify(quant_model, inputs).complete
    expected = quantizer.quantize(model, backend="reference")(*inputs)
    assert sqnr(expected, quant_model(*inputs)) > 50  # a code may flip


@needs_ipex
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_float_lstm_does_not_keep_ipex_from_the_other(name: str) -> None:
    """It gives up on all of them at the first that is not quantized."""
    model = Two().eval()
    x = normal(9, 4, 16)
    filter_ = ModuleFilter(exclude_names=[name])
    options = {"module_filter": filter_, "qconfig": exact_weights()}
    quantizer = calibrated(model, [((x,), {})], backend="ipex", **options)
    quant_model = quantizer.quantize(model)
    report = IPEXBackend().verify(quant_model, (x,))
    assert report.complete, str(report)
    assert report.int8 == {"lstm": 1}
    assert sqnr(quantizer.quantize(model, backend="reference")(x), quant_model(x)) > 60


@needs_ipex
def test_what_ipex_leaves_in_float_is_right_and_named() -> None:
    model = Two(proj_size=8).eval()
    x = normal(9, 4, 16)
    quantizer = calibrated(model, [((x,), {})], backend="ipex")
    quant_model = quantizer.quantize(model)
    assert "projections" in quantizer.plan["b"].reason
    assert IPEXBackend().verify(quant_model, (x,)).left_out == {"a": LSTM_KERNEL.missing}
    assert sqnr(model(x), quant_model(x)) > 30


class LeftOut(nn.Module):
    """A bag and an LSTM, beside others, that IPEX has no kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.sums, self.largest = nn.EmbeddingBag(50, 16), nn.EmbeddingBag(50, 16, mode="max")
        self.rnn, self.head = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, ids: Tensor, offsets: Tensor, x: Tensor) -> Tensor:
        y = self.sums(ids, offsets) + self.largest(ids, offsets) + self.rnn(x)[1][1][0]
        return self.head(y)


class Pieces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = LeftOut()

    def forward(self, *inputs: Tensor) -> Tensor:
        y = self.part(*inputs)
        return y + 1 if y.sum() > 1e9 else y


@needs_ipex
@pytest.mark.parametrize("build", [LeftOut, Pieces])
def test_a_loaded_model_names_what_ipex_leaves_out(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    x = (torch.randint(0, 50, (12,)), torch.tensor([0, 4, 8]), normal(3, 5, 16))
    quant_model = calibrated(model, [(x, {})], backend="ipex").quantize(model)
    report = IPEXBackend().verify(quant_model, x)
    save(quant_model, tmp_path / "saved")
    loaded = load(tmp_path / "saved", model=model)
    found = IPEXBackend().verify(loaded, x)
    path = "part." if build is Pieces else ""
    assert {f"{path}largest", f"{path}rnn"} <= set(report.left_out)
    assert found.left_out == report.left_out
    assert found.expected == report.expected


@needs_ipex
def test_a_loaded_layer_is_named_by_its_operator(tmp_path: Path) -> None:
    model, x = nn.EmbeddingBag(50, 16, mode="max"), torch.randint(0, 50, (3, 4))
    quant_model = calibrated(model, [((x,), {})], backend="ipex").quantize(model)
    report = IPEXBackend().verify(quant_model, x)
    save(quant_model, tmp_path / "saved")
    found = IPEXBackend().verify(load(tmp_path / "saved"), x)
    assert found.left_out == report.left_out
    assert set(report.left_out) == {"embedding_bag"}


@needs_ipex
def test_formats_that_ipex_does_not_take() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Whole()).eval()
    signed = QConfig(input=QuantSpec.of(signed=True, symmetric=True))
    x = normal(9, 4, 16)
    quantizer = calibrated(model, [((x,), {})], backend="ipex", overrides={"lstm": signed})
    quantizer.quantize(model)
    assert "unsigned" in quantizer.plan["1.lstm"].reason


@needs_ipex
@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_no_worse_than_ipexs_own_recipe(form: str) -> None:
    import intel_extension_for_pytorch as ipex
    from intel_extension_for_pytorch.quantization import convert, prepare

    model = Whole(**FORMS[form]).eval()
    inputs = data(model, 16, 12, given=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it deprecates much of PyTorch
        mapping = ipex.quantization.default_static_qconfig_mapping
        prepared = prepare(model, mapping, example_inputs=inputs, inplace=False)
        prepared(*inputs)
        traced = torch.jit.freeze(torch.jit.trace(convert(prepared), inputs, check_trace=False))
        for _ in range(3):
            theirs = traced(*inputs)
    assert "ipex::quantized_lstm" in str(traced.graph_for(*inputs))
    expected = model(*inputs)
    ours = calibrated(model, [(inputs, {})], backend="ipex").quantize(model)(*inputs)
    for exact, own, other in zip(expected, ours, theirs, strict=True):
        assert sqnr(exact, own) >= sqnr(exact, other) - 0.5
    assert sqnr(expected[0], ours[0]) > sqnr(expected[0], theirs[0]) + 6  # each has a grid
