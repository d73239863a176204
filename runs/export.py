"""foveal export: what a run has learned as one ONNX file, which other programs run without foveal or torch.

Before a file is kept, onnxruntime runs it on random valid inputs, in batches of several sizes, beside what
the library itself answers. The graph is written by PyTorch's tracing exporter: that takes a tenth of a second
where the newer one takes four, and asks for two packages less. What tracing may get wrong, such as a size
that became a constant, the check finds.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from gymnasium import spaces

from ..agents import RAM, Agent, load
from ..vision import Model, find_weights, read_weights, space_to_json
from .fit import MODELS
from .graphs import Arrays, Graph, Input, make_graph
from .origin import sha256
from .run import open_run

OPSET = 17
"""The first that has layer normalisation."""
BATCHES = (1, 3, 28)
"""Rows of the inputs that a file is checked with, a call each; it is written with two."""
STEPS = 4
"""Of a part with memory: calls in a row, each with the state that the last one gave."""
FORMAT = 1
"""Of the description in a file's metadata."""


@dataclass(frozen=True)
class Export:
    """Write what a run has learned as one ONNX file, checked against the library itself."""

    run: tyro.conf.Positional[Path]
    """Run folder, checkpoint folder or weights file."""
    onnx: bool = True
    """As ONNX, which is the one format there is."""
    part: Literal["auto", "policy", "classifier", "encoder", "decoder", "generator"] = "auto"
    """What of it: an agent's policy or encoder, a classifier or its encoder, a VAE's or autoencoder's decoder
    or encoder, a GAN's generator. auto is the first of them."""
    out: Path | None = None
    """The file; by default PART.onnx in the run folder, or beside a weights file that lies in none."""
    tolerance: float = 1e-4
    """Largest difference from the library's answer that is taken, as a share of an output's largest value, or
    of 1 where that is less."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own that the run's environment or encoder comes from; a file alone imports nothing."""

    def __post_init__(self) -> None:
        if not self.onnx:
            raise ValueError("onnx is the one format there is")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must be 0 or more, got {self.tolerance}")


def export(given: Export) -> int:
    file = find_weights(given.run)
    trained = load_trained(file)
    graph, part = make_graph(trained, given.part)
    out = given.out or default_folder(file) / f"{part}.onnx"
    if out.is_dir():
        raise ValueError(f"out takes a file, {out} is a folder")
    about = describe(file, trained, part, graph)
    differences = write_onnx(graph, out, about, given.tolerance)
    what = about["dataset"] if isinstance(trained, Model) else about["env_id"]
    print(f"{part} of {trained.name} on {what}, weights of step {trained.step:,}")
    for side in ("inputs", "outputs"):
        for value in about[side]:
            shape = ", ".join(["batch", *map(str, value["shape"])])
            print(f"  {side[:-1]:<6}  {value['name']:<14} {value['dtype']} ({shape}): {value['about']}")
    rows = sum(BATCHES) * (STEPS if graph.memory else 1)
    print(f"onnxruntime beside foveal, {rows} random inputs in batches of {', '.join(map(str, BATCHES))}:")
    for name, difference in differences.items():
        print(f"  {name:<14} differs by at most {difference:.2g}")
    print(f"file: {out} ({out.stat().st_size / 1e6:.2f} MB)")
    return 0


def load_trained(file: Path) -> Agent | Model:
    """The agent or model of a weights file, on the CPU."""
    name = read_weights(file)[1].get("model")
    if name in MODELS and name != RAM.name:
        return MODELS[name].load(file, device="cpu")
    return load(file, device="cpu")


def default_folder(file: Path) -> Path:
    try:
        return open_run(file).path
    except ValueError:
        return file.parent


def describe(file: Path, trained: Agent | Model, part: str, graph: Graph) -> dict[str, Any]:
    """What a file says of itself, JSON-able: whose weights, of what step and score, and the graph's values;
    the outputs' types and shapes are those that a call gives."""
    example = draw(graph.inputs, 2, np.random.default_rng(0))
    outputs = dict(zip(graph.outputs, run_module(graph, example)))
    about: dict[str, Any] = {
        "format": FORMAT,
        "foveal": metadata.version("foveal"),
        "part": part,
        "agent" if isinstance(trained, Agent) else "model": trained.name,
        "step": trained.step,
        "sha256_of_weights": sha256(file),
        "inputs": [
            {
                "name": each.name,
                "dtype": str(example[each.name].dtype),
                "shape": list(example[each.name].shape[1:]),
                "space": space_to_json(each.space),
                "about": each.about,
            }
            for each in graph.inputs
        ],
        "outputs": [
            {"name": name, "dtype": str(array.dtype), "shape": list(array.shape[1:]), "about": what}
            for (name, array), what in zip(outputs.items(), graph.outputs.values())
        ],
    }
    if isinstance(trained, Agent):
        about |= {"env_id": trained.env_spec()["env_id"], "action_space": space_to_json(trained.action_space)}
    else:
        about |= {"dataset": None, "classes": list(trained.classes)}
    try:
        run = open_run(file)
    except ValueError:
        return about
    if not isinstance(trained, Agent):
        about["dataset"] = run.config.get("dataset", {}).get("name")
    scores = {k: v for k, v in run.summary.items() if k.startswith(("eval/", "test/"))}
    return about | {"run": {key: run.config["run"][key] for key in ("id", "group", "name")}, "score": scores}


def write_onnx(graph: Graph, out: Path, about: Mapping[str, Any], tolerance: float) -> dict[str, float]:
    """Write a graph with its description to one ONNX file, once it has been checked: whole or not at all.

    Returns each output's largest difference from the library's answer. Raises ValueError where the extra is
    not installed, or the file does not give what the library gives.
    """
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"foveal export needs {package}: pip install 'foveal[export]'")
    import onnx

    model = onnx.load_model_from_string(trace(graph))
    model.producer_name, model.producer_version = "foveal", metadata.version("foveal")
    model.metadata_props.add(key="foveal", value=json.dumps(about))
    model.doc_string = "\n".join(
        f"{side[:-1]} {value['name']}: {value['dtype']} (batch, ...{value['shape']}), {value['about']}"
        for side in ("inputs", "outputs")
        for value in about[side]
    )
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    differences = check(content, graph, tolerance)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(out)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {out}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return differences


def expm1(g: Any, x: Any) -> Any:
    """exp(x) - 1 of the operators that ONNX has, as exact near 0: 2 exp(x / 2) sinh(x / 2)."""
    half = g.op("Mul", x, g.op("Constant", value_t=torch.tensor(0.5)))
    product = g.op("Mul", g.op("Exp", half), g.op("Sinh", half))
    return g.op("Add", product, product)


def trace(graph: Graph) -> bytes:
    """The graph as ONNX; the first axis of every input and output is named batch."""
    inputs = draw(graph.inputs, 2, np.random.default_rng(1))
    torch.onnx.register_custom_op_symbolic("aten::expm1", expm1, OPSET)  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    names = [each.name for each in graph.inputs]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of every Python number; the exporter, of its age
        try:
            torch.onnx.export(
                graph.module.eval(),
                tuple(torch.as_tensor(inputs[name]) for name in names),
                buffer,  # type: ignore[arg-type]
                input_names=names,
                output_names=list(graph.outputs),
                dynamic_axes={name: {0: "batch"} for name in (*names, *graph.outputs)},
                opset_version=OPSET,
                dynamo=False,
            )
        except torch.onnx.errors.UnsupportedOperatorError as error:
            raise ValueError(f"not exported: {str(error).splitlines()[0]}") from error
    return buffer.getvalue()


def check(content: bytes, graph: Graph, tolerance: float) -> dict[str, float]:
    """Largest difference of each output from the library's answer, and, where that has no call for it, from
    the graph's in torch; of whole numbers the share of rows that differ.

    ValueError where one is larger than `tolerance`, or whole numbers differ at all.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(2)
    differences = dict.fromkeys(graph.outputs, 0.0)
    for batch in BATCHES:
        state = None
        for _ in range(STEPS if graph.memory else 1):
            given = draw(graph.inputs, batch, rng)
            if state is not None:
                given["state"] = state
            found = dict(zip(graph.outputs, session.run(None, given)))
            wanted = dict(zip(graph.outputs, run_module(graph, given))) | graph.answer(given)
            for name, right in wanted.items():
                here = found[name]
                if here.shape != right.shape or here.dtype != right.dtype:
                    raise ValueError(
                        f"{name} came out of onnxruntime as {here.dtype} {here.shape}, "
                        f"and is {right.dtype} {right.shape} here: not written"
                    )
                differences[name] = max(differences[name], difference(here, right))
            state = found.get("next_state")
    for name, found_difference in differences.items():
        limit = 0.0 if wanted[name].dtype.kind in "iub" else tolerance
        if not found_difference <= limit:
            raise ValueError(
                f"{name} differs from foveal's answer by {found_difference:.2g}, more than {limit:g}; "
                "nothing was written"
            )
    return differences


def difference(here: np.ndarray, right: np.ndarray) -> float:
    if right.dtype.kind in "iub":
        return float((here != right).mean())
    scale = max(1.0, float(np.abs(right).max(initial=0)))
    return float(np.abs(here.astype(np.float64) - right).max(initial=0)) / scale


def run_module(graph: Graph, given: Arrays) -> list[np.ndarray]:
    with torch.no_grad():
        tensors = (torch.as_tensor(given[each.name]) for each in graph.inputs)
        return [out.numpy() for out in graph.module.eval()(*tensors)]


def draw(inputs: tuple[Input, ...], batch: int, rng: np.random.Generator) -> Arrays:
    """Random valid inputs, (batch, ...) each: uniform in bounds, normal where there are none to speak of."""
    return {each.name: draw_space(each.space, batch, rng) for each in inputs}


def draw_space(space: spaces.Space, batch: int, rng: np.random.Generator) -> np.ndarray:
    match space:
        case spaces.Discrete():
            return rng.integers(space.start, space.start + space.n, batch).astype(np.int64)
        case spaces.MultiDiscrete():
            values = rng.integers(space.start, space.start + space.nvec, (batch, *space.nvec.shape))
            return values.astype(space.dtype)
        case spaces.MultiBinary():
            bits = rng.integers(2, size=(batch, *space.shape))
            return bits.astype(bool if space.shape == () else space.dtype)
        case spaces.Box() if np.issubdtype(space.dtype, np.integer):
            low, high = space.low.astype(np.int64), space.high.astype(np.int64)
            return rng.integers(low, high + 1, (batch, *space.shape)).astype(space.dtype)
        case spaces.Box():
            wide = ~(np.isfinite(space.low) & np.isfinite(space.high) & (space.high - space.low < 1e6))
            low, high = np.where(wide, -1.0, space.low), np.where(wide, 1.0, space.high)
            drawn = rng.uniform(low, high, (batch, *space.shape))
            drawn = np.where(wide, rng.normal(size=drawn.shape), drawn)
            return np.clip(drawn, space.low, space.high).astype(space.dtype)
    raise ValueError(f"observations of {space} cannot be drawn")
