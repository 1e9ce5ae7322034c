"""A session of the real `tritonclient`, HTTP and gRPC: `python -m tests.e2e.triton_session URL ADDRESS`.

The API key comes on standard input. Every check is an assertion; the last line says that all passed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from uuid import uuid4

import numpy as np
import pytest
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from tritonclient.utils import InferenceServerException, shared_memory

from examples import cancer, digits
from tests.fixtures.waiting import until


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
        heard = []
        client.start_stream(lambda result, error: heard.append((result, error)), headers=headers)
        for number in range(20):
            client.async_stream_infer("digits", [tensor], request_id=str(number))
        client.async_stream_infer("digits", [wrong])
        client.stop_stream()  # once all is answered
        assert [result.get_response().id for result, _ in heard[:-1]] == [str(number) for number in range(20)]
        assert all((result.as_numpy("digit") == labels[:50]).mean() > 0.9 for result, _ in heard[:-1])
        assert "image" in heard[-1][1].message()

        def counted() -> bool:
            (stats,) = client.get_inference_statistics("digits", headers=headers).model_stats
            return bool(stats.inference_count >= 50 and stats.inference_stats.compute_infer.ns)

        until(counted)


def shared_memory_session(address: str, other: str, key: str) -> None:
    """Rows and labels in shared memory, by either front."""
    headers = {"authorization": f"Bearer {key}"}
    _, _, images, labels = digits.load()
    rows, name = images[:50], f"headrace-test-{uuid4().hex}"
    size = rows.nbytes + 8 * len(rows)
    memory = shared_memory.create_shared_memory_region("digits", name, size)
    try:
        shared_memory.set_shared_memory_region(memory, [rows])
        for triton, where in ((over_http, address), (over_grpc, other)):
            with triton.InferenceServerClient(where) as client:
                client.unregister_system_shared_memory(headers=headers)
                client.register_system_shared_memory("digits", name, size, headers=headers)
                tensor = triton.InferInput("image", list(rows.shape), "FP32")
                tensor.set_shared_memory("digits", rows.nbytes)
                digit = triton.InferRequestedOutput("digit")
                digit.set_shared_memory("digits", 8 * len(rows), offset=rows.nbytes)
                client.infer("digits", [tensor], outputs=[digit], headers=dict(headers))
                found = shared_memory.get_contents_as_numpy(memory, np.int64, [len(rows)], rows.nbytes)
                assert (found == labels[:50]).mean() > 0.9
                found[:] = -1
                client.unregister_system_shared_memory("digits", headers=headers)
    finally:
        shared_memory.destroy_shared_memory_region(memory)


def refused(call: Callable[[], object], word: str) -> None:
    """`call` must fail with a message that names `word`."""
    with pytest.raises(InferenceServerException, match=word):
        call()


if __name__ == "__main__":
    secret = sys.stdin.read().strip()
    http_session(sys.argv[1].removeprefix("http://"), secret)
    grpc_session(sys.argv[2], secret)
    shared_memory_session(sys.argv[1].removeprefix("http://"), sys.argv[2], secret)
    sys.stdout.write("every check passed\n")
