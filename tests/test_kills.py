"""A few kills; `python tests/kills.py --kills 60` is the long run."""

import kills


def test_what_is_killed_is_done_again_cleanly():
    found = []
    kills.kills(3, 0, lambda kind, moment, outcome: found.append((kind, outcome)))
    assert found == [(kind, "clean") for kind in ("save", "download", "training")]
