"""A session of the real `tritonclient`, HTTP and gRPC: `python -m tests.e2e.triton_session URL ADDRESS`.

The API key comes on standard input. Every check is an assertion; the last line says that all passed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from tritonclient.utils import InferenceServerException

from examples import cancer, digits


def http_session(address: str, key: str) -> None:
    """Metadata, JSON and binary tensors, requested outputs, errors."""
    headers = {"authorization": f"Bearer {key}"}
    rows = cancer.load().held_out_rows[:5]
    with over_http.InferenceServerClient(address) as client:
        assert client.is_server_live(headers=headers)
        assert client.is_server_ready(headers=headers)
        assert client.is_model_ready("cancer", headers=headers)
        assert not client.is_model_ready("nothing", headers=headers)
        assert "binary_tensor_data" in client.get_server_metadata(headers=headers)["extensions"]
        metadata = client.get_model_metadata("cancer", headers=headers)
        assert metadata["inputs"] == [{"name": "features", "datatype": "FP32", "shape": [-1, 30]}]
        answers = []
        for binary in (True, False):
            tensor = over_http.InferInput("features", list(rows.shape), "FP32")
            tensor.set_data_from_numpy(rows, binary_data=binary)
            outputs = [
                over_http.InferRequestedOutput("label", binary_data=binary),
                over_http.InferRequestedOutput("probabilities", binary_data=binary),
            ]
            # A dictionary of its own: the client writes the length of its JSON into the one it is given.
            answer = client.infer(
                "cancer",
                [tensor],
                outputs=outputs,
                model_version="1",
                request_id="mine",
                headers=dict(headers),
            )
            assert answer.get_response()["id"] == "mine"
            assert answer.get_response()["model_version"] == "1"
            answers.append((answer.as_numpy("label"), answer.as_numpy("probabilities")))
        assert np.array_equal(answers[0][0], answers[1][0])
        assert np.allclose(answers[0][1], answers[1][1], atol=1e-7)
        narrow = over_http.InferInput("features", [1, 3], "FP32")
        narrow.set_data_from_numpy(rows[:1, :3])
        refused(lambda: client.infer("cancer", [narrow], headers=headers), "features")
        refused(lambda: client.infer("nothing", [narrow], headers=headers), "nothing")


def grpc_session(address: str, key: str) -> None:
    """The same over gRPC, with images."""
    headers = {"authorization": f"Bearer {key}"}
    _, _, images, labels = digits.load()
    with over_grpc.InferenceServerClient(address) as client:
        assert client.is_server_live(headers=headers)
        assert client.is_model_ready("digits", headers=headers)
        metadata = client.get_model_metadata("digits", headers=headers)
        assert [list(tensor.shape) for tensor in metadata.inputs] == [[-1, 8, 8]]
        tensor = over_grpc.InferInput("image", list(images[:50].shape), "FP32")
        tensor.set_data_from_numpy(images[:50])
        answer = client.infer("digits", [tensor], request_id="seven", headers=headers)
        assert answer.get_response().id == "seven"
        assert (answer.as_numpy("digit") == labels[:50]).mean() > 0.9
        assert answer.as_numpy("probabilities").shape == (50, 10)
        wrong = over_grpc.InferInput("image", [1, 64], "FP32")
        wrong.set_data_from_numpy(images[:1].reshape(1, 64))
        refused(lambda: client.infer("digits", [wrong], headers=headers), "image")
        refused(lambda: client.infer("digits", [tensor]), "key")


def refused(call: Callable[[], object], word: str) -> None:
    """`call` must fail with a message that names `word`."""
    with pytest.raises(InferenceServerException, match=word):
        call()


if __name__ == "__main__":
    secret = sys.stdin.read().strip()
    http_session(sys.argv[1].removeprefix("http://"), secret)
    grpc_session(sys.argv[2], secret)
    sys.stdout.write("every check passed\n")
