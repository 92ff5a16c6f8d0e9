"""Merging without loading: adapters go into a base's files tensor by tensor, and an ordinary model folder comes out.

The model exists without values. Each adapted weight is read, folded as in memory, written to its final place and forgotten; all
other bytes go from file to file. Peak memory is that of one weight (or of one stack of experts) and what folds it.
"""

from .adapters import AdapterFile
from .folder import working_folder
from .merge import StreamMerge
from .plan import Change, Rounding

__all__ = ["AdapterFile", "Change", "Rounding", "StreamMerge", "working_folder"]
