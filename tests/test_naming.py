"""Test the helpers with which tests match error messages."""

from tests.naming import names


def test_names_matches_whole_words_of_a_message_in_any_order():
    text = "a.json: num_heads must be a multiple of num_kv_heads,\ngot -4 and 'x'"
    assert names(text, "'x'", "-4", "num_kv_heads", "a.json") and names(text)
    for missing in ("kv_heads", 3, "'y'", "num_kv_head", "a_json", "json:num"):
        assert not names(text, "num_heads", missing)
    assert not names("got 43 and 3.5 and [24]", 4) and names("got 43 and [24]", "[24]")
