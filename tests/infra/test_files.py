"""Files appear whole, and what failed leaves nothing."""

import pytest

from var_jax.infra.files import replacing


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as beside:
        beside.write_text("whole")
        assert not path.exists()
    with pytest.raises(OSError, match="full"), replacing(path) as beside:
        beside.write_text("ha")
        raise OSError("the disk is full")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]
