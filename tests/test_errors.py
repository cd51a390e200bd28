"""Messages stay readable whatever they repeat."""

from __future__ import annotations

import pickle

import pytest

from amoeba_plugin.errors import LONGEST_MESSAGE, LONGEST_WORD, AmoebaError, ShapeError
from amoeba_plugin.shape import SubnetShape


def test_what_a_user_wrote_without_end_is_cut_and_the_advice_stays():
    with pytest.raises(ShapeError) as caught:
        SubnetShape.parse(f"{'9' * 5000}x1/2")
    assert str(caught.value).startswith("'99999")
    assert "(5006 characters)" in str(caught.value)
    assert str(caught.value).endswith("write DEPTHxWIDTH, for example 24x7/8")
    assert len(str(caught.value)) < 400


def test_a_message_of_many_words_is_cut_in_its_middle():
    message = str(AmoebaError(f"asked for {'no ' * 50_000}; take one"))
    assert len(message) < LONGEST_MESSAGE + 10
    assert message.startswith("asked for no ")
    assert message.endswith("; take one")


def test_paths_and_what_else_is_of_a_sensible_length_stay():
    path = "/directory" * (LONGEST_WORD // 10)
    assert str(AmoebaError(path)) == path
    assert str(pickle.loads(pickle.dumps(ShapeError(path)))) == path  # noqa: S301  # our own
