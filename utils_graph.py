"""CUDA graphs: a function that launches hundreds of kernels, recorded once and from then on launched as one."""

import sys
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor


class CudaGraph:
    """A function without arguments, recorded as a CUDA graph: one launch instead of hundreds.

    The first calls run it as it is, and so settle whatever libraries choose or allocate at first. After them it
    `is_due` to `record`, and from then on calls replay the record. It must not wait for the device, and every tensor
    that it reads or writes must stay where it is; what it returns is overwritten by the next call. `generators` are
    those it draws from. All this happens on the current device.
    """

    WARM_UP = 3

    def __init__(self, function: Callable[[], Tensor], generators: Iterable[torch.Generator] = ()):
        self._function, self._generators = function, tuple(generators)
        self._stream = torch.cuda.Stream()  # the default one cannot be recorded
        self._calls, self._graph = 0, None

    def __call__(self) -> Tensor:
        if self._graph is not None:
            self._graph.replay()
            return self._result
        self._calls += 1
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._function()
        current.wait_stream(self._stream)
        result.record_stream(current)
        return result

    @property
    def is_due(self) -> bool:
        """Whether it has run often enough to be recorded."""
        return self._graph is None and self._calls >= self.WARM_UP

    def record(self) -> None:
        """Record the function, without running it. Raises RuntimeError where that is impossible."""
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        # Recording registers the default one by itself.
        generators = (*self._generators, torch.cuda.default_generators[torch.cuda.current_device()])
        states = [generator.get_state() for generator in generators]
        try:
            # The outer context brings the current stream back also when the end of a failed recording raises.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=self._stream):
                self._result = self._function()
        except RuntimeError:
            for generator, state in zip(generators, states, strict=True):  # before torch 2.13 they stay in it
                fresh = torch.Generator(generator.device)
                fresh.set_state(state)
                generator.graphsafe_set_state(fresh.graphsafe_get_state())
            raise
        self._graph = graph
        self._function = None  # it often belongs to the owner of this object, and the two would keep each other alive


class Graphs:
    """Functions as CUDA graphs, each known by its key. Where recording one fails it says so, and all go on without.

    They are `in_use` if they are wanted and `device` is a GPU; else a function is simply called.
    """

    def __init__(self, device: torch.device, wanted: bool = True):
        self.device, self.in_use = device, wanted and device.type == "cuda"
        self._graphs: dict[Hashable, CudaGraph] = {}

    def __call__(
        self, key: Hashable, function: Callable[[], Tensor], generators: Iterable[torch.Generator] = ()
    ) -> Tensor:
        """Call `function`, or the graph it has become; the same key means the same function."""
        if not self.in_use:
            return function()
        with torch.cuda.device(self.device):
            if key not in self._graphs:
                self._graphs[key] = CudaGraph(function, generators)
            graph = self._graphs[key]
            if graph.is_due:
                try:
                    graph.record()
                except RuntimeError as error:
                    error = error.__context__ or error  # to end a broken recording fails too
                    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                    print(f"CUDA graphs do not work here, going on without them, slower: {reason}", file=sys.stderr)
                    self.in_use = False
                    return function()
            return graph()
