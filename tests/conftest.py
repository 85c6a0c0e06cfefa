"""What every test runs under: a cache apart, C++ warnings as errors, few threads, no network."""

import os
from pathlib import Path

# Entries are named after what made them, so sessions share them: kernels are compiled when they changed.
os.environ["FASTLORA_CACHE"] = str(Path(__file__).parents[1] / "build" / "test-cache")
os.environ["FASTLORA_CXXFLAGS"] = "-Werror"
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
