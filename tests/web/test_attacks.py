"""What somebody hostile may send: nothing outside the outputs is served, limits hold, and the next clip is made."""

import json
import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest

from pointillist.pipelines.outputs import NAME
from pointillist.web.limits import QUEUE
from pointillist.web.serve import check_password
from web.steps import open_tab, settle, start, wait_for


def ask(url, data=None, **headers):
    """Status and body."""
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def submit(served, values, session, function):
    """Call a handler of the page by its number, past the page's own checks."""
    body = {"data": values, "fn_index": function, "session_hash": session, "trigger_id": None, "event_data": None}
    url = f"{served.url}/gradio_api/queue/join"
    return ask(url, json.dumps(body).encode(), **{"Content-Type": "application/json"})


def answered(served, session):
    """What the events of a session came to."""
    with urllib.request.urlopen(f"{served.url}/gradio_api/queue/data?session_hash={session}", timeout=120) as stream:
        for line in stream:
            if line.startswith(b"data:") and (event := json.loads(line[5:]))["msg"] == "process_completed":
                return event
    return None


@pytest.fixture(scope="module")
def config(served):
    return json.loads(ask(f"{served.url}/config")[1])


def component(config, elem_id=None, storage_key=None):
    for each in config["components"]:
        props = each["props"]
        if (elem_id and props.get("elem_id") == elem_id) or (storage_key and props.get("storage_key") == storage_key):
            return each["id"]
    raise AssertionError(f"there is no {elem_id or storage_key}")


def handler(config, source, event):
    """The number of the handler of an event."""
    for each in config["dependencies"]:
        if [source, event] in [list(target) for target in each["targets"]]:
            return each
    raise AssertionError(f"nothing happens at {event}")


def paths_to(file, served):
    inside = served.folder
    ups = "../" * len(inside.parts)
    yield str(file)
    yield f"{inside}/{ups}{str(file).lstrip('/')}"
    yield f"{inside}/..%2f{'..%2f' * len(inside.parts)}{str(file).lstrip('/')}"
    yield f"//{str(file).lstrip('/')}"
    yield f"{inside}/./{ups}{str(file).lstrip('/')}"


def test_only_outputs_are_served(served, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    link = served.folder / "20260101-000000-00000000.mp4"
    link.symlink_to(secret)
    here = [secret, "/etc/passwd", __file__, served.folder.parent / "x"]
    try:
        for file in [*here, link]:
            for path in paths_to(file, served):
                for prefix in (
                    "gradio_api/file=",
                    "file=",
                    "gradio_api/file/",
                    "static/",
                    "assets/",
                    "custom_component/",
                ):
                    for spelled in (path, quote(path), quote(path, safe="")):
                        status, body = ask(f"{served.url}/{prefix}{spelled}")
                        assert b"the secret" not in body and b"root:" not in body and b"import json" not in body, path
                        assert status in (400, 403, 404, 405, 414, 422), (prefix, spelled, status)
    finally:
        link.unlink()
    clip = served.folder / "20260101-000000-00000001.mp4"
    clip.write_bytes(b"a clip")
    try:
        assert ask(f"{served.url}/gradio_api/file={clip}") == (200, b"a clip")
    finally:
        clip.unlink()


def test_a_name_that_is_no_output_shows_nothing(served, config):
    show = next(
        each for each in config["dependencies"]
        if each["inputs"] == [component(config, storage_key="pointillist-clip")]
        and component(config, "generate-video") in each["outputs"]
    )  # fmt: skip
    for number, name in enumerate(["../../etc/passwd", "/etc/passwd", "x.mp4", ".", "", None, 5, ["a"], {"a": 1}]):
        assert submit(served, [name], f"name{number}", show["id"])[0] == 200
        event = answered(served, f"name{number}")
        assert "passwd" not in json.dumps(event["output"].get("data", []))


def test_a_file_of_the_machine_is_no_upload(served, config):
    drop = handler(config, component(config, "generate-drop"), "upload")
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}, "orig_name": "a.mp4"}
    assert submit(served, [file], "machine", drop["id"])[0] == 200
    assert not answered(served, "machine")["success"]


def test_too_large_an_upload_is_refused(served):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
        + bytes(65 * 2**20)
        + b"\r\n--x--"
    )
    try:
        status, _ = ask(f"{served.url}/gradio_api/upload", body, **{"Content-Type": "multipart/form-data; boundary=x"})
    except (urllib.error.URLError, ConnectionError):  # it hung up on us
        return
    assert status in (400, 413)


def test_hostile_prompts(view, served):
    page = view()
    settle(page, steps=1, prompt='<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>\x00\x1b[31m')
    start(page)
    wait_for(page, "Done in")
    open_tab(page, "Gallery")
    page.locator(".card").first.click()
    page.wait_for_selector("#gallery-details p")
    assert "<img src=x" in page.inner_text("#gallery-details") and page.evaluate("window.hacked") is None
    open_tab(page, "Compare")
    page.wait_for_selector("#compare-about p")
    open_tab(page, "Generate")
    page.evaluate("document.querySelector('#generate-prompt textarea').removeAttribute('maxlength')")
    page.fill("#generate-prompt textarea", "a" * 2**20)
    start(page)
    page.locator("#job-generate").get_by_text("allowed are up to 2,000").wait_for()
    page.fill("#generate-prompt textarea", "\x01 \n ")
    start(page)
    page.locator("#job-generate").get_by_text("the prompt is empty").wait_for()
    assert page.evaluate("window.hacked") is None


def test_fifty_jobs_and_a_killed_client(view, served, config):
    engine = served.engine
    page = view()
    settle(page, steps=99)
    start(page)
    wait_for(page, re.compile(r"step [1-9]\d*/99"))
    begin = handler(config, component(config, "generate-start"), "click")
    defaults = {each["id"]: each["props"].get("value") for each in config["components"]}
    values = [defaults[name] for name in begin["inputs"]]
    with ThreadPoolExecutor(10) as pool:
        statuses = list(pool.map(lambda n: submit(served, values, f"many{n}", begin["id"])[0], range(50)))
    assert set(statuses) <= {200, 503}
    answers = [json.dumps(answered(served, f"many{n}")["output"]) for n, code in enumerate(statuses) if code == 200]
    assert sum("jobs wait already" in each for each in answers) >= len(answers) - QUEUE > 0
    assert len(engine.waiting) <= QUEUE
    running = engine.running
    page.context.close()  # the client is gone; its job is not
    assert engine.running is running and running.state == "running"
    for job in engine.waiting:
        job.cancel()
    running.cancel()

    other = view()
    settle(other, steps=2)
    start(other)
    wait_for(other, "Done in")
    ours = re.compile(f"{NAME.pattern}|.*\\.safetensors")
    assert all(ours.fullmatch(path.name) for path in served.folder.iterdir() if path.is_file())


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_listening_elsewhere_needs_a_password(host):
    with pytest.raises(ValueError, match="POINTILLIST_PASSWORD"):
        check_password(host, None)
    with pytest.raises(ValueError, match="at least 8"):
        check_password(host, "short")
    check_password(host, "long enough")
    check_password("127.0.0.1", None)


def test_only_offered_models_may_be_named_from_elsewhere(tmp_path):
    pytest.importorskip("gradio")
    from dataclasses import replace

    from pointillist.pipelines.load import ModelError
    from pointillist.web.controls import offered_model
    from pointillist.web.shared import Shared

    there = Shared(*[None] * 7, models=(str(tmp_path),), any_model=False)
    assert offered_model(there, "embedded").embedded
    for name in ("/etc", "../..", "somebody/model", None, 5):
        with pytest.raises(ModelError, match="not offered here"):
            offered_model(there, name)
    for shared, name in ((there, str(tmp_path)), (replace(there, any_model=True), "/etc")):
        with pytest.raises(ModelError, match="has no model_index"):
            offered_model(shared, name)


def test_the_search_tells_nothing_of_a_model_that_is_not_offered(tiny_folder):
    pytest.importorskip("gradio")
    from pointillist.web.search import _for_model
    from pointillist.web.shared import Shared

    told = [_for_model(Shared(*[None] * 7, models=(), any_model=here), str(tiny_folder)) for here in (True, False)]
    assert [all(hasattr(each, "choices") for each in fields) for fields in told] == [True, False]
