"""What programs are made of: one function for each kind of step, which writes it or does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import hypothesis.strategies as st
import torch
from programs import Builder, Program, plain

__all__ = ["STEPS", "programs"]

STEPS: list[Callable[[Builder], None]] = []
Step = Callable[[Builder], None]
CHANNELS = (4, 1, 2, 3, 5, 8, 16, 17)
FUNCTIONS = (
    "F.relu({})", "F.gelu({})", "F.gelu({}, approximate='tanh')", "F.silu({})", "torch.tanh({})",
    "torch.sigmoid({})", "F.hardswish({})", "F.hardsigmoid({})", "F.hardtanh({}, -0.5, 0.7)",
    "F.leaky_relu({}, 0.1)", "{}.clamp(-0.4, 0.9)", "{}.clamp(min=-0.1)", "F.elu({})", "F.mish({})",
    "F.relu6({})", "F.softplus({})", "F.selu({})", "{} * torch.sigmoid({})", "{}.abs()", "-{}",
    "F.dropout({}, 0.5, self.training)", "{} * 0.5 + 0.25", "{}.square()", "1.0 - {}",
    "{} / (1.0 + {}.abs())", "{}.float()", "{}.contiguous()", "{}.detach()", "{}.clone()",
    "{}.flip(-1)", "{}.roll(1, -1)", "{}.cumsum(-1)", "torch.maximum({}, 0.3 * {})",
    "torch.where({} > 0, {}, 0.1 * {})", "{}.masked_fill({} > 1.0, 0.0)", "F.normalize({}, dim=-1)",
    "F.logsigmoid({})", "{}.sin()", "F.pad({}, (1, 2))", "F.pad({}, (0, 1), value=0.5)",
)  # fmt: skip
REDUCTIONS = (
    "{}.mean({})", "{}.mean({}, keepdim=True)", "{}.sum({})", "{}.amax({})", "{}.softmax({})",
    "{}.log_softmax({})", "{}.max({})[0]", "{}.std({}, correction=0)", "{}.unbind({})[0]",
    "{}.select({}, 0)", "{}.narrow({}, 0, 1)", "torch.cat([{0}, {0}], {1})", "{}.chunk(2, {})[-1]",
    "{}.split(2, {})[0]", "torch.stack([{0}, 0.5 * {0}], {1})", "{}.unsqueeze({})", "{}.flip({})",
    "{}.repeat_interleave(2, {})", "{}.squeeze({})", "{}.movedim({}, -1)",
)  # fmt: skip
JOINS = (
    "{} + {}", "{} - {}", "{} * {}", "torch.cat([{}, {}], -1)", "torch.add({}, {}, alpha=0.5)",
    "torch.maximum({}, {})", "{} + 0.5 * {}", "torch.stack([{}, {}], 1)", "{1} + {0}.relu()",
)  # fmt: skip
IN_PLACE = (
    "{}.relu_()", "{}.mul_(0.5)", "{}.add_(0.25)", "{}.clamp_(-0.6, 0.6)", "{}[..., 0] = 0.5",
    "{}[..., :1] *= 0.5", "{} += 0.125", "F.silu({}, inplace=True)", "{}.sigmoid_()",
    "{}.unsqueeze(-1)[..., 0].neg_()", "{}.fill_(0.5)",
)  # fmt: skip


def step(times: int = 1) -> Callable[[Step], Step]:
    """Make it a step, that is chosen so many times as often as others."""

    def register(function: Step) -> Step:
        STEPS.extend([function] * times)
        return function

    return register


@step(4)
def linear(b: Builder) -> None:
    found = b.fit(b.of(2, 3, 4))
    if found:
        layer = b.layer(f"nn.Linear({found[1][-1]}, {b.of(*CHANNELS)}, bias={b.of(True, False)})")
        b.put(f"{layer}({found[0]})")


@step(4)
def convolution(b: Builder) -> None:
    dims = b.of(2, 1, 3)
    found = b.fit(dims + 2)
    if not found:
        return
    channels, groups = found[1][0], b.of(1, *(g for g in (2, 3, 4) if found[1][0] % g == 0))
    if b.of(False, False, True):  # depthwise
        groups = channels
    kernel = min(b.of(3, 1, 2, 5), *found[1][1:])
    options = [f"groups={groups}"] if groups > 1 else []
    options += b.of([], ["bias=False"])
    padding = b.of(0, 1, "'same'", "'valid'", kernel // 2)
    options += [f"padding={padding}"] if padding else []
    if padding != "'same'":
        options += b.of([], ["stride=2"], [f"stride={(2, 1, 3)[:dims]}"])
    options += b.of([], ["dilation=2"])
    options += b.of([], [], ["padding_mode='reflect'"], ["padding_mode='circular'"])
    out = groups * b.of(1, 2, 4, 5)
    try:
        layer = b.layer(f"nn.Conv{dims}d({channels}, {out}, {kernel}, {', '.join(options)})")
    except ValueError:
        return
    name = b.put(f"{layer}({found[0]})")
    if name and b.of(False, True):
        name = b.put(f"{b.layer(f'nn.BatchNorm{dims}d({out})')}({name})")
    if name and b.of(False, True):
        b.put(f"F.relu({name})")


@step()
def transposed_convolution(b: Builder) -> None:
    dims = b.of(2, 1, 3)
    found = b.fit(dims + 2)
    if not found:
        return
    channels, groups = found[1][0], b.of(1, *(g for g in (2, 3) if found[1][0] % g == 0))
    options = b.of(["1"], ["2"], ["2", "1"], ["2", "1", "1"], ["1", "1"])
    more = [f"groups={groups}", f"bias={b.of(True, False)}", f"dilation={b.of(1, 2)}"]
    sizes = f"{channels}, {groups * b.of(1, 2, 4)}, {b.of(3, 2, 4)}"
    layer = b.layer(f"nn.ConvTranspose{dims}d({sizes}, {', '.join([*options, *more])})")
    b.put(f"{layer}({found[0]})")


@step(2)
def again(b: Builder) -> None:
    """A layer that has been used before, or its weight."""
    if not b.layers:
        return
    i = b.number(0, len(b.layers) - 1)
    if b.layers[i].startswith(("nn.LSTM", "nn.GRU", "nn.RNN", "nn.Embedding", "nn.Parameter")):
        return
    name = b.value(plain)
    if name and b.layers[i].startswith("nn.Linear") and b.of(False, True):
        b.put(f"F.linear({name}, self.m{i}.weight{b.of('', ' * 0.5')})")
    elif name:
        b.put(f"self.m{i}({name})")


@step(4)
def function(b: Builder) -> None:
    name = b.value()
    if name:
        b.put(b.of(*FUNCTIONS).replace("{}", name))


@step(3)
def reduction(b: Builder) -> None:
    name = b.value(lambda shape: len(shape) > 1)
    if name:
        code = b.of(*REDUCTIONS)
        b.put(code.format(name, b.number(1, len(b.values[name]) - 1)))


@step(3)
def movement(b: Builder) -> None:
    name = b.value(lambda shape: len(shape) > 1)
    if not name:
        return
    last = len(b.values[name]) - 1
    first, other = b.number(0, last), b.number(0, last)
    b.put(
        b.of(
            f"{name}.transpose({first}, {other})",
            f"{name}.flatten({min(first, other)}, {max(first, other)})",
            f"{name}.permute({', '.join(map(str, [0, *reversed(range(1, last + 1))]))})",
            f"{name}.reshape({name}.shape[0], -1)",
            f"{name}[:, {b.of('1:', ':-1', '::2', 'None', '[0]', '0')}]",
            f"{name}[{b.of('1:', ':2', '::2', 'None')}]",
            f"{name}.unflatten({first}, ({b.of(2, 3)}, -1))",
            f"{name}.expand({', '.join(['-1'] * (last + 1))})",
            f"{name}.repeat({', '.join(['1'] * last + ['2'])})",
        )
    )


@step(4)
def joined(b: Builder) -> None:
    """Two values of which one may be broadcast to the other."""
    name = b.value()
    shape = b.values[name] if name else ()
    other = b.value(lambda each: fits(each, shape))
    if name and other:
        code = b.of(*JOINS)
        b.put(code.format(name, other))


@step(2)
def product(b: Builder) -> None:
    left = b.fit(b.of(3, 4))
    right = left and b.value(lambda shape: len(shape) == len(left[1]) + 1 and plain(shape))
    if not left or not right:
        return
    b.put(
        b.of(
            f"{left[0]} @ {right}.transpose(-1, -2)",
            f"{left[0]} @ {right}",
            f"({left[0]} @ {right}.transpose(-1, -2) * 0.3).softmax(-1)",
            f"torch.einsum('b...ij,b...kj->b...ik', {left[0]}, {right})",
            f"torch.bmm({left[0]}, {right}.transpose(1, 2))",
            f"torch.matmul({left[0]}.transpose(-1, -2), {right})",
        )
    )


@step()
def attention(b: Builder) -> None:
    found = b.fit(b.of(4, 3))
    if not found:
        return
    q = found[0]
    k = b.of(q, b.value(lambda shape: plain(shape) and shape[1:] == found[1]) or q)
    options = b.of("", ", is_causal=True", ", scale=0.5")
    if len(found[1]) == 2 and b.of(False, True):
        heads = b.of(1, *(h for h in (2, 4) if found[1][-1] % h == 0))
        layer = b.layer(f"nn.MultiheadAttention({found[1][-1]}, {heads}, batch_first=True)")
        b.put(f"{layer}({q}, {k}, {k}, need_weights=False)[0]")
    else:
        b.put(f"F.scaled_dot_product_attention({q}, {k}, {k}{options})")


@step()
def norm(b: Builder) -> None:
    kind = b.of("layer", "group", "batch", "rms", "instance")
    found = b.fit(b.of(3, 2) if kind in ("layer", "rms") else 4)
    if not found:
        return
    sizes = found[1]
    groups = b.of(1, *(g for g in (2, 4) if sizes[0] % g == 0))
    code = {
        "layer": f"nn.LayerNorm({sizes[-1]})",
        "rms": f"nn.RMSNorm({sizes[-1]})",
        "group": f"nn.GroupNorm({groups}, {sizes[0]})",
        "batch": f"nn.BatchNorm2d({sizes[0]})",
        "instance": f"nn.InstanceNorm2d({sizes[0]})",
    }[kind]
    b.put(f"{b.layer(code)}({found[0]})")


@step()
def pooling(b: Builder) -> None:
    dims = b.of(2, 1)
    found = b.fit(dims + 2)
    if found:
        kind = b.of("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "interpolate")
        if kind == "interpolate":
            mode = b.of("'nearest'", "'bilinear'" if dims == 2 else "'linear'")
            b.put(f"F.interpolate({found[0]}, scale_factor=2, mode={mode})")
        else:
            more = "" if "adaptive" in kind else b.of("", ", padding=1", ", ceil_mode=True")
            b.put(f"F.{kind}{dims}d({found[0]}, {b.of(2, 1, 3)}{more})")


@step()
def embedding(b: Builder) -> None:
    for name, rows in b.tables.items():
        width = b.of(8, 4, 5)
        if b.of(True, True, False):
            options = b.of("", ", padding_idx=0", ", max_norm=None")
            b.put(f"{b.layer(f'nn.Embedding({rows}, {width}{options})')}({name})")
        else:
            layer = b.layer(
                f"nn.EmbeddingBag({rows}, {width}, mode={b.of('sum', 'mean', 'max')!r})"
            )
            b.put(f"{layer}({name})")
        b.read.add(name)


@step()
def recurrent(b: Builder) -> None:
    found = b.fit(3)
    if found and found[1][0] <= 12:
        kind = b.of("LSTM", "GRU", "RNN")
        options = b.of("", ", bidirectional=True", ", num_layers=2", ", bias=False")
        first = b.of(True, False)
        layer = b.layer(f"nn.{kind}({found[1][-1]}, {b.of(4, 5)}, batch_first={first}{options})")
        b.put(f"{layer}({found[0]})[0]")


@step()
def parameter(b: Builder) -> None:
    name = b.value(lambda shape: len(shape) > 1 and isinstance(shape[-1], int))
    if name:
        layer = b.layer(f"nn.Parameter(torch.randn({b.values[name][-1]}))")
        b.put(f"{name} {b.of('+', '*')} {layer}")


@step(2)
def residual(b: Builder) -> None:
    name = b.value(lambda shape: plain(shape) and len(shape) in (2, 3))
    if name:
        size, inner = b.values[name][-1], b.of(8, 4, 17)
        act = b.of("ReLU", "GELU", "SiLU", "Tanh", "Identity")
        layer = b.layer(
            f"nn.Sequential(nn.Linear({size}, {inner}), nn.{act}(), nn.Linear({inner}, {size}))"
        )
        b.put(f"{name} + {layer}({name})")


@step(2)
def in_place(b: Builder) -> None:
    name = b.value(lambda shape: len(shape) > 1)
    if name and name not in b.given and b.owned(name):
        b.do(b.of(*IN_PLACE).replace("{}", name))


@step()
def cut(b: Builder) -> None:
    """A part of a value that later lines change, or that changes it."""
    name = b.value(lambda shape: len(shape) > 1)
    if name and name not in b.given and b.owned(name):
        part = b.put(f"{name}[:, {b.of(':1', '0', '1:')}]")
        if part:
            b.do(
                b.of("{}.mul_(0.5)", "{}.add_(0.25)", "{}.relu_()").replace("{}", b.of(name, part))
            )


@step()
def mixed_batch(b: Builder) -> None:
    """Rows that are not apart."""
    name = b.value(plain)
    if name:
        b.put(
            b.of(
                "{0} - {0}.mean(0, keepdim=True)", "{0}.transpose(0, 1)", "{0}.flatten(0, 1)",
                "{0}.flip(0)", "torch.cat([{0}, {0}], 0)", "{0} + {0}[:1]", "{0}.softmax(0)",
                "{0} * {0}.shape[0]", "{0}.amax(0)", "{0}.repeat_interleave(2, 0)",
            ).format(name)
        )  # fmt: skip


@step()
def attended(b: Builder) -> None:
    """Attention written out."""
    found = b.fit(3)
    if not found:
        return
    size = found[1][-1]
    heads = b.of(1, *(h for h in (2, 4) if size % h == 0))
    q, k, v = (
        b.put(f"{b.layer(f'nn.Linear({size}, {size})')}({found[0]})"
              f".unflatten(-1, ({heads}, -1)).transpose(1, 2)")
        for _ in range(3)
    )  # fmt: skip
    if q and k and v:
        scores = b.put(f"{q} @ {k}.transpose(-1, -2) {b.of('* 0.5', '/ 2.0', '* 0.5 - 1.0')}")
        if scores:
            b.put(f"({scores}.softmax(-1) @ {v}).transpose(1, 2).flatten(2)")


def fits(shape: tuple[int | None, ...], other: tuple[int | None, ...]) -> bool:
    """Whether one is broadcast to the other."""
    pairs = zip(reversed(shape), reversed(other), strict=False)
    return all(a == b or 1 in (a, b) for a, b in pairs)


INPUTS = ((8,), (4, 6), (3, 8, 8), (1, 7, 5), (2, 9), (2, 3, 4, 4), (17,), (5, 16), (4, 1))


@st.composite
def programs(draw: st.DrawFn, most: int = 14) -> Program:
    """Programs of up to ``most`` steps that compute something."""
    shapes = draw(st.lists(st.sampled_from(INPUTS), min_size=1, max_size=2))
    indices = draw(st.sampled_from([0, 0, 0, 11]))
    steps = draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=most))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PyTorch thinks of the lines
        torch.manual_seed(0)  # which lines can be computed may depend on the values
        b = Builder(draw, shapes, indices)
        for each in steps:
            each(b)
        linear(b)  # so that there is something to quantize
        if not b.lines:
            b.put(f"{b.layer(f'nn.Linear({shapes[0][-1]}, 4)')}(x0)")
    return b.program()
