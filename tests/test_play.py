"""Proof that docs/play.html shows the numbers of rspo.py and bandit.py.

1. the file is small and loads nothing;
2. its functions give the weights of rspo.py and climb the hills of bandit.py, to rounding, in
   Chromium and in Node, whichever is there;
3. in Chromium, the words, bars and curves follow the sliders, buttons and links; a phone shows all.
"""

import html
import json
import re
import shutil
import subprocess

from functools import cache

import pytest
import torch
from conftest import ROOT

import bandit
import rspo

PAGE = ROOT / "docs" / "play.html"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)
NODE = shutil.which("node")
needs_browser = pytest.mark.skipif(
    not BROWSER, reason="no chromium, chromium-browser or google-chrome is on the PATH")
needs_node = pytest.mark.skipif(not NODE, reason="no node is on the PATH")
pytestmark = pytest.mark.filterwarnings("ignore:n = .* < 2k")

KS = (1, 2, 4, 8, 16)
SIZES = (*range(1, 17), 31, 32, 63, 64)
STOPS = (0, 1, 2, 10, 100, 250, 600, 1250)  # steps at which a climb is looked at
GROUPS = [([float((i * 7 + 3) % n < c) for i in range(n)], k)
          for n in (1, 2, 3, 6, 8, 16, 64) for c in {0, 1, n // 3, n // 2, n - 1, n}
          for k in {1, 2, 3, 4, 8, n // 2, n} if 1 <= k <= n]


def close(got, expected, tolerance=1e-12):
    got, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (got, expected))
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def in_browser(folder, actions, link=""):
    """What the JavaScript `actions` return on the open page, and the errors that it met."""
    listen = "const errors = []; onerror = (message) => { errors.push(message); };"
    report = ("const show = (value) => { const node = document.createElement('pre');"
              " node.id = 'report'; node.textContent = JSON.stringify({ value, errors });"
              " document.body.append(node); };")
    page = PAGE.read_text().replace("<script>", f"<script>{listen}</script><script>", 1)
    page = page.replace("</body>", f"<script>{report}\n(async () => {{ {actions} }})()"
                        ".then(show, (error) => show(String(error)))</script></body>")
    (folder / "play.html").write_text(page)
    command = [BROWSER, "--headless", "--no-sandbox", f"--user-data-dir={folder / 'profile'}",
               "--window-size=1366,768", "--virtual-time-budget=20000", "--dump-dom",
               (folder / "play.html").as_uri() + link]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r'<pre id="report">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert found, shown.stderr[-2000:]
    told = json.loads(html.unescape(found[1]))
    assert told["errors"] == []
    return told["value"]


def in_node(folder, actions):
    """The same of the page's pure functions alone, without a page."""
    pure = re.search(r"<script>(.*?)// -------- The page", PAGE.read_text(), re.DOTALL)[1]
    (folder / "play.js").write_text(
        f"{pure}\nconsole.log(JSON.stringify((() => {{ {actions} }})()));")
    done = subprocess.run([NODE, folder / "play.js"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---------------------------------------------------------------- 1. the file

def test_it_is_small():
    lines = PAGE.read_text().splitlines()
    assert len(lines) <= 400
    assert [line for line in lines if len(line) > 100] == []


def test_it_loads_nothing():
    page = PAGE.read_text()
    assert re.findall(r"https?:[^\"'\s]*", page) == ["http://www.w3.org/2000/svg"]  # a name
    assert not re.search(r"\b(src|href|import|fetch|XMLHttpRequest|WebSocket|EventSource|"
                         r"sendBeacon|Worker)\b|<link|<img|<iframe", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page))


@needs_browser
def test_a_browser_sees_it_load_nothing(tmp_path):
    actions = 'return performance.getEntriesByType("resource").map((entry) => entry.name);'
    assert in_browser(tmp_path, actions) == []


# ---------------------------------------------------------------- 2. the numbers

NUMBERS = """
const { passAtK, passAtKWeights, groupMaxWeights, grpoWeights } = play;
const rewards = (n, c) => [...Array(n).keys()].map((i) => i < c ? 1 : 0);
const answer = { table: {}, groups: [], hills: {}, start: play.START, reward: play.REWARD };
for (const n of SIZES) answer.table[n] = [...Array(n).keys()].map((k) =>
  [...Array(n + 1).keys()].map((c) =>
    [passAtKWeights(rewards(n, c), k + 1)[0], passAtK(rewards(n, c), k + 1)]));
for (const [group, k] of GROUPS) answer.groups.push(
  [passAtKWeights(group, k), groupMaxWeights(group, k), grpoWeights(group)]);
for (const k of KS) {
  let logits = play.START;
  answer.hills[k] = [];
  for (let i = 0; i <= play.STEPS; i++, logits = play.step(logits, k)) if (STOPS.includes(i))
    answer.hills[k].push([logits, play.gradient(logits, k), play.softmax(logits),
                          [play.objective(logits, 1), play.objective(logits, k)]]);
}
return answer;
"""


@pytest.fixture(scope="module", params=[
    pytest.param(in_browser, marks=needs_browser, id="browser"),
    pytest.param(in_node, marks=needs_node, id="node")])
def numbers(request, tmp_path_factory):
    given = {"SIZES": SIZES, "GROUPS": GROUPS, "KS": KS, "STOPS": STOPS}
    constants = "".join(f"const {name} = {json.dumps(x)};" for name, x in given.items())
    return request.param(tmp_path_factory.mktemp("play"), constants + NUMBERS)


@pytest.mark.parametrize("n", SIZES)
def test_weights_and_pass_at_k_equal_rspo_for_every_c_and_k(numbers, n):
    groups = (torch.arange(n) < torch.arange(n + 1)[:, None]).double()  # (c, n)
    expected = [torch.stack([rspo.pass_at_k_weights(groups, k)[:, 0],
                             rspo.pass_at_k(groups, k)], -1) for k in range(1, n + 1)]
    close(numbers["table"][str(n)], torch.stack(expected), 1e-15)


def test_each_answer_of_a_group_gets_the_weights_of_rspo(numbers):
    assert len(numbers["groups"]) == len(GROUPS) > 150
    for (rewards, k), (ours, group, grpo) in zip(GROUPS, numbers["groups"]):
        close(ours, rspo.pass_at_k_weights(rewards, k))
        close(grpo, rspo.grpo_weights(rewards, k))
        if len(rewards) % k:
            assert group is None
        else:
            close(group, rspo.group_max_weights(rewards, k))


@cache
def path(k):
    """bandit.py's logits after 0, 1, ... 1250 steps for k."""
    seen = [bandit.START]
    for _ in range(1250):
        seen.append(bandit.train(bandit.HILLS, k, seen[-1], torch.optim.SGD, steps=1, lr=2.))
    return seen


def test_the_landscape_and_the_start_are_those_of_bandit(numbers):
    close(numbers["reward"], bandit.HILLS.reward[0])
    close(numbers["start"], bandit.START)


@pytest.mark.parametrize("k", KS)
def test_every_step_on_the_hills_is_that_of_bandit(numbers, k):
    assert len(numbers["hills"][str(k)]) == len(STOPS)
    for stop, (logits, gradient, policy, values) in zip(STOPS, numbers["hills"][str(k)]):
        close(logits, path(k)[stop])
        here = torch.tensor(logits, dtype=torch.float64)
        close(gradient, bandit.gradient(bandit.HILLS, here, k))
        close(policy, here.softmax(-1))
        close(values, [bandit.objective(bandit.HILLS, here, x).item() for x in (1, k)])
    close(numbers["hills"][str(k)][-1][2], bandit.climb(k))


# ---------------------------------------------------------------- 3. the page

LOOK = """
const move = (id, value) => { at(id).value = value; at(id).dispatchEvent(new Event("input")); };
const wait = (time) => new Promise((done) => setTimeout(done, time));
const bars = (id) => [...at(id).querySelectorAll("rect")].map((bar) =>
  [...["y", "height"].map((name) => Number(bar.getAttribute(name))), bar.getAttribute("fill")]);
const grid = (id) => [...at(id).querySelectorAll("line")].map((x) => Number(x.getAttribute("y1")));
const look = () => ({
  sliders: ["n", "c", "k"].map((id) => number(id)),
  outputs: [...document.querySelectorAll("output")].map((x) => Number(x.value)),
  meaning: at("meaning").textContent, group: at("group-says").textContent,
  bars: Object.fromEntries(["rspo", "group", "reward", "grpo"].map((id) => [id, bars(id)])),
  grid: Object.fromEntries(["rspo", "group", "reward", "grpo"].map((id) => [id, grid(id)])),
  right: [...at("answers").querySelectorAll("circle")].map(
    (x) => x.getAttribute("fill") !== "#fff"),
  progress: at("progress").textContent.replace(/\\s+/g, " "), run: at("run").textContent,
  grids: grid("mass"), traces: [...at("mass").querySelectorAll("polyline")].map(
    (x) => x.getAttribute("points").split(" ").map((point) => Number(point.split(",")[1]))),
});
"""


def check_drawing(seen):
    """Words and bars against rspo.py."""
    n, c, k = seen["sliders"]
    rewards = [float(right) for right in seen["right"]]
    assert seen["outputs"] == [n, c, k] and len(rewards) == n and sum(rewards) == c
    weights = rspo.pass_at_k_weights(rewards, k)
    told = re.search(r"= (\S+)\. A wrong", seen["meaning"])
    assert float(told[1] if told else 0) == pytest.approx(weights.max().item(), rel=1e-3)
    estimate = float(re.search(r"estimated as\s+([\d.]+)\.", seen["meaning"])[1])
    assert estimate == pytest.approx(rspo.pass_at_k(rewards, k).item(), abs=6e-4)
    expected = {"rspo": weights, "reward": rspo.reward_weights(rewards, k)}
    if n % k == 0:
        expected["group"] = rspo.group_max_weights(rewards, k)
        carried = int(((expected["group"] > 0) & (torch.tensor(rewards) == 0)).sum())
        assert f"{carried} wrong ones hitchhike" in seen["group"]
    else:
        assert "needs n divisible by k" in seen["group"] and seen["bars"]["group"] == []
    for name, values in expected.items():
        zero, full = seen["grid"][name]
        drawn = [height / (zero - full) * k for _, height, _ in seen["bars"][name]]
        close(drawn, values, 1e-9)
    check_grpo(seen, rspo.grpo_weights(rewards, k))
    for bars in seen["bars"].values():
        assert all((fill == "url(#hatch)") == (not right)
                   for (_, _, fill), right in zip(bars, seen["right"]))


def check_grpo(seen, values):
    """Its bars go up and down from 0, on their own scale."""
    zero, end = seen["grid"]["grpo"]
    scale = (values.max() if values.max() >= -values.min() else values.min()).item() or 1.
    unit = (zero - end) / scale
    signed = [(height if y < zero - 1e-9 else -height) / unit
              for y, height, _ in seen["bars"]["grpo"]]
    close(signed, values, 1e-9)


@needs_browser
def test_sliders_move_the_words_and_the_bars(tmp_path):
    moves = [("n", 64), ("k", 16), ("c", 9), ("c", 60), ("k", 5), ("n", 6), ("k", 3), ("c", 0),
             ("n", 1), ("c", 1), ("n", 12)]
    actions = f"""{LOOK} const seen = [look()];
        for (const [id, value] of {json.dumps(moves)}) {{ move(id, value); seen.push(look()); }}
        at("shuffle").click(); seen.push(look());
        return seen;"""
    seen = in_browser(tmp_path, actions)
    for one in seen:
        check_drawing(one)
    assert [one["sliders"] for one in seen] == [
        [16, 3, 4], [64, 3, 4], [64, 3, 16], [64, 9, 16], [64, 60, 16], [64, 60, 5], [6, 6, 5],
        [6, 6, 3], [6, 0, 3], [1, 0, 1], [1, 1, 1], [12, 1, 1], [12, 1, 1]]
    for before, after in zip(seen[:-1], seen[1:-1]):
        assert (before["meaning"], before["bars"]) != (after["meaning"], after["bars"])


def check_hills(seen, step, ks):
    """The number of the step, the values told, and the curves drawn, the first of them START."""
    logits = path(ks[0])[step]
    mean, best = (bandit.objective(bandit.HILLS, logits, k).item() for k in (1, ks[0]))
    policy = logits.softmax(-1)
    expected = (f"Step {step} of 1250, trained for k = {ks[0]}. Mean reward {mean:.3f}, mean of "
                f"the best of {ks[0]} {best:.3f}.Share on the low hill {policy[65:86].sum():.3f}, "
                f"on the high hill {policy[30:51].sum():.3f}.")
    assert seen["progress"] == expected
    bottom, *_, top = seen["grids"]  # chances of 1e-4 and 1
    policies = [x.softmax(-1) for x in (bandit.START, *(path(k)[step] for k in sorted(ks)))]
    curves = [trace for trace in seen["traces"] if len(trace) == 100]  # no legend
    assert len(curves) == len(policies)
    for curve, policy in zip(curves, policies):
        heights = (1 + policy.log10() / 4).clamp(min=0)  # share of the axis
        close((bottom - torch.tensor(curve)) / (bottom - top), heights, .06 / (bottom - top))


@needs_browser
def test_buttons_climb_the_hills(tmp_path):
    actions = LOOK + """
        const seen = [look()];
        const press = (id) => { at(id).click(); seen.push(look()); };
        press("one"); press("ten"); press("ten");
        document.querySelector("[name=hill][value='8']").click(); seen.push(look());
        at("others").click(); seen.push(look());
        press("end"); press("one"); press("reset");
        at("run").click(); await wait(1000); const playing = look();
        at("run").click(); const paused = look(); await wait(1000);
        return { seen, playing, paused, later: look() };"""
    told = in_browser(tmp_path, actions)
    everyone = [8, 1, 2, 4, 16]
    for seen, (step, ks) in zip(told["seen"], [
            (0, [1]), (1, [1]), (11, [1]), (21, [1]), (21, [8]), (21, everyone),
            (1250, everyone), (1250, everyone), (0, everyone)], strict=True):
        check_hills(seen, step, ks)
        assert seen["run"] == "Play"
    playing, paused = told["playing"], told["paused"]
    step = int(re.match(r"Step (\d+) ", playing["progress"])[1])
    assert 2 <= step <= 100 and playing["run"] == "Pause" and paused["run"] == "Play"
    check_hills(playing, step, everyone)
    assert told["later"]["progress"] == paused["progress"]


@needs_browser
@pytest.mark.parametrize("link, sliders, step, k", [
    ("#n=20&c=5&k=10&hill=2&steps=230", [20, 5, 10], 230, 2),
    ("#n=999&c=-3&k=x&hill=3&steps=-1", [64, 0, 8], 0, 1)])
def test_a_link_sets_the_scene_and_a_senseless_one_does_no_harm(tmp_path, link, sliders, step, k):
    seen = in_browser(tmp_path, LOOK + "return look();", link)
    check_drawing(seen)
    check_hills(seen, step, [k])
    assert seen["sliders"][:2] == sliders[:2] and 1 <= seen["sliders"][2] <= sliders[0]
    if link.startswith("#n=20"):
        assert seen["sliders"] == sliders


@needs_browser
def test_every_input_has_a_label_and_a_phone_shows_it_all(tmp_path):
    actions = """
        document.documentElement.style.width = "360px";
        dispatchEvent(new Event("resize"));
        const named = (input) => input.labels.length === 1 && input.labels[0].textContent.trim();
        const inside = (node) => node.getBoundingClientRect().right <= 360;
        return { named: [...document.querySelectorAll("input")].map(named),
                 outside: [...document.body.querySelectorAll("*")].filter((x) => !inside(x))
                   .map((x) => x.outerHTML) };"""
    seen = in_browser(tmp_path, actions)
    assert seen["named"] == ["n, answers to one question:", "c of them are right:",
                             "k tries, the best counts:", *map(str, KS),
                             "show the other k, too"]
    assert seen["outside"] == []
