"""The NVIDIA GPUs of this machine and their memory, asked from the driver (NVML)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Gpu", "Gpus"]


@dataclass(frozen=True)
class Gpu:
    """A GPU at one moment; memory in bytes, as nvidia-smi shows it: of all processes, CUDA contexts included."""

    index: int
    name: str
    used_B: int
    total_B: int


class Gpus:
    """The GPUs of this machine; none where there is no driver, or no nvidia-ml-py to ask it with.

    ``why_none`` then says which of the two it is.
    """

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        self._names: list[str] = []
        self.driver: str | None = None
        self.why_none = ""
        try:
            import pynvml  # type: ignore[import-untyped]
        except ImportError:
            self.why_none = "nvidia-ml-py is not installed: pip install nvidia-ml-py"
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self.why_none = f"the NVIDIA driver does not answer ({error})"
            return
        self._nvml = pynvml
        self.driver = _text(pynvml.nvmlSystemGetDriverVersion())
        self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        self._names = [_text(pynvml.nvmlDeviceGetName(handle)) for handle in self._handles]

    def __len__(self) -> int:
        return len(self._handles)

    def memory(self) -> tuple[Gpu, ...]:
        """Every GPU as it is now; one that cannot be asked (a MIG slice, a lost device) is left out."""
        found = []
        for index, handle in enumerate(self._handles):
            try:
                info = self._memory(handle)
            except self._nvml.NVMLError:
                continue
            found.append(Gpu(index, self._names[index], int(info.used), int(info.total)))
        return tuple(found)

    def _memory(self, handle: Any) -> Any:
        """As nvidia-smi counts since driver 510: without what the driver keeps for itself (0.6 GiB of an H200)."""
        try:
            return self._nvml.nvmlDeviceGetMemoryInfo(handle, version=self._nvml.nvmlMemory_v2)
        except (AttributeError, TypeError, self._nvml.NVMLError):  # an older nvidia-ml-py or driver
            return self._nvml.nvmlDeviceGetMemoryInfo(handle)

    def supports_bf16(self, index: int) -> bool | None:
        """Whether GPU ``index`` computes in bfloat16 and TF32 (compute capability 8.0 and up); None if unknown."""
        try:
            major, _ = self._nvml.nvmlDeviceGetCudaComputeCapability(self._handles[index])
        except self._nvml.NVMLError:
            return None
        return bool(major >= 8)

    def users(self, index: int) -> set[int]:
        """The processes that use GPU ``index``; empty where the driver does not tell (inside many containers)."""
        try:
            return {
                int(process.pid) for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handles[index])
            }
        except self._nvml.NVMLError:
            return set()

    def close(self) -> None:
        """Let go of the driver."""
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml, self._handles = None, []


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # bytes before nvidia-ml-py 11.5
