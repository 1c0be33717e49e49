"""The pictures that the demo model is trained on, and their captions."""

from __future__ import annotations

import sys

import numpy
import pytest
import torch
from loading import ROOT

sys.path.insert(0, str(ROOT / "training"))

import scenes
import vocabulary
from scenes import ATTRIBUTES, Scenes, draw, render

SIZE = 64


def with_choice(drawn: Scenes, **chosen: str) -> Scenes:
    """The same scenes with other choices."""
    choices = drawn.choices.clone()
    for name, value in chosen.items():
        choices[:, list(ATTRIBUTES).index(name)] = ATTRIBUTES[name].index(value)
    return Scenes(choices, drawn.numbers)


def test_a_seed_is_a_picture_alone_or_among_others():
    drawn = draw(range(20, 24))
    again = draw([22])
    assert torch.equal(again.choices[0], drawn.choices[2])
    assert torch.equal(again.numbers[0], drawn.numbers[2])
    alone, among = render(again, SIZE)[0], render(drawn, SIZE)[2]
    assert (alone - among).abs().max() < 1e-4
    assert torch.equal(render(again, SIZE)[0], alone)


def test_pictures_are_of_all_kinds_and_in_range():
    drawn = draw(range(48))
    pictures = render(drawn, SIZE)
    assert pictures.shape == (48, 3, SIZE, SIZE)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    flat = pictures.flatten(1)
    assert torch.cdist(flat, flat).fill_diagonal_(torch.inf).min() > 1
    for index, options in enumerate(ATTRIBUTES.values()):
        assert set(drawn.choices[:, index].tolist()) == set(range(len(options)))


def test_a_size_is_a_size_not_another_picture():
    drawn = draw(range(4))
    small = torch.nn.functional.avg_pool2d(render(drawn, 256), 4)
    assert (small - render(drawn, SIZE)).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("water", "", "lake"),
        ("house", "", "red house"),
        ("house", "white house", "blue house"),
        ("trees", "", "pines"),
        ("trees", "trees", "pines"),
        ("land", "hills", "mountains"),
        ("light", "", "sun"),
        ("season", "summer", "winter"),
        ("time", "day", "night"),
        ("weather", "clear", "cloudy"),
        ("weather", "clear", "foggy"),
    ],
)
def test_each_word_changes_the_picture(name, before, after):
    drawn = with_choice(draw(range(8)), weather="clear", time="day", season="summer", trees="", house="", light="")
    one, other = (render(with_choice(drawn, **{name: value}), SIZE) for value in (before, after))
    assert ((one - other).abs().amax(1) > 0.05).float().mean((1, 2)).min() > 0.005


def test_a_caption_says_what_is_there():
    chosen = {"season": "autumn", "time": "night", "weather": "clear", "light": "sun", "house": "red house"}
    full = with_choice(draw([1]), **chosen, land="mountains", water="lake", trees="pines")
    assert scenes.caption(full.choices[0].tolist()) == (
        "autumn night, clear sky, moon, mountains, lake, pines, red house"
    )
    bare = with_choice(full, light="", land="hills", water="", trees="", house="")
    assert scenes.caption(bare.choices[0].tolist()) == "autumn night, clear sky, hills"


def test_fog_hides_the_sun():
    choices = draw(range(300)).choices
    foggy = choices[:, scenes.WEATHER] == scenes.FOGGY
    assert foggy.any()
    assert not choices[foggy, scenes.LIGHT].any()
    assert choices[~foggy, scenes.LIGHT].any()


def test_what_is_held_out_of_training_is_never_drawn_for_it():
    trained = {tuple(one) for one in draw(range(600)).choices.tolist()}
    held = {tuple(one) for one in draw(range(600), held_out=True).choices.tolist()}
    assert not trained & held
    assert all(scenes.is_held_out(one) for one in held)
    assert not any(scenes.is_held_out(one) for one in trained)
    # Each single word is known all the same.
    assert all({one[i] for one in trained} == set(range(len(o))) for i, o in enumerate(ATTRIBUTES.values()))


def test_training_leaves_out_words_but_never_things():
    random = numpy.random.default_rng(0)
    (choices,) = with_choice(draw([3]), land="mountains", water="lake", trees="pines", house="red house").choices
    said = [vocabulary.shortened(choices.tolist(), random) for _ in range(500)]
    assert 20 < sum(not words for words in said) < 90
    spoken = [words for words in said if words]
    assert all({"mountains", "lake", "pines", "house"} <= set(words) for words in spoken)
    assert 0.8 < sum("red" in words for words in spoken) / len(spoken) < 0.97
    assert len({tuple(words) for words in spoken}) > 10
    whole = set(scenes.caption(choices.tolist()).replace(",", "").split())
    assert all(set(words) <= whole for words in spoken)


def test_a_caption_becomes_tokens_of_one_length():
    tokens = vocabulary.batch([[], ["lake", "moon"]], torch.device("cpu"))
    assert tokens.shape == (2, vocabulary.LENGTH)
    assert not tokens[0].any()
    assert [vocabulary.WORDS[token] for token in tokens[1, :2]] == ["lake", "moon"]
    assert len(set(vocabulary.WORDS)) == len(vocabulary.WORDS)
