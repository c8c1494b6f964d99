"""The secret word of licences: what is sent, what each side learns, and whom it convicts."""

import numpy as np
from licences import BUNDLE, CUSTOMER, challenge, model, offer, packed, unpacked

from smark_jax import extraction, licence
from smark_jax.licence import issuing, requests, segments


def shared_signs(made, copies, mark):
    """What a customer with two packages takes for the signs if the parts' keystreams are the same in both.

    At each coordinate the copies differ by c e - c' e' in units of the change. Where they differ, both signs are
    known; where not, their product is: these relations lead from sign to sign.
    """
    rows = []
    for one in made:
        count = segments.num_coordinates(mark)
        found = segments.draw(requests.seed(one.request.request), count, one.request.offer.offer.num_segments, 8)
        index = np.empty(count, int)
        index[np.argsort(found.parts[found.members], kind="stable")] = np.arange(count)
        rows.append((index, one.secrets.choices.word[found.members].astype(int)))
    (first, one), (second, other) = rows
    difference = (copies[0].astype(np.float64) - copies[1]).reshape(-1)
    difference = np.round(2 * difference / np.abs(difference).max()).astype(int)
    signs = np.zeros(len(first), int)
    known = difference != 0
    signs[first[known]] = (np.sign(difference) * one)[known]
    for _ in range(64):
        signs[first] = np.where(signs[first] == 0, one * other * signs[second] * ~known, signs[first])
        signs[second] = np.where(signs[second] == 0, one * other * signs[first] * ~known, signs[second])
    return one * signs[first]


def test_two_packages_of_one_offer_do_not_give_the_signs_away(tmp_path):
    """A customer that complains gets a second package. It must not be able to take the word out of its copy."""
    owned, terms = model(), offer()
    made = [licence.request(terms, CUSTOMER, attempt) for attempt in (1, 2)]
    copies = [
        unpacked(packed(owned, one.request), one.request, one.secrets, tmp_path / f"{number}.safetensors")
        for number, one in enumerate(made)
    ]
    arrays = [copy["a/kernel"] for copy in copies]
    scale = issuing.SHARE * owned.mark.strength * np.sqrt(np.mean(owned.base["a/kernel"] ** 2.0))
    clean = arrays[0] - (scale * shared_signs(made, arrays, owned.mark)).reshape(64, 64).astype(np.float32)
    asked = challenge(made[0].request, parts=8)
    word = licence.opened_word(asked, licence.answer(asked, BUNDLE, made[0].secrets.choices, CUSTOMER), BUNDLE)

    def statistic(kernel):
        values = extraction.shifts({"a/kernel": kernel}, owned.base, owned.mark)
        return licence.convict(licence.shifts(values, owned.mark), asked, word).statistic

    assert statistic(arrays[0]) > 7
    assert statistic(clean) > 4
