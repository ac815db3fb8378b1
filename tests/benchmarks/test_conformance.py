"""The table of Diffusers' own tests is what was found, and nothing in it lacks an explanation."""

import json

from benchmarks import conformance


def results():
    return json.loads(conformance.RESULTS.read_text())


def test_the_page_shows_the_results():
    page = conformance.PAGE.read_text()
    assert conformance.in_page(page, results()) == page
    assert page.count(conformance.BEGIN) == page.count(conformance.END) == 1


def test_all_that_differs_or_fails_is_explained():
    found = results()["families"]
    assert found and set(found) <= set(conformance.SUITES)
    assert not [test for name, suite in found.items() for test in conformance._unexplained(name, suite)]
    assert all(suite["accelerated"] and suite["attention_calls"] for suite in found.values())
    assert all(suite["plain"] == suite["wrapped"] or suite["differences"] for suite in found.values())
