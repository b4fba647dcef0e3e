"""The page on scale says what its script computes."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import scale


def test_the_page_has_the_tables_of_the_script():
    page = (ROOT / "docs" / "scale.md").read_text()
    assert scale.filled(page) == page
    for content in scale.tables().values():
        assert content in page


def test_all_reduce():
    """Two processes exchange half of the data twice: 1 s for 1 GB over 1 GB/s, and two messages."""
    assert scale.all_reduce_seconds(1e9, 2, 1e9, latency=0.25) == pytest.approx(1.5)
    assert scale.all_reduce_seconds(1e9, 1, 1e9) == 0
