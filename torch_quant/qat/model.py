"""What ``qat`` returns: a twin of the user's module that trains its parameters through the plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from torch_quant.convert.quantization import Quantization
from torch_quant.convert.quantized import QuantizedModule, quantized_graphs, run
from torch_quant.core.plan import QuantPlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.qat.fake_quantize import (
    TRAINED_FAKE_QUANTIZE,
    read_label,
    stored_scale,
    stored_zero_point,
)
from torch_quant.qat.modes import Mode, TrainedGraph, set_mode
from torch_quant.qat.switches import Switches

if TYPE_CHECKING:
    from torch_quant.session import Session

__all__ = [
    "Bond",
    "Learned",
    "QatModel",
    "TrainedQuantization",
    "bond_of",
    "learned_qparams",
    "read_facts",
    "scale_names",
    "switches_of",
]

Learned = Mapping[tuple[str, str, QuantSpec], QParams]
"""Role, key of the activation or name of the site, and format -> scales and zero points."""


class Bond:
    """The quantizer and float model of a QAT model. Copies share it, a pickle has None instead.

    Args:
        session: both, with the graphs that are trained. Trainers write to a model's configuration,
            at which the quantizer's own session would capture anew.
        plan: what is trained.
        facts: what its transforms have computed from the weights that training began with. It is
            asked only for what :func:`read_facts` finds in no graph of a model: copies, and models
            that a checkpoint was loaded into, have others.
    """

    def __init__(self, session: Session, plan: QuantPlan, facts: dict[Hashable, Any]) -> None:
        self.session, self.plan, self.facts = session, plan, facts
        self.model = session.model  # its parameters are trained, so it lives as long

    def __deepcopy__(self, memo: Any) -> Bond:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()


@dataclass
class TrainedQuantization(Quantization):
    """How one module of a QAT model runs.

    Args:
        method: gives the gradients.
        bond: who made it, of the whole model.
        left: site -> why it trains in float though the backend would quantize it.
        switches: of the whole model, once it is made.
        root: whether it is the whole model.
        frozen: whether norms are frozen by the switch.
        stilled: the norms that this put into eval mode, which leave it again; others were put there
            by the user.
    """

    method: str = ""
    bond: Bond | None = None
    switches: Switches | None = None
    root: bool = False
    frozen: bool = False
    stilled: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)


class QatModel(QuantizedModule):
    """A module that computes what ``quantize`` will deploy, and trains the float model.

    It is of the float model's class. Its parameters are those of the float model itself, under
    the same names; beside them, ``fc.input_scale`` and ``fc.weight_scale`` are parameters where the
    method learns them. A copy (``copy.deepcopy``, an average of weights) has parameters of its own.

    What differs from the float model in train mode:

    - Batch norms normalize by the statistics of the batch, and move the running ones, as in the
      float model. Where one stands behind a convolution or linear layer, these are the statistics
      of what the rounded weight gives. Once they are frozen, by :class:`QatSchedule` or by
      ``qat_model.bn.eval()``, it is folded into the weight, as it is in eval mode. Norms that are
      no ``nn.BatchNorm1d`` or of its kin stay as they were captured, in eval mode.
    - Dropout drops where the model calls it as such, a module or ``F.dropout``. What code leaves
      out in eval mode is not in a graph that was captured so: the dropout inside of
      ``F.scaled_dot_product_attention``, stochastic depth written as ``if self.training``.
    - An LSTM trains in float, and is deployed in float.
    """

    quantization: TrainedQuantization
    _unfinished: ClassVar[str] = (
        "a QAT model is for training: quantizer.quantize(qat_model) gives the model to save or "
        "export; torch.save(qat_model.state_dict(), path) keeps a checkpoint"
    )

    def train(self, mode: bool = True) -> QatModel:
        """Set the mode, of dropout and batch norms as in the float model."""
        nn.Module.train(self, mode)
        if self.quantization.glue is not None:
            self.quantization.glue.training = mode
        self.quantization.frozen, self.quantization.stilled = False, ()
        self.follow_switches()
        return self

    def _freeze_in_python(self, frozen: bool) -> None:
        """Put the norms that run as Python into eval mode, or those back that it put there."""
        how = self.quantization
        found = {**dict(self.named_modules()), "": how.glue}
        if frozen:
            moving = [
                name for name, x in found.items() if _moves(x) and not isinstance(x, QatModel)
            ]
            how.stilled = (*how.stilled, *moving)
        for name in how.stilled:
            if (norm := found.get(name)) is not None:
                norm.training = not frozen
        how.stilled = how.stilled if frozen else ()
        how.frozen = frozen

    def follow_switches(self) -> None:
        """Have each graph run the body for the mode of this module and the model's switches."""
        how = self.quantization
        switches = how.switches
        if switches is None:
            return
        _, observes, rounds, frozen = switches.read()
        if how.frozen != frozen:
            self._freeze_in_python(frozen)
        for graph in how.graphs:
            assert isinstance(graph, TrainedGraph)
            norms = graph.norms if self.training and not frozen else {}
            owners = [(name, self._owner_of(mean)) for name, mean in norms.items()]
            mode = Mode(
                drops=self.training and graph.drops,
                moving=tuple((name, x.momentum) for name, x in owners if _moves(x)),
                observes=self.training and observes and not switches.never_rounds,
                rounds=not switches.never_rounds and (rounds or not self.training),
                watches=switches.watches,
                taps=switches.taps,
            )
            set_mode(graph, mode, self._owner_of, switches.record)

    def _owner_of(self, target: str) -> nn.Module:
        module: nn.Module = self
        for part in target.split(".")[:-1]:
            module = module._modules[part]  # type: ignore[assignment]
        return module

    def _graph_was_added(self) -> None:
        self.follow_switches()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.follow_switches()

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the float model, and the scales that are learned."""
        return nn.Module.parameters(self, recurse)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of any module: weights, statistics and scales are copied in place."""
        return nn.Module.load_state_dict(self, state_dict, *args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QatModel:
        """What ``to`` and its kin do: buffers stay the float model's own, as parameters do."""
        with torch.no_grad():
            for buffer in self.buffers(recurse):
                buffer.data = fn(buffer)
        nn.Module._apply(self, fn, recurse)
        return self


def _moves(norm: nn.Module | None) -> TypeGuard[nn.modules.batchnorm._BatchNorm]:
    """Whether it is a batch norm in train mode. Norms of other classes are frozen by design."""
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training


def _run(model: QatModel, *args: Any, **kwargs: Any) -> Any:
    """Call it; compiled code runs the bodies that are there."""
    if not model.training or torch.compiler.is_compiling():
        return run(model, *args, **kwargs)
    how = model.quantization
    switches = how.switches if how.root else None
    with contextlib.nullcontext() if switches is None else switches.read_once():
        model.follow_switches()  # a checkpoint, another process or a norm's eval() may set them
        return run(model, *args, **kwargs)


QatModel._runs = staticmethod(_run)


def switches_of(model: nn.Module) -> Switches:
    """The switches of a whole QAT model; raises :class:`InvalidConfig` for anything else."""
    if not isinstance(model, QatModel):
        raise InvalidConfig(
            f"expected what quantizer.qat(model) makes, got {type(model).__name__}; of a wrapper "
            "such as DistributedDataParallel, give the module inside"
        )
    switches = model.quantization.switches
    if switches is None or not model.quantization.root:
        raise InvalidConfig("this is a part of a QAT model: give the whole model")
    return switches


def bond_of(model: QatModel) -> Bond:
    """The quantizer and float model; raises :class:`InvalidConfig` where they are not known."""
    bond = model.quantization.bond
    if bond is None:
        raise InvalidConfig(
            "this QAT model was unpickled, or is a part of one: quantizer.qat(model), then "
            "load_state_dict, keep it tied to its quantizer"
        )
    return bond


def _calls(model: QatModel) -> Iterator[tuple[nn.Module, str, Any]]:
    """Each module, its path, and the calls that round in its graphs."""
    paths = {id(module): path for path, module in model.named_modules()}
    for module, graph in quantized_graphs(model):
        assert isinstance(graph, TrainedGraph)
        path, body = paths[id(module)], graph.deployed
        found = body.graph.find_nodes(op="call_function", target=TRAINED_FAKE_QUANTIZE)
        yield from ((body, path, node) for node in found)


@torch.no_grad()
def learned_qparams(model: QatModel) -> Learned:
    """The scales of a QAT model as they are now and as they are deployed: copies."""
    found: dict[tuple[str, str, QuantSpec], QParams] = {}
    for body, _, node in _calls(model):
        _, scale, zero_point, element, _, role, _, text, *_ = node.args
        if not text:
            continue  # chosen at each call
        keys, spec = read_label(text)
        new = [(role, key, spec) for key in keys if (role, key, spec) not in found]
        if not new:
            continue
        step, code = (_read(body, each) for each in (scale, zero_point))
        used = stored_scale(step, spec.scale_type, role).clone()
        zero_point = stored_zero_point(code, element, role).clone()
        found |= dict.fromkeys(new, QParams(spec, used, zero_point))
    return found


def read_facts(model: QatModel) -> dict[Hashable, Any]:
    """What transforms have computed, by key: the very buffers of a QAT model that its graphs read.

    What no graph holds as it was computed is missing.
    """
    found: dict[Hashable, Any] = {}
    for _, graph in quantized_graphs(model):
        assert isinstance(graph, TrainedGraph)
        body = graph.deployed
        for node in body.graph.find_nodes(op="get_attr"):
            for key in graph.facts.get(node.name, ()):
                found.setdefault(key, _read(body, node))
    return found


def _read(body: nn.Module, node: Any) -> Tensor:
    path, _, name = str(node.target).rpartition(".")
    owner = body.get_submodule(path)
    found = owner._parameters.get(name)
    value = owner._buffers[name] if found is None else found
    assert value is not None
    return value


def scale_names(model: QatModel) -> list[str]:
    """The names of the parameters of a QAT model that are scales or zero points."""
    names: dict[str, None] = {}
    for _, path, node in _calls(model):
        for each in node.args[1:3]:
            names[f"{path}.{each.target}".strip(".")] = None
    known = dict(model.named_parameters(remove_duplicate=False))
    return [name for name in names if name in known]
