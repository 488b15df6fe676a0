"""Test POST /v1/edits and the routes under /v1/engines over a socket."""

from tests.serve.scripted import CONTEXT, HELLO, encoding

EDIT = {"model": "scripted", "input": "the wek", "instruction": "Fix it"}


def post(http, path="/v1/edits", **changes):
    return http.post(path, json={**EDIT, **changes})


def error_of(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_edit_has_response_shape_of_2023(http):
    answer = post(http, n=2).json()
    assert set(answer) == {"object", "created", "choices", "usage"} and answer["object"] == "edit"
    choices = [
        {"text": HELLO, "index": i, "logprobs": None, "finish_reason": "stop"} for i in (0, 1)
    ]
    assert answer["choices"] == choices


def test_prompt_of_edit_has_examples_then_instruction(http, engine):
    post(http, temperature=0.25, top_p=0.5)
    request = engine.requests[-1]
    prompt = encoding.decode(request.prompt)
    assert prompt.endswith(
        "<|im_start|>user\nText: the wek\nInstruction: Fix it<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.count("<|im_start|>assistant") > 3
    assert request.sampling_params.temperature == 0.25 and request.sampling_params.top_p == 0.5


def test_edit_without_input_text_returns_edited_text(http):
    assert post(http, input=None).json()["choices"][0]["text"] == HELLO


def test_invalid_edit_requests_name_the_field(http):
    error = error_of(post(http, instruction=None), 400)
    assert error["param"] == "instruction" and error["code"] == "missing_required_parameter"
    assert error_of(post(http, n=21), 400)["code"] == "integer_above_max_value"
    assert error_of(post(http, model="nobody"), 404)["code"] == "model_not_found"
    error = error_of(post(http, input="x" * 2 * CONTEXT), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "input"
    error = error_of(post(http, model="base"), 404)  # it exists, and is no chat model
    assert (error["param"], error["code"]) == ("model", None)


def test_engine_in_path_overrides_model(http, engine):
    """An engine id with slashes is separated from the rest of the path.

    The old client sends `engine=` in the path, where "org/with-slash/chat" could be an id.
    """
    for id in ("scripted", "org/with-slash"):
        for path, body in {
            "completions": {"prompt": "x"},
            "chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        }.items():
            response = http.post(f"/v1/engines/{id}/{path}", json={"model": "nobody", **body})
            assert response.json()["model"] == id, response.text
        assert post(http, f"/v1/engines/{id}/edits", model="nobody").status_code == 200


def test_engines_list_the_models(http):
    engines = http.get("/v1/engines").json()["data"]
    assert [e["id"] for e in engines] == [m["id"] for m in http.get("/v1/models").json()["data"]]
    assert http.get("/v1/engines/gpt-4").json()["id"] == "scripted"
    assert error_of(http.get("/v1/engines/nobody"), 404)["code"] == "model_not_found"
