"""What every Python that a test starts does first. Most of a test's time is the imports of torch and transformers."""

import gc
import sys

# Only the tests need scikit-learn: no user has it, and transformers loads it for a second where it is installed.
sys.modules["sklearn"] = None  # type: ignore[assignment]
# Half a million lasting objects come with those imports; looking for cycles among them takes another second.
gc.set_threshold(200_000, 100, 100)
