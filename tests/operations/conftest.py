"""HQQ's own layers are the reference for its folders. Its package is built beside torch, so that not every machine can have it."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("hqq") else ["test_stream_quantised_hqq.py"]
