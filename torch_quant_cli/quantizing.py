"""``torch-quant quantize``: from a float model and a file of data to a folder that runs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torch_quant_cli.artifact import check_out, write_artifact
from torch_quant_cli.data import batches, check_data, inputs_of, shapes
from torch_quant_cli.distances import Distance, distance
from torch_quant_cli.exits import SHORT, Failed
from torch_quant_cli.models import Source, float_model, source_of
from torch_quant_cli.options import data_options, folder_of, reading_of
from torch_quant_cli.resuming import checked_unfinished
from torch_quant_cli.running import Result, bar, command, wrapped
from torch_quant_cli.settings import quantizer_of, settings_options, wants_rounding

if TYPE_CHECKING:
    from torch import nn

    from torch_quant import Quantizer

__all__ = ["cli"]

_WRITTEN, _PROMPT, _NEW = 2, 32, 4
"""Of models that write: batches to write behind, the tokens of them, and those that are written."""
_HELD_OUT = 4
"""Batches behind those that calibrate, to compare the outputs on."""


@click.command(
    "quantize",
    short_help="Quantize a model; write a folder that loads and runs.",
)
@click.argument("model")
@data_options(128)
@click.option("--factory", help="The function that makes the model: package.module:function.")
@settings_options
@click.option("--backend", help="Where it will run; 'fastest' measures.  [default: the best here]")
@click.option(
    "--fallback",
    type=click.IntRange(min=0),
    metavar="N",
    help="Take the N most sensitive layers back to float.",
)
@click.option(
    "--min-sqnr",
    type=float,
    metavar="DB",
    help="Take as few layers back to float as give this SQNR of the outputs.",
)
@click.option(
    "--never-slower", is_flag=True, help="Measure, and take back to float what is slower quantized."
)
@click.option("--out", required=True, help="The folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier result at --out.")
@click.option("--no-example", is_flag=True, help="Keep no batch of the data in the folder.")
@command
def cli(**given: Any) -> Result:
    """Quantize MODEL and write a folder that loads, runs, and can be exported.

    MODEL is a Hugging Face folder; a .pt2 of torch.export; weights (.safetensors) with --factory;
    or package.module:function, which makes a model that has its weights.

    A run that rounds weights block by block (method=gptq, awq ... with weights alone) and is
    interrupted goes on where it was when the same command is given again.

    \b
    Examples:
      torch-quant quantize my-bert --data texts.txt --out my-bert-int8
      torch-quant quantize my-bert --data texts.txt --fallback 3 --out my-bert-mixed
      torch-quant quantize my-llm --recipe int8_weight_only --out my-llm-int8
      torch-quant quantize my-llm --recipe int4_weight_only -o group_size=32 -o method=gptq \\
          --data texts.txt --out my-llm-int4
      torch-quant quantize net:make --data inputs.npz --config q.yaml --out net-int8
    """
    how = reading_of(given)
    out = check_out(given["out"], given["overwrite"])
    source = source_of(given["model"], given["factory"])
    if given["data"] is not None:
        check_data(given["data"])
    quantizer = quantizer_of(given)
    measured = given["backend"] == "fastest"
    unfinished = checked_unfinished(out) if wants_rounding(quantizer) else None
    model = float_model(source)
    folder = folder_of(source.path) if source.kind == "folder" else None
    found: list[Any] = []
    if given["data"] is not None:
        size = how.batch_size or 8
        more = {"samples": how.samples + _HELD_OUT * size, "cut": how.samples}
        found = batches(given["data"], model, folder, type(how)(**{**vars(how), **more}))
    run = _Run(quantizer, model, given, found, how.samples)
    quant_model = run.quantized(unfinished, measured)
    about = run.about(quant_model)
    example = None if given["no_example"] else run.example
    write_artifact(out, quantizer, quant_model, source, about, example)
    if unfinished is not None:  # of this run, which has put all of it into the folder
        shutil.rmtree(unfinished, ignore_errors=True)
    return _result(Path(given["out"]), source, about, given, run.distance)


class _Run:
    """One model on its way through calibration, fallback and lowering.

    Args:
        quantizer: has the settings.
        model: the float one.
        given: the options of the command.
        found: batches of the data; those behind the first ``samples`` samples are held out.
        samples: how many calibrate.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        model: nn.Module,
        given: Mapping[str, Any],
        found: list[Any],
        samples: int,
    ) -> None:
        self.quantizer, self.model, self.given = quantizer, model, given
        self.fallen: list[str] = []
        self.distance: Distance | None = None
        count, seen = 0, 0
        while count < len(found) and seen < samples:
            seen += _rows(found[count])
            count += 1
        self.batches, held_out = found[:count], found[count:]
        self.compared = (held_out or self.batches)[:_HELD_OUT]
        self.held_out = bool(held_out)
        self.samples = seen

    @property
    def example(self) -> Any:
        """A call of the model."""
        return self.batches[0] if self.batches else self._made_up()

    def _made_up(self) -> Any:
        """Inputs for recipes without data: what captures the model need not be typical."""
        from torch_quant.checkpoints.loading import example_of

        if not hasattr(self.model, "config"):
            raise Failed(
                "one sample is needed to see how the model is called: give --data, of any size"
            )
        return example_of(self.model)

    def quantized(self, unfinished: Path | None, fastest: bool) -> nn.Module:
        """Calibrate or round, let the worst fall back, quantize."""
        quantizer, given = self.quantizer, self.given
        self._check_first()
        if unfinished is not None:
            self._needs("rounding weights with data (method=...)")
            click.get_current_context().find_root().meta["interrupted"] = (
                f"finished blocks are in {unfinished}, and the same command goes on from there"
            )
            quantizer.round_weights(self.model, self.batches, folder=unfinished)
        elif quantizer.qconfig.needs_ranges:
            self._needs("calibration finds the ranges of activations, so it")
            calib_model = quantizer.calib(self.model)
            self._through(calib_model, "calibrating")
            self._write(calib_model)
            asked = [x for x in (quantizer.qconfig, *quantizer.overrides.values()) if x is not None]
            if any(x.method is not None and x.method.wants_blocks for x in asked):
                quantizer.round_weights(self.model, self.batches)
        count, target = given["fallback"], given["min_sqnr"]
        if count and target is not None:
            raise Failed("--fallback and --min-sqnr both say what falls back: give one of them")
        if count or target is not None:
            self._needs("measuring what each layer costs")
            amp_model = quantizer.amp(self.model, example_inputs=self.example)
            self._through(amp_model, "measuring sensitivity")
            self.fallen = quantizer.fallback(amp_model, num=count, min_sqnr=target)
        return quantizer.quantize(
            self.model,
            backend="fastest" if fastest else None,
            example_inputs=self.example,
            never_slower=given["never_slower"],
        )

    def _needs(self, what: str) -> None:
        if not self.batches:
            raise Failed(
                f"{what} needs data: give --data, some hundred samples. Without data: --recipe "
                "int8_dynamic, int8_weight_only or int4_weight_only"
            )

    def _check_first(self) -> None:
        """Run the float model once, so that what does not fit is said before any work."""
        if self.batches:
            self._call(self.model, self.batches[0], 0)

    def _through(self, proxy: nn.Module, what: str) -> None:
        for number, each in enumerate(bar(self.batches, what, "batch")):
            self._call(proxy, each, number)

    def _write(self, proxy: Any) -> None:
        """Have a model that writes text do so: it calls its parts, and with a cache."""
        able: Any = getattr(self.model, "can_generate", None)
        if not (callable(able) and able()):
            return
        for each in bar(self.batches[:_WRITTEN], "calibrating generate()", "batch"):
            ids = each.get("input_ids") if isinstance(each, Mapping) else None
            if ids is not None:
                ids = ids[:, :_PROMPT]
                mask = each.get("attention_mask", ids * 0 + 1)[:, :_PROMPT]
                options = {"max_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0}
                proxy.generate(ids, attention_mask=mask, **options)

    def _call(self, model: nn.Module, inputs: Any, number: int) -> Any:
        from torch import Tensor

        from torch_quant.errors import QuantError
        from torch_quant.graph.examples import call_example
        from torch_quant.graph.reasons import about_images

        try:
            return call_example(model, inputs)
        except (QuantError, KeyboardInterrupt):
            raise
        except Exception as error:
            names = ", ".join(inputs_of(self.model)[0])
            given = inputs.items() if isinstance(inputs, Mapping) else [("x", inputs)]
            named = [(name, x) for name, x in given if isinstance(x, Tensor)]
            first = (str(error).strip().splitlines() or [""])[0][:200]
            raise Failed(
                f"the model does not take batch {number} of --data {self.given['data']} "
                f"({shapes(inputs)}): {type(error).__name__}: {first}. Its inputs are {names}: "
                "give arrays of their shapes and under their names"
                f"{about_images(named)}"
            ) from error

    def about(self, quant_model: nn.Module) -> dict[str, Any]:
        """What is to be known of the result."""
        from torch_quant.convert.quantized import plan_of
        from torch_quant.core.metrics import float_leaves
        from torch_quant.graph.examples import call_example

        quantizer, plan = self.quantizer, plan_of(quant_model)  # type: ignore[arg-type]
        outputs: dict[str, Any] | None = None
        if self.compared:
            pairs = [
                (call_example(self.model, each), call_example(quant_model, each))
                for each in bar(self.compared, "comparing outputs", "batch")
            ]
            self.distance = distance([(float_leaves(a), float_leaves(b)) for a, b in pairs])
            outputs = self.distance.to_dict()
            outputs["held_out"] = self.held_out
            outputs["batches"] = len(pairs)
        return {
            "recipe": self.given["recipe"] or ("(--config)" if self.given["config"] else None),
            "backend": quant_model.quantization.backend,  # type: ignore[union-attr]
            "settings": quantizer.to_config(),
            "data": self.given["data"],
            "samples": self.samples,
            "coverage": plan.coverage,
            "summary": plan.summary,
            "sites": len(plan),
            "quantized": len(plan.quantized),
            "fallen_back": dict(quantizer.fallen_back),
            "slower": sorted({x for sites in quantizer.slower.values() for x in sites}),
            "bytes": {"float": _bytes(self.model), "quantized": _bytes(quant_model)},
            "outputs": outputs,
        }


def _rows(inputs: Any) -> int:
    from torch import Tensor
    from torch.utils import _pytree as pytree

    sizes = [x.shape[0] for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()]
    return max(sizes[0], 1) if sizes else 1


def _bytes(model: nn.Module) -> int:
    tensors = {id(x): x for x in model.state_dict().values() if hasattr(x, "numel")}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def _listed(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _count(batches: int) -> str:
    return "1 batch" if batches == 1 else f"{batches} batches"


def _result(
    out: Path,
    source: Source,
    about: dict[str, Any],
    given: Mapping[str, Any],
    found: Distance | None,
) -> Result:
    size = sum(each.stat().st_size for each in out.iterdir() if each.name.startswith("tensors-"))
    before, after = (about["bytes"][x] for x in ("float", "quantized"))
    lines = [
        wrapped(f"{source.shown} on {about['backend']}: {about['summary']}", "  "),
        f"weights: {before / 1e6:.1f} MB in float, {after / 1e6:.1f} MB quantized "
        f"({after / max(before, 1):.1%})",
    ]
    outputs, code = about["outputs"], 0
    if outputs and found is not None:
        where = "that calibration did not see" if outputs["held_out"] else "of the calibration"
        lines.append(f"outputs against float, {_count(outputs['batches'])} {where}: {found.shown}")
        goal = given["min_sqnr"]
        if not found.reaches(goal):
            code = SHORT
            lines.append(f"--min-sqnr {goal:g} is not reached")
    if about["fallen_back"]:
        lines.append(wrapped(f"back in float: {_listed([*about['fallen_back']])}", "  "))
    if about["slower"]:
        lines.append(wrapped(f"faster in float: {_listed(about['slower'])}", "  "))
    lines += [
        f"wrote {out} ({size / 1e6:.1f} MB of tensors)",
        "",
        f"  torch-quant inspect {out}   what is in float, and why",
        f"  torch-quant bench {out}     how fast it is here",
    ]
    return Result("\n".join(lines), {"out": str(out), "model": source.to_dict(), **about}, code)
