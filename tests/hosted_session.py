"""A session on the emulated device: onnxruntime on the CPU behind arrays that refuse to leave the device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cuda_on_host import HostedArray
from cuda_streams import work

from keyreel.runtime.sessions import OnnxRuntimeSession


class HostedSession:
    """Takes and gives arrays of the emulated device, as a session on a real one does; NumPy arrays are refused."""

    def __init__(self, path: Path) -> None:
        self._session = OnnxRuntimeSession(path, threads=1)
        self.inputs, self.outputs = self._session.inputs, self._session.outputs

    def run(self, feeds: Mapping[str, HostedArray]) -> dict[str, HostedArray]:
        if not all(isinstance(array, HostedArray) for array in feeds.values()):
            raise TypeError(f"not on the device: {[type(array).__name__ for array in feeds.values()]}")
        computed = self._session.run({name: array._host for name, array in feeds.items()})
        found = {name: HostedArray(array) for name, array in computed.items()}
        work(*([array._host for array in arrays.values()] for arrays in (feeds, found)))
        return found

    def close(self) -> None:
        self._session.close()
