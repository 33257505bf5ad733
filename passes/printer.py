"""An FX graph as Python text that a person can read, a shell can run and `diff` can compare.

`GraphModule.print_readable` shows source paths of the user's machine and fx's own names, which shift when a pass inserts a node. Here
names come from operation and order, nothing of the machine is shown, and `exec` of the text gives a function `graph` that computes
what the graph does.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any, Final

import torch
from torch import fx

from fp4compile.passes.literals import argument_names, function_import, function_text, hint_of, is_literal, literal, short_type
from fp4compile.passes.module_path import module_of
from fp4compile.passes.site import constant_of, is_backward, kernel_of, plan_of, site_of
from fp4compile.passes.value_names import ValueNames, is_result_of_tuple, parameter_names

_WIDTH: Final = 140
_SAMPLE: Final = '''

def sample(dtype, shape, stride, device):
    """Random numbers, zeros for integers and 8-bit floats: this file holds shapes and no values of the model."""
    x = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    if dtype.is_complex or dtype.is_floating_point and dtype.itemsize > 1:
        return x.normal_()
    (x.view(torch.uint8) if dtype.itemsize == 1 else x).zero_()
    return x
'''


def print_graph(
    gm: fx.GraphModule,
    *,
    title: str = "",
    names: ValueNames | None = None,
    parameters: Mapping[int, str] | None = None,
    runs_alone: bool = False,
) -> str:
    """Text of a module with a function `graph`, whose parameters are the flat inputs of the aten graph `gm`, then its constants.

    `title` becomes the first lines, and `constants_of` gives the values of the constants. `names` keeps names steady over several prints
    of one graph. `parameters` names the parameters among the flat inputs by position. With `runs_alone` the text also makes inputs of the
    recorded shapes and runs itself as a script.
    """
    return _Printer(gm, names or ValueNames(), parameter_names(gm.graph, parameters)).text(title, runs_alone)


def constants_of(gm: fx.GraphModule) -> list[Any]:
    """Values of the constant parameters of the printed graph, in order: attributes of `gm`, and arguments that no text can spell."""
    return list(dict(_constants(gm)).values())


class _Printer:
    def __init__(self, gm: fx.GraphModule, names: ValueNames, parameters: Mapping[fx.Node, str]) -> None:
        self.gm = gm
        self.names = names
        self.constants = dict(_constants(gm))
        self.parameters = parameters
        self.imports = {"import torch"}

    def text(self, title: str, runs_alone: bool) -> str:
        inputs = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        parameters = [f"    {self.names.of(n)},{self._comment(n)}" for n in inputs]
        parameters += [f"    {self.names.of_constant(k)},  # {short_type(v)}, constant" for k, v in self.constants.items()]
        body = self._body(self.gm, "    ")
        lines = [f"# {line}" for line in title.splitlines()]
        lines += [f"# {_census(self.gm.graph)}", *sorted(self.imports, key=lambda i: (i.startswith("#"), i)), "", ""]
        lines += ["def graph(", *parameters, "):"] if parameters else ["def graph():"]
        text = "\n".join(lines + body) + "\n"
        return text + _SAMPLE + self._main(inputs) if runs_alone else text

    def _body(self, gm: fx.GraphModule, indent: str) -> list[str]:
        nodes = [n for n in gm.graph.nodes if n.op != "placeholder"]
        training = any(is_backward(n) for n in nodes)
        lines: list[str] = []
        previous = ""
        for place, group in groupby(zip(nodes, _places(nodes), strict=True), key=lambda pair: pair[1]):
            run = [node for node, _ in group]
            heading = _heading(*place, training, run)
            if heading and heading != previous and run[0].op != "output":
                lines.append(f"{indent}# {heading}")
                previous = heading
            for node in run:
                lines += self._statement(gm, node, indent)
        return lines

    def _statement(self, gm: fx.GraphModule, node: fx.Node, indent: str) -> list[str]:
        if node.op == "output":
            return self._return(node.args[0], indent)
        if node.op == "get_attr":
            return self._get_attr(gm, node, indent)
        comment = self._comment(node)
        line = f"{indent}{self.names.of(node)} = "
        if is_result_of_tuple(node):
            return [f"{line}{self._literal(node.args[0])}[{node.args[1]}]{comment}"]
        function, arguments = self._call(node)
        whole = f"{line}{function}({', '.join(arguments)}){comment}"
        if len(whole) <= _WIDTH:
            return [whole]
        return [f"{line}{function}(", *_filled(arguments, indent + "    "), f"{indent}){comment}"]

    def _call(self, node: fx.Node) -> tuple[str, list[str]]:
        target = node.target
        keywords = self._keywords(node.kwargs)
        if node.op == "call_method":
            receiver, *arguments = map(self._literal, node.args)
            return f"{receiver}.{target}", arguments + keywords
        self._import(target)
        named = argument_names(target) if str(target).startswith("fp4.") else []
        # A row of bare strings and numbers says nothing. The fp4 schemas start with tensors, which read well without names.
        first_plain = next((i for i, a in enumerate(node.args) if not isinstance(a, fx.Node)), len(node.args))
        arguments = [f"{named[i]}={self._literal(a)}" if named and i >= first_plain else self._literal(a) for i, a in enumerate(node.args)]
        return function_text(target), arguments + keywords

    def _keywords(self, kwargs: Mapping[str, Any]) -> list[str]:
        # `from` is an argument of aten operators and a keyword of Python.
        return [f"**{{{k!r}: {self._literal(v)}}}" if keyword.iskeyword(k) else f"{k}={self._literal(v)}" for k, v in kwargs.items()]

    def _get_attr(self, gm: fx.GraphModule, node: fx.Node, indent: str) -> list[str]:
        value = _attribute(gm, node.target)
        name = self.names.of(node)
        if not isinstance(value, fx.GraphModule):
            return [f"{indent}{name} = {self.names.of_constant(id(value))}"]
        inputs = ", ".join(self.names.of(n) for n in value.graph.nodes if n.op == "placeholder")
        return ["", f"{indent}def {name}({inputs}):", *self._body(value, indent + "    "), ""]

    def _return(self, value: Any, indent: str) -> list[str]:
        if not isinstance(value, (tuple, list)) or len(value) < 4:
            return [f"{indent}return {self._literal(value)}"]
        opening, closing = "()" if isinstance(value, tuple) else "[]"
        return [f"{indent}return {opening}", *(f"{indent}    {self._literal(v)}," for v in value), f"{indent}{closing}"]

    def _comment(self, node: fx.Node) -> str:
        plan, kernel = plan_of(node), kernel_of(node)
        facts = [
            short_type(node.meta.get("val")),
            self.parameters.get(node, ""),
            f"plan: {plan.precision} ({plan.rule})" if plan is not None and not str(node.target).startswith("fp4.") else "",
            f"kernel {kernel}" if kernel else "",
            "kept in the weight store" if constant_of(node) is not None else "",
        ]
        about = ", ".join(f for f in facts if f)
        return f"  # {about}" if about else ""

    def _literal(self, value: Any) -> str:
        for function in _functions(value):
            self._import(function)
        return literal(value, lambda v: self.names.of(v) if isinstance(v, fx.Node) else self.names.of_constant(id(v)))

    def _import(self, function: Any) -> None:
        needed = function_import(function)
        if needed:
            self.imports.add(needed)

    def _main(self, inputs: list[fx.Node]) -> str:
        values = [f"        {_sample_text(n.meta.get('val'))},  # {self.names.of(n)}" for n in inputs]
        values += [f"        {_sample_text(v)},  # {self.names.of_constant(k)}" for k, v in self.constants.items()]
        lines = ["", "", "def example_inputs():", "    return [", *values, "    ]", "", ""]
        return "\n".join([*lines, 'if __name__ == "__main__":', "    print(graph(*example_inputs()))"]) + "\n"


def _filled(arguments: list[str], indent: str) -> list[str]:
    """Arguments on as few lines as the width allows."""
    lines = [indent + arguments[0] + ","]
    for argument in arguments[1:]:
        if len(lines[-1]) + len(argument) + 2 > _WIDTH:
            lines.append(indent + argument + ",")
        else:
            lines[-1] += f" {argument},"
    return lines


def _census(graph: fx.Graph) -> str:
    operations = [n for n in graph.nodes if n.op.startswith("call_") and not is_result_of_tuple(n)]
    inputs = sum(n.op == "placeholder" for n in graph.nodes)
    fp4 = sum(str(n.target).startswith("fp4.") for n in operations)
    return f"{inputs} inputs, {len(operations)} operations, {fp4} of them fp4"


def _places(nodes: list[fx.Node]) -> list[tuple[str, bool]]:
    """(module path, backward) of each node. A node that no module claims stands where the one before it stood."""
    places: list[tuple[str, bool]] = []
    for node in nodes:
        path, backward = module_of(node)[0], is_backward(node)
        if not path and places and (places[-1][1] == backward or node.op == "output"):
            path, backward = places[-1]
        places.append((path, backward))
    return places


def _heading(path: str, backward: bool, training: bool, run: list[fx.Node]) -> str:
    """`backward | model.layers.0.mlp.up_proj | dgrad wgrad`: direction in training graphs, module path, roles of the matmuls there."""
    roles = dict.fromkeys(str(site.role) for n in run if (site := site_of(n)) is not None)
    direction = ("backward" if backward else "forward") if training else ""
    return " | ".join(part for part in (direction, path, " ".join(roles)) if part)


def _constants(gm: fx.GraphModule) -> Iterator[tuple[int, Any]]:
    """(identity, value) of every constant of a graph and of the graphs inside it."""
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value = _attribute(gm, node.target)
            if isinstance(value, fx.GraphModule):
                yield from _constants(value)
            else:
                yield id(value), value
        for value in _leaves([node.args, node.kwargs]):
            if not is_literal(value):
                yield id(value), value


def _functions(value: Any) -> Iterator[Any]:
    return (v for v in _leaves(value) if callable(v) and not isinstance(v, fx.Node) and is_literal(v))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for v in value:
            yield from _leaves(v)
    elif isinstance(value, Mapping):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _attribute(gm: fx.GraphModule, target: Any) -> Any:
    value: Any = gm
    for part in str(target).split("."):
        value = getattr(value, part)
    return value


def _sample_text(value: Any) -> str:
    """An expression that makes an input like `value`; sizes are those seen at compilation."""
    if isinstance(value, torch.Tensor):
        shape, stride = ([hint_of(s) for s in sizes] for sizes in (value.shape, value.stride()))
        return f"sample({value.dtype}, {shape}, {stride}, '{value.device}')"
    if isinstance(value, (torch.SymInt, int)):
        return str(hint_of(value))
    return "None"
