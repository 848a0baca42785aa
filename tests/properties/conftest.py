"""How long hypothesis looks: `HYPOTHESIS_PROFILE=long` searches, `short` repeats what it knows."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

_NO_TIME_LIMITS = [HealthCheck.too_slow, HealthCheck.data_too_large]

# Without the phase that explains failures: it traces every line, which takes minutes here.
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink)

# A run of the short profile is the same each time, so that it fails for a change and not by chance.
settings.register_profile(
    "short",
    max_examples=40,
    derandomize=True,
    deadline=None,
    phases=_PHASES,
    suppress_health_check=_NO_TIME_LIMITS,
)
settings.register_profile(
    "long",
    max_examples=5_000,
    deadline=None,
    phases=_PHASES,
    suppress_health_check=_NO_TIME_LIMITS,
    print_blob=True,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))
