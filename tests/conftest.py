import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("SPARK_DIST_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real volumes and reference values that lie beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference data at {SHARED} (set SPARK_DIST_SHARED)")
    return SHARED
