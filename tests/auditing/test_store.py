"""Results of checks on disk: what is kept, and for which subject."""

from __future__ import annotations

import pytest
import torch
from planted_models import row_images
from subjects import Rows

from backdoorbench_moe.auditing.audit import digest_of
from backdoorbench_moe.auditing.store import Store
from backdoorbench_moe.auditing.subject import make_subject


def test_arrays_are_kept_for_the_same_subject_only(tmp_path) -> None:
    calls = []

    def make():
        calls.append(1)
        return {"values": torch.arange(3.0)}

    for digest, expected in (("a", 1), ("a", 1), ("b", 2)):
        assert Store(tmp_path, digest).keep()("stamps", make)["values"].tolist() == [0, 1, 2]
        assert len(calls) == expected
    (tmp_path / "checks" / "stamps.npz").write_bytes(b"no zip")
    Store(tmp_path, "b").keep()("stamps", make)
    assert len(calls) == 3


@pytest.mark.parametrize("offset", [6, 10])
def test_damaged_arrays_are_computed_again(tmp_path, offset) -> None:
    """Offsets in a member's entry of a zip file: the version of the format, and the compression method."""
    file = tmp_path / "checks" / "stamps.npz"

    def make():
        return {"values": torch.arange(3.0)}

    Store(tmp_path, "a").keep()("stamps", make)
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + offset] = 255
    file.write_bytes(content)
    assert Store(tmp_path, "a").keep()("stamps", make)["values"].tolist() == [0, 1, 2]


def test_the_digest_covers_what_a_score_depends_on() -> None:
    split = row_images(30)
    given = {"images": split.images, "labels": split.labels}
    model, other = Rows(), Rows()
    with torch.no_grad():
        other.layer.bias[0] += 1e-3
    digests = {
        digest_of(make_subject(model)),
        digest_of(make_subject(other)),
        digest_of(make_subject(model, **given)),
        digest_of(make_subject(model, images=split.images)),
        digest_of(make_subject(model, images=split.images.flip(0))),
        digest_of(make_subject(model, **given, seed=1)),
        digest_of(make_subject(model, **given, tasks=[split.images])),
        digest_of(make_subject(model, **given, base=model.state_dict())),
    }
    assert len(digests) == 8
    assert digest_of(make_subject(Rows(), **given)) == digest_of(make_subject(model, **given))
