"""A folder a graph: its text after every pass, a picture, the report, the policy and the kernels.

Two dumps of one program are equal byte for byte but for `passes.json`, which holds times, so they can be compared with `diff -r`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import fx

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.passes.printer import print_graph
from fp4compile.passes.record import GraphRecord, PassRecord
from fp4compile.passes.site import input_of, is_backward
from fp4compile.passes.value_names import ValueNames
from fp4compile.report.picture import draw
from fp4compile.report.render import header_lines
from fp4compile.report.report import Report

_OURS = re.compile(r"\d\d-[\w-]+\.py|graph\.(dot|svg)|report\.(md|json)|passes\.json|policy\.toml")
_ABOUT = """# fp4compile dump of graph {id}

This folder holds code, shapes and module names. It holds no weights and no data.

| file | what it shows |
|---|---|
| `00-captured.py`, `01-...py`, ... | the graph as captured and after each pass; `python 00-captured.py` runs it on random inputs |
| `graph.svg`, `graph.dot` | the transformed graph, precision as colour |
| `report.json` | this page as data |
| `passes.json` | what each pass changed, its notes and its time |
| `policy.toml` | the policy as resolved; `options={{"policy": "policy.toml"}}` applies it again |
| `kernels/` | source of the kernels that run it |

![transformed graph](graph.svg)

"""


class DumpFolderUnusable(Fp4CompileError, OSError):
    template = (
        "dump: cannot write {path} ({reason}). A folder that can be created and written is needed; "
        "name another one in options={{'dump': ...}} or FP4COMPILE_DUMP."
    )


class Dump:
    """Writes what the pipeline does to one graph after the other below `folder`. A graph id seen before is written anew.

    Raises `DumpFolderUnusable` where a file cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._names = ValueNames()

    def start(self, graph_id: str, gm: fx.GraphModule, parameters: Mapping[int, str] | None = None) -> None:
        """Begin the folder of a graph. `parameters` names the parameters among its flat inputs by position."""
        self.graph_folder = self.folder / folder_name(graph_id, gm)
        self._names = ValueNames()  # one table a graph: a value has the same name in all of its numbered files
        self._parameters = parameters
        self._gm = gm
        self._clear()
        self._write_graph("00-captured.py", "captured")

    def after_pass(self, index: int, record: PassRecord, gm: fx.GraphModule) -> None:
        self._gm = gm
        title = "\n".join([f"after {record.name} | {record.changed} changed", *record.notes])
        self._write_graph(f"{index:02}-{_safe(record.name)}.py", title)

    def write_kernel(self, file: str, source: str) -> None:
        """`file` is a name with its ending, as in `quantize.py`."""
        self._write(f"kernels/{file}", source)

    def finish(self, record: GraphRecord, policy_text: str) -> None:
        record.dump = str(self.graph_folder)
        report = Report(graphs=(record,))
        first, *rest = header_lines(record, stable=True)
        fallbacks = frozenset((row.name, row.role) for row in record.sites if row.fallback)
        drawing = draw(self._gm, title=first, subtitle=rest[:2], fallbacks=fallbacks, parameters=self._parameters)
        self._write("graph.dot", drawing.dot)
        self._write("graph.svg", drawing.svg)
        self._write("report.md", _ABOUT.format(id=record.id) + report.to_markdown(stable=True))
        self._write("report.json", report.to_json(stable=True) + "\n")
        self._write("passes.json", json.dumps([asdict(p) for p in record.passes], indent=2) + "\n")
        self._write("policy.toml", policy_text)

    def _write_graph(self, name: str, title: str) -> None:
        self._write(name, print_graph(self._gm, title=title, names=self._names, parameters=self._parameters, runs_alone=True))

    def _clear(self) -> None:
        """An earlier dump may have had other passes; nothing of it may stay behind, and nothing else may go."""
        for file in [*self.graph_folder.glob("*"), *self.graph_folder.glob("kernels/*")]:
            if _OURS.fullmatch(file.name) or file.parent.name == "kernels":
                file.unlink()

    def _write(self, name: str, text: str) -> None:
        path = self.graph_folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise DumpFolderUnusable(path=path, reason=error.strerror or error) from error


def folder_name(graph_id: str, gm: fx.GraphModule) -> str:
    """`graph_0_1_training` for the joint graph of compile id 0/1; with `_rank2` in the third process of several.

    The branches of a `torch.cond` and the like are handed to the passes before the graph around them, under the same id. They are known by
    inputs that are none of Dynamo's, and told apart by what they compute: `graph_0_1_inference_branch_3fa9c1`.
    """
    kind = "training" if any(is_backward(n) for n in gm.graph.nodes) else "inference"
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    rank = f"_rank{torch.distributed.get_rank()}" if distributed else ""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    is_branch = bool(inputs) and all(input_of(n) is None for n in inputs)
    branch = f"_branch_{hashlib.sha256(print_graph(gm).encode()).hexdigest()[:6]}" if is_branch else ""
    return f"graph_{_safe(graph_id)}_{kind}{branch}{rank}"


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_") or "unnamed"
