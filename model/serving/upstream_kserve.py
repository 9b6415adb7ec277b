"""Every use of what KServe calls private; tests/test_upstream.py fails when it changes.

Read in KServe 0.21.
"""

import numpy as np
from kserve import InferInput


class BinaryInput(InferInput):
    """An input whose data came behind the JSON.

    To a model it is what KServe makes of it: a list of numbers, and an array of its own. But the
    list is made when a model asks for it. For an image of 150 000 numbers it takes 40 ms, on the
    event loop, and some more to send it to a replica; most models only want the array.

    Private: `InferInput._data` and `InferInput._raw_data`, where it keeps its data.
    """

    _unlisted = False  # the data are as they came

    def __init__(self, given: InferInput, raw: bytes) -> None:
        super().__init__(given.name, given.shape, given.datatype, parameters=given.parameters)
        self._raw_data, self._unlisted = raw, True

    @property
    def _data(self):
        if self._unlisted:
            self.set_data_from_numpy(super().as_numpy(), binary_data=False)
        return self._listed

    @_data.setter
    def _data(self, data) -> None:
        if self._unlisted:
            self._raw_data, self._unlisted = None, False
        self._listed = data

    def as_numpy(self) -> np.ndarray:
        """An array that may be written to."""
        array = super().as_numpy()
        return array if array.flags.writeable else array.copy()
