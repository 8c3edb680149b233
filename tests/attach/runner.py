"""Runs trainers through lorapatch.attach, each rank in a process of its own that begins with the libraries loaded.

Reads one JSON line a job: {"argv": [...], "ranks": N, "env": {...}, "log": PATH}; answers with the exit codes.
"""

import gc
import json
import os
import socket
import sys
import traceback

import deepspeed
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  # brings torch's compiler, most of what a run would import
import peft  # noqa: F401
import torch
import transformers.trainer  # noqa: F401

from lorapatch import attach


def child(job, rank, port):
    log = os.open(job["log"] + (f".{rank}" if rank else ""), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in ranks.items()} | job.get("env", {}))
    sys.argv = ["attach.py", *job["argv"]]
    code = 0
    try:
        if job["ranks"] > 1:  # on the CPU nobody tells DeepSpeed of the other ranks before ZeRO-3 cuts the first weight
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        attach.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


torch.set_num_threads(1)
gc.freeze()  # what is loaded by now is nothing for the garbage collectors of the runs
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            child(job, rank, port)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    print(json.dumps(codes), flush=True)
