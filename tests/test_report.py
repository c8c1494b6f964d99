"""The report: what it says, what it must not let through, and how a real browser shows it."""

import html.parser
import io
import itertools
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from smark_jax import report
from smark_jax.report import words

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)")
BADGE = "<script>alert(1)</script>\"'&"


def suspect(number: int = 20, accused: dict[int, float] | None = None, **changes) -> dict:
    """A suspect's part of a verdict document; its statistics are a fixed normal sample, its accused far outside."""
    accused = {7: 17.04} if accused is None else accused
    values = np.random.default_rng(5).standard_normal(number)
    values[list(accused)] = list(accused.values())
    names = [f"Customer {serial}" for serial in range(number)]
    accusations = [
        {"customer": names[k], "serial": k, "statistic": t, "p_value": 1e-70, "log10_p": -abs(t) * 4.25, "share": 0.5}
        for k, t in accused.items()
    ]
    return {
        "file": "/somewhere/leak.safetensors",
        "sha256": "3f" * 32,
        "format": "safetensors",
        "read": "weights",
        "verdict": "traced" if accused else "nobody",
        "error": None,
        "accused": accusations,
        "threshold": 5.71,
        "statistics": values,
        "serials": list(range(number)),
        "customers": names,
        "decoys": {"number": 1000, "largest": 3.2, "alarm": False},
        "num_suspects": 1,
        "num_alignments": 1,
        "assumptions": "It assumes that codewords are independent fair signs.",
        "layout": [{"base": "Conv_0/kernel", "suspect": "conv1.weight", "change": "OIHW to HWIO"}],
        "alignment": None,
        **changes,
    }


def document(*suspects: dict, **changes) -> dict:
    suspects = suspects or (suspect(),)
    return {
        "number": 3,
        "created": "2026-11-25T18:00:00Z",
        "smark_version": "0.1.0",
        "model": "mnist-cnn",
        "num_customers": len(suspects[0].get("customers", range(20))),
        "num_chips": 304,
        "alpha": 1e-6,
        "decoder": "joint",
        "base_sha256": "c0" * 32,
        "strength": 0.03,
        "commitment": {"number": 1, "root": "9a" * 32, "created": "2026-11-24T09:00:00Z"},
        "suspects": list(suspects),
        **changes,
    }


class Page(html.parser.HTMLParser):
    """What a browser would see: text without markup, and every tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.text = " ".join("".join(self.pieces).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th", "dd", "br"):
            self.pieces.append(" ")
        if tag not in ("meta", "br"):  # which have no end
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.pieces.append(data)


# --- What it says ---


def test_the_verdict_comes_first_in_plain_words():
    page = Page(report.render(document()))
    sentence = (
        "The suspect file leak.safetensors carries the fingerprint of customer Customer 7. If Customer 7 were "
        "innocent, a match this strong would occur with a probability of at most 1 in 10⁷² (a one followed by 72 "
        "zeros), all 20 customers counted."
    )
    assert sentence in page.text
    assert page.text.index("The suspect is traced to Customer 7") < page.text.index(sentence)
    order = ("Verdict", "All customers’ statistics", "How the suspect was read", "Assumptions, and what is not covered")
    headings = re.findall(r"<h2 [^>]*>(.*?)</h2>", report.render(document()))
    assert headings == [*order, "Commitments", "How to re-compute it"]


def test_everything_that_a_reader_must_compare_is_there():
    text = Page(report.render(document())).text
    for part in ("3f" * 32, "c0" * 32, "9a" * 32, "25 November 2026, 18:00 UTC", "24 November 2026", "verify BUNDLE"):
        assert part in text
    for part in (
        "Conv_0/kernel conv1.weight OIHW to HWIO",
        "independent fair signs",
        "owner who frames",
        "threshold +5.7",
    ):
        assert part in text
    assert "smark evidence export VAULT 3" in text
    assert "1 in 1,000,000" in text


def test_all_customers_stand_in_the_table_signed_and_by_size():
    values = suspect()["statistics"]
    page = report.render(document())
    rows = re.findall(r"<bdi>Customer (\d+)</bdi></th><td.*?>(\d+)</td><td.*?>([+−][\d.]+)</td><td>(yes|no)", page)
    assert len(rows) == 20
    order = np.argsort(-np.abs(values))
    assert [int(row[0]) for row in rows] == [int(row[1]) for row in rows] == order.tolist()
    shown = [float(row[2].replace("−", "-")) for row in rows]
    np.testing.assert_allclose(shown, values[order], atol=0.0501)
    assert [row[0] for row in rows if row[3] == "yes"] == ["7"]


def test_nobody_accused_and_unreadable_are_told_apart():
    text = Page(report.render(document(suspect(accused={})))).text
    assert text.count("No customer is accused") == 3  # title, headline, sentence
    assert "does not show that the model is somebody else’s own work" in text
    assert "Traced" not in text
    unread = {"file": "x.bin", "verdict": "unreadable", "error": "files.read: expected weights.\nConvert it first."}
    text = Page(report.render(document(unread))).text
    assert "The suspect file could not be read" in text
    assert "Why: files.read: expected weights. Convert it first." in " ".join(text.split())
    assert "carries the fingerprint" not in text
    assert "no suspect could be read" in text


def test_suspects_that_were_compared_with_nobody_are_told_apart_with_the_reason():
    for verdict, headline in (
        ("not a copy", "is not a copy of this base model"),
        ("undecided", "Nothing can be said of"),
    ):
        part = {"file": "x.bin", "verdict": verdict, "error": "align: too unlike.\nIt says why.", "accused": []}
        text = Page(report.render(document(part))).text
        assert headline in text
        assert "Why: align: too unlike. It says why." in text
        assert "no suspect was compared with the customers" in text
        assert "could not be read" not in text and "carries the fingerprint" not in text
    text = Page(report.render(document(part, suspect()))).text
    assert "2 suspects: 1 traced, 1 undecided" in text


def test_what_was_left_out_and_maps_that_were_chosen_are_said():
    left = {"leaf": "head/kernel", "weights": 1400, "reason": BADGE}
    counts = {"weights": 22528, "read": 21128, "bounded": 0, "bound": 1.0}
    page = report.render(document(suspect(left_out=[left], coverage=counts, log_maps=141.0)))
    text = Page(page).text
    assert "21,128 of 22,528 weights that carry a fingerprint were read" in text
    assert f"head/kernel 1,400 {BADGE}" in text and BADGE not in page
    assert "one of at most 10⁶² that content would have allowed" in text
    assert "were read." not in Page(report.render(document())).text


def test_coalitions_count_the_weakest_of_their_members():
    page = Page(report.render(document(suspect(accused={3: 9.0, 5: -8.0}, num_suspects=4))))
    assert "The suspect is traced to Customer 3 and Customer 5" in page.text
    assert "at most 1 in 10³⁴ (a one followed by 34 zeros), all 20 customers, 4 suspects counted" in page.text
    assert "−8.0" in page.text


def test_several_suspects_are_summed_up_and_told_apart():
    parts = (suspect(), suspect(file="/other/leak.safetensors", accused={}), {"file": "no", "verdict": "unreadable"})
    text = Page(report.render(document(*parts))).text
    assert "3 suspects: 1 traced, 1 with nobody accused, 1 could not be read" in text
    assert "/somewhere/leak.safetensors carries" in text
    assert "/other/leak.safetensors matches none" in text


def test_an_alarm_is_not_to_be_overlooked():
    decoys = {"number": 1000, "largest": 8.8, "alarm": True}
    text = Page(report.render(document(suspect(decoys=decoys)))).text
    assert text.index("Do not rely on this verdict") < text.index("All customers’ statistics")
    assert "Do not rely" not in Page(report.render(document())).text


def test_answers_missing_commitments_and_unreachable_thresholds_are_said():
    part = suspect(
        accused={}, read="answers", file="https://api.example/v1", sha256=None, threshold=math.inf, layout=[]
    )
    text = Page(report.render(document(part, commitment=None))).text
    assert "The service https://api.example/v1 matches none" in text
    assert "No commitment is stored" in text
    assert "nothing was moved" not in text  # where only answers were read
    assert "nothing was moved" in Page(report.render(document(suspect(layout=[])))).text
    assert "too few chips" in text
    again = json.loads(
        json.dumps(document(suspect(accused={}, statistics=[], serials=[], customers=[], threshold=None)))
    )
    assert "were not kept" in Page(report.render(again)).text


@pytest.mark.parametrize(
    ("log10_p", "odds", "spelt"),
    [
        (-72.4, "1 in 10⁷²", "a one followed by 72 zeros"),
        (-72.999, "1 in 10⁷²", "a one followed by 72 zeros"),
        (-9.5, "1 in 1,000,000,000", ""),
        (-6.0, "1 in 1,000,000", ""),
        (math.log10(1e-6), "1 in 1,000,000", ""),
        (math.log10(0.03), "1 in 33", ""),
        (0.0, "1 in 1", ""),
    ],
)
def test_odds_are_never_stronger_than_the_bound(log10_p, odds, spelt):
    assert words.one_in(log10_p) == odds
    assert words.spelt_out(log10_p) == spelt


@pytest.mark.parametrize("broken", [{}, {"suspects": []}, {"number": 1}])
def test_an_incomplete_document_is_refused(broken):
    with pytest.raises(ValueError, match="report: expected"):
        report.render({**document(), **broken} if "suspects" in broken else broken)
    with pytest.raises(ValueError, match="report: expected a verdict of 'traced'"):
        report.render(document(suspect(verdict="guilty")))


# --- Hostile text, size ---


def hostile() -> dict:
    """Markup wherever text of others stands, and characters that turn the direction of writing."""
    part = suspect()
    part["customers"][7] = part["accused"][0]["customer"] = BADGE + "\u202egpj"
    part |= {"file": f"/x/{BADGE}.safetensors", "format": BADGE, "alignment": BADGE + "\nline 2", "assumptions": BADGE}
    part["layout"] = [{"base": BADGE, "suspect": BADGE, "change": BADGE}]
    unread = {"file": BADGE, "verdict": "unreadable", "error": BADGE, "sha256": BADGE}
    names = {
        "model": BADGE,
        "smark_version": BADGE,
        "decoder": BADGE,
        "created": BADGE,
        "base_sha256": BADGE,
        "number": BADGE,
    }
    return document(part, unread, **names, commitment={"number": BADGE, "root": BADGE, "created": BADGE})


def test_names_cannot_add_markup_or_disguise_themselves():
    page = report.render(hostile())
    honest = report.render(document(suspect(), {"file": "a", "verdict": "unreadable", "error": "b"}))
    assert "<script" not in page
    assert {tag for tag, _ in Page(page).tags} == {tag for tag, _ in Page(honest).tags}
    assert {key for _, attributes in Page(page).tags for key in attributes} == {
        key for _, attributes in Page(honest).tags for key in attributes
    }
    assert Page(page).text.count("alert(1)") > 15
    assert "\u202e" not in page
    assert "\\u202egpj" in page


def test_the_page_loads_nothing():
    for page in (report.render(document()), report.render(hostile())):
        tags = Page(page).tags
        assert not {tag for tag, _ in tags} & {
            "script",
            "link",
            "img",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "a",
        }
        loading = {"src", "href", "srcset", "data", "action", "background", "poster", "xlink:href", "style"}
        assert not {key for _, attributes in tags for key in attributes} & loading
        assert not [key for _, attributes in tags for key in attributes if key.startswith("on")]
        assert not re.search(r"@import|url\(", page)
        addresses = set(re.findall(r"https?://[^\"<\s]+", page))
        assert addresses == {"http://www.w3.org/2000/svg"}  # SVG's name, which nobody fetches
        policy = next(a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy")
        assert "default-src 'none'" in policy


@pytest.mark.parametrize("number", [2_000, 2_001, 1_000_000])
def test_many_customers_make_a_small_page(number):
    page = report.render(document(suspect(number, {7: 9.0, number - 1: -8.0})))
    assert len(page.encode()) < 200_000
    assert page.count('class="accused"><title>') == 2
    assert ('class="dots"' in page) == (number <= 2_000)
    bars = re.findall(r'<g class="bars">(.*?)</g>', page)
    assert len(bars) == (number > 2_000)
    assert len(re.findall(r'scope="row"><bdi>Customer', page)) == 20 + 2  # table, and the accused in the verdict
    if bars:
        heights = [float(text) for text in re.findall(r'height="([\d.]+)"', bars[0])]
        assert 10 < len(heights) <= 72
        assert max(heights) < 121


def test_a_crowd_of_accused_keeps_its_labels_apart():
    page = report.render(document(suspect(100, {k: 7.0 + k / 9 for k in range(30)})))
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="accused-label" text-anchor="middle">([^<]+)', page)
    assert 3 <= len(labels) <= 12
    for line in {label[1] for label in labels}:
        centres = sorted(float(label[0]) for label in labels if label[1] == line)
        assert all(right - left > 60 for left, right in itertools.pairwise(centres))
    assert page.count('class="accused"><title>') == 30


# --- In a browser ---


def browse(tmp_path, page: str, *options: str) -> subprocess.CompletedProcess:
    """Chromium on a page, in a profile of its own and without the network; console messages are in its stderr."""
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    quiet = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", *quiet.split(), profile, "--enable-logging=stderr")
    return subprocess.run(
        [str(CHROMIUM), *fixed, *options, (tmp_path / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )


def complaints(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_chromium
def test_chromium_shows_the_verdict_and_complains_of_nothing(tmp_path):
    done = browse(tmp_path, report.render(hostile()), "--dump-dom")
    assert done.returncode == 0
    assert "carries the fingerprint of customer" in done.stdout
    assert "1 in 10⁷²" in done.stdout
    assert "<script" not in done.stdout
    assert complaints(done) == []
    # The check can fail: a page that tries to load something is complained of, and its script does not run.
    broken = report.render(document()).replace("<main>", "<main><script>document.title = 'taken'</script>")
    done = browse(tmp_path, broken, "--dump-dom")
    assert complaints(done)
    assert "<title>taken" not in done.stdout


def shot(tmp_path, page: str, width: int, *options: str) -> np.ndarray:
    browse(tmp_path, page, f"--screenshot={tmp_path / 'shot.png'}", f"--window-size={width},1400", *options)
    with Image.open(io.BytesIO((tmp_path / "shot.png").read_bytes())) as picture:
        return np.asarray(picture.convert("RGB"), np.float64)


def luminance(colour: np.ndarray) -> float:
    """Relative luminance, WCAG 2."""
    part = colour / 255
    return float(np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


@needs_chromium
def test_light_and_dark_are_both_readable(tmp_path):
    light = shot(tmp_path, report.render(document()), 900)
    dark = shot(tmp_path, report.render(document()), 900, "--blink-settings=preferredColorScheme=0")
    assert luminance(light[2, 2]) > 0.95
    assert luminance(dark[2, 2]) < 0.02
    for picture in (light, dark):
        heading = picture[60:170, 40:860].reshape(-1, 3)  # the headline: paper and ink
        levels = sorted(luminance(colour) for colour in np.unique(heading, axis=0))
        assert (levels[-1] + 0.05) / (levels[0] + 0.05) > 12


def style_colours(block: str) -> dict[str, np.ndarray]:
    found = re.findall(r"--([\w-]+): #([0-9a-f]{6});", block)
    return {name: np.array([int(text[k : k + 2], 16) for k in (0, 2, 4)], np.float64) for name, text in found}


def test_text_has_sufficient_contrast_in_every_scheme():
    style = re.search(r"<style>(.*?)</style>", report.render(document()), re.DOTALL)
    blocks = [block for block in re.findall(r":root \{(.*?)\}", style.group(1), re.DOTALL) if "--paper" in block]
    assert len(blocks) == 3  # light, dark, print
    pairs = [(ink, "paper") for ink in ("ink", "soft", "traced", "nobody", "unread")]
    pairs += [(name, f"{name}-tint") for name in ("traced", "nobody", "unread")] + [
        ("ink", "card"),
        ("soft", "traced-tint"),
    ]
    for colours in map(style_colours, blocks):
        for ink, paper in pairs:
            levels = sorted((luminance(colours[ink]), luminance(colours[paper])))
            assert (levels[1] + 0.05) / (levels[0] + 0.05) >= 4.5, (ink, paper)


@needs_chromium
@pytest.mark.parametrize("width", [360, 820])
def test_nothing_sticks_out_on_a_phone(tmp_path, width):
    """In a frame as wide as a phone, since a headless window is at least 500 wide; the script is the test's own."""
    page = report.render(hostile())
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    inner = tmp_path / "inner.html"
    probe = "<script>document.title = 'wide ' + document.documentElement.scrollWidth</script></body>"
    inner.write_text(page.replace("</body>", probe), encoding="utf-8")
    outer = (
        f'<iframe src="inner.html" style="width:{width}px;height:900px;border:0" onload="document.body.append('
        'this.contentDocument.title)"></iframe>'
    )
    done = browse(tmp_path, outer, "--dump-dom", "--allow-file-access-from-files", "--hide-scrollbars")
    assert f"wide {width}" in done.stdout


@needs_chromium
def test_it_prints_on_a_few_pages(tmp_path):
    paper = tmp_path / "page.pdf"
    browse(tmp_path, report.render(document()), f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    raw = paper.read_bytes()
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", raw)) <= 5
    sizes = {tuple(round(float(part)) for part in box.split()) for box in re.findall(rb"/MediaBox\s*\[([^\]]+)\]", raw)}
    assert sizes == {(0, 0, 595, 842)}  # A4 in points
