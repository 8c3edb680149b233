"""What DeepSpeed's own coordinator gathers and lets go of, on the CPU: a process of its own, for it changes torch.

Standard input holds one setup a case as JSON, the last line of standard output the events of each: ``test_gathering.py``
compares them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import sys
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import partitioned_param_coordinator as real
from deepspeed.utils import set_z3_leaf_modules

from lorapatch.memory.model import RunSetup
from lorapatch.memory.trace.exchange import setup_from
from lorapatch.memory.trace.fake import swap
from lorapatch.memory.trace.subjects import embedded, plain

BOUNDARIES = (True, False, True)  # the micro-batches that the trace makes, and whether a step comes behind them
PREFIX = "_PartitionedParameterCoordinator__"


def listen(model: torch.nn.Module, events: list[str]) -> contextlib.ExitStack:
    """Let the coordinator write what it does into ``events`` until the stack is closed."""
    names = {id(p): name for name, p in model.named_parameters()}
    modules = {id(module): name for name, module in model.named_modules()}
    coordinator: Any = real.PartitionedParameterCoordinator
    away = real.ZeroParamStatus.NOT_AVAILABLE
    fetch, gather, release = (getattr(coordinator, name) for name in PATCHED)

    def fetched(self: Any, module: Any, forward: bool, is_leaf: bool) -> Any:
        events.append(f"{'forward' if forward else 'backward'} {modules[id(module)]}")
        return fetch(self, module, forward, is_leaf)

    def gathered(self: Any, parameters: Any, forward: bool) -> Any:
        events.extend(sorted(f"gather {names[id(p)]}" for p in parameters if p.ds_status == away))
        return gather(self, parameters, forward)

    def released(self: Any, parameter: Any, free_data: bool = True) -> Any:
        before = parameter.ds_status
        found = release(self, parameter, free_data)
        if parameter.ds_status != before:
            events.append(f"release {names[id(parameter)]}")
        return found

    stack = contextlib.ExitStack()
    for name, function in zip(PATCHED, (fetched, gathered, released)):
        stack.callback(setattr, coordinator, name, getattr(coordinator, name))
        setattr(coordinator, name, function)
    return stack


PATCHED = ("_fetch_sub_module_impl", f"{PREFIX}all_gather_params", f"{PREFIX}release_param")


def train(setup: RunSetup) -> list[str]:
    """The events of three micro-batches of ``setup`` under a real engine."""
    subject = (embedded if setup.trainer == "embedded" else plain).build(setup)
    for tensor in swap([subject.model, *subject.towers], contextlib.nullcontext()):
        tensor.data.normal_(0, 0.02) if tensor.is_floating_point() else tensor.data.zero_()
    for holder, name in subject.tensors:
        object.__setattr__(holder, name, torch.ones(getattr(holder, name).shape))
    model = subject.model.to(torch.bfloat16)
    if subject.leaves:
        set_z3_leaf_modules(model, list(subject.leaves))
    events: list[str] = []
    with listen(model, events):
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learning, lr=1e-4)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(setup))
        for boundary in BOUNDARIES:
            batch = subject.make_batch(setup.sequence)
            for name, values in batch.items():
                batch[name] = torch.arange(len(values)) if values.dim() == 1 else torch.ones_like(values)
            engine.set_gradient_accumulation_boundary(boundary)
            engine.backward(subject.forward(engine, batch)["loss"])
            if boundary:
                engine.step()
    return events


def config(setup: RunSetup) -> dict[str, Any]:
    """DeepSpeed's configuration of ``setup``, whose parameters lie on the host."""
    zero = setup.zero
    assert zero is not None
    return {
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": setup.micro_batch,
        "gradient_accumulation_steps": setup.accumulation,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu"},
            "overlap_comm": zero.overlap_comm,
            "reduce_bucket_size": zero.reduce_bucket_size,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.param_persistence_threshold,
            "stage3_max_live_parameters": zero.max_live_parameters,
            "stage3_max_reuse_distance": zero.max_reuse_distance,
        },
    }


def main() -> None:
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # DeepSpeed talks on standard output (its import did already)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # a kernel for several ranks, which would be compiled for a minute
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    torch.set_num_threads(1)
    answer_to.write(json.dumps([train(setup_from(written)) for written in json.load(sys.stdin)]))
    answer_to.close()


if __name__ == "__main__":
    main()
