"""One thread for every test: several on a busy machine make small tensors ten to sixty times
slower."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hypothesis import settings

# the same examples on every run and machine: a failure is a change, never luck
# (HYPOTHESIS_PROFILE=default searches on)
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
