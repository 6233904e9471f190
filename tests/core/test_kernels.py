"""Tables of kernels: which row is chosen for formats, and why none is."""

from __future__ import annotations

from torch_quant.core.granularity import PerGroup, PerToken
from torch_quant.core.kernels import Accepts, Kernel, KernelTable
from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.core.spec import FLOAT, QuantSpec

INT8 = QuantSpec.of("int8", per_channel=True)
INT4 = QuantSpec.of("int4", granularity=PerGroup(32))
STATIC = Kernel("linear", Accepts(QuantSpec()), Accepts(INT8))
DYNAMIC = Kernel("linear", Accepts(QuantSpec.of(dynamic=True), dynamic=True), Accepts(INT8))
WEIGHT_ONLY = Kernel("linear", None, Accepts(INT4, any_format=True))
TABLE = KernelTable("toy", (STATIC, DYNAMIC, WEIGHT_ONLY, Kernel("matmul", Accepts(QuantSpec()))))


def test_the_first_row_that_takes_what_is_wanted() -> None:
    assert TABLE.choose("linear", QuantSpec(), INT8) == (STATIC, "")
    assert TABLE.choose("linear", QuantSpec.of(dynamic=True), INT8) == (DYNAMIC, "")
    assert TABLE.choose("linear", FLOAT, INT4) == (WEIGHT_ONLY, "")
    assert TABLE.choose("linear", FLOAT, INT8) == (WEIGHT_ONLY, "")
    assert TABLE.choose("matmul", QuantSpec(), None)[0] is TABLE.rows[-1]


def test_every_row_has_its_reason() -> None:
    _, reason = TABLE.choose("linear", QuantSpec(), INT4)
    assert reason.count("the kernels take a scale per tensor") or "integers of up to" in reason
    assert "the kernels take float activations, not u8 affine per-tensor" in reason
    _, reason = TABLE.choose("linear", FLOAT, FLOAT)  # what takes no float activations is no help
    assert reason == "the kernels take quantized weights, not float ones"
    tokens = QuantSpec.of("int8", granularity=PerToken(), dynamic=True)
    assert "a scale per tensor or per output channel" in TABLE.choose("linear", tokens, INT8)[1]
    assert "not at each call" in TABLE.choose("matmul", tokens, None)[1]


def test_what_a_site_does_not_have_is_not_asked_for() -> None:
    assert not STATIC.refusal(None, INT8)
    assert not WEIGHT_ONLY.refusal(None, None)


def test_an_edit_to_float_needs_a_row_for_it() -> None:
    site = SitePlan("head", "linear", ("x",), QuantSpec(), INT8)
    edits = QuantPlan([SitePlan("head", "linear", ("x",), None, INT8)])
    plan = QuantPlan([site])
    assert plan.edited(edits, TABLE)["head"].activation is None
    assert plan.edited(edits, TABLE).quantized == ("head",)
    found = plan.edited(edits, KernelTable("static", (STATIC,)))["head"]
    assert found.reason == "the kernels take quantized activations, not float ones"
