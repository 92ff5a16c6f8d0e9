"""Merging without loading: adapters go into a base's files tensor by tensor, and an ordinary model folder comes out.

The model exists without values. Each adapted weight is read, folded as in memory, written to its final place and forgotten, some
rows or columns at a time where its adapters allow it; all other bytes go from file to file. What is made whole is a weight whose
method says so, a module that was retrained, and a combination that goes by the full change of the weight (``ties_svd``, ``sce``).
"""

from .adapters import AdapterFile
from .folder import working_folder
from .merge import StreamMerge
from .plan import Change, Rounding

__all__ = ["AdapterFile", "Change", "Rounding", "StreamMerge", "working_folder"]
