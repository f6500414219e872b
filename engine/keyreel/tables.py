"""Converts values to tables of pyarrow and pandas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from keyreel.errors import import_extra


class Tabular(ABC):
    """A value that converts to a pyarrow table and to a pandas data frame."""

    __slots__ = ()

    @abstractmethod
    def to_arrow(self) -> Any:
        """Makes a pyarrow table."""

    def to_pandas(self) -> Any:
        """Makes a pandas data frame with the columns of `to_arrow`.

        Raises:
            MissingExtra: pandas or pyarrow is not installed.
        """
        import_extra("pandas", extra="data", purpose="to_pandas()")
        return self.to_arrow().to_pandas()


def table_of(columns: Mapping[str, Any]) -> Any:
    """Makes a pyarrow table of columns; an array [n, D] becomes a column of lists of D numbers.

    Raises:
        MissingExtra: pyarrow is not installed.
    """
    pa = import_extra("pyarrow", extra="data", purpose="a table")

    def column(values: Any) -> Any:
        if isinstance(values, np.ndarray) and values.ndim == 2:
            flat = pa.array(np.ascontiguousarray(values).ravel())
            return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        return pa.array(values)

    return pa.table({name: column(values) for name, values in columns.items()})
