"""Calls a running worker as clients of Triton and KServe do.

    python tests/interop/interop.py --endpoint 127.0.0.1:50051 --model micro

Every method and every output that the model has, through tritonclient's
synchronous, asyncio and streaming clients; answers must equal those of the native service bit for bit, so the worker must run every image
alone (--max-batch-size 1). Faults must be told in words. Prints a row a check;
ends with "N passed, N failed" and exits 1 when one failed.
"""

import argparse
import asyncio
import queue
import sys
from pathlib import Path

import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

sys.path.insert(0, str(Path(__file__).parent))
from common import ROOT, Report, contract, same  # noqa: E402

pb, pb_grpc = contract()
FILES = [ROOT / "tests/golden/images" / name for name in ("jpeg-photo.jpg", "png-la.png")]


class Refusals(Report):
    """With checks of what must be refused."""

    def refused(self, name, call, code, words):
        try:
            call()
        except InferenceServerException as error:
            good = error.status() == f"StatusCode.{code}" and words in error.message()
            self.check(name, good, f"{error.status()} {error.message()}")
        else:
            self.check(name, False, "it was answered")


class Native:
    """The same work through the native service, as arrays."""

    def __init__(self, endpoint):
        self.stub = pb_grpc.ImageGptServiceStub(grpc.insecure_channel(endpoint))
        self.facts = self.stub.GetModel(pb.GetModelRequest())

    def embed(self, images, **options):
        answer = self.stub.Embed(pb.EmbedRequest(images=images, **options))
        return np.stack([self.array(result.embedding) for result in answer.results])

    def array(self, tensor):
        dtype = np.float16 if tensor.dtype == pb.DATA_TYPE_F16 else np.float32
        return np.frombuffer(tensor.data, dtype).reshape(tuple(tensor.shape))

    def logits(self, images):
        answer = self.stub.Classify(pb.ClassifyRequest(images=images, logits=True))
        return np.stack([self.array(r.classification.logits) for r in answer.results])

    def nll(self, images):
        answer = self.stub.Score(pb.ScoreRequest(images=images, map=True))
        return np.stack([self.array(r.score.map).reshape(-1) for r in answer.results])

    def tokens(self, images):
        answer = self.stub.Tokenize(pb.TokenizeRequest(images=images))
        return np.array([r.tokens.ids for r in answer.results], np.int32)


def tokens_of(native, seed, n_images):
    rng = np.random.default_rng(seed)
    n_colors = len(native.facts.palette_rgb8) // 3
    return rng.integers(0, n_colors, (n_images, native.facts.positions))


def native_images(ids):
    return [pb.Image(tokens=pb.Tokens(ids=row)) for row in ids.tolist()]


def tensor(name, array, datatype):
    given = triton.InferInput(name, array.shape, datatype)
    return given.set_data_from_numpy(array)


def ids_tensor(ids, dtype=np.int64):
    return tensor("input_ids", ids.astype(dtype), "INT64" if dtype == np.int64 else "INT32")


def describe(report, client, model, native):
    report.check("is_server_live", client.is_server_live())
    report.check("is_server_ready", client.is_server_ready())
    report.check("is_model_ready", client.is_model_ready(model) and client.is_model_ready(model, "1"))
    report.check("is_model_ready of another", not client.is_model_ready("other"))
    server = client.get_server_metadata()
    report.check("get_server_metadata", "statistics" in server.extensions, list(server.extensions))
    metadata = client.get_model_metadata(model, as_json=True)
    outputs = {output["name"]: output for output in metadata["outputs"]}
    report.check("get_model_metadata", "tokens" in outputs, ", ".join(outputs))
    config = client.get_model_config(model).config
    report.check(
        "get_model_config",
        config.max_batch_size == native.facts.limits.images_per_call_max and config.backend,
        f"max_batch_size {config.max_batch_size}",
    )
    index = client.get_model_repository_index().models
    report.check("get_model_repository_index", [m.state for m in index] == ["READY"], index[0].name)
    return outputs


def infer_every_output(report, client, model, native, outputs):
    ids = tokens_of(native, 1, 3)
    images = native_images(ids)
    wanted = {"tokens": native.tokens(images)}
    if "embedding" in outputs:
        wanted["embedding"] = native.embed(images)
    if "last_hidden_state" in outputs:
        wanted["last_hidden_state"] = native.embed(images, pooling=pb.POOLING_NONE)
    if "logits" in outputs:
        wanted["logits"] = native.logits(images)
    if "nll" in outputs:
        wanted["nll"] = native.nll(images)
    for name, expected in wanted.items():
        answer = client.infer(
            model, [ids_tensor(ids)], outputs=[triton.InferRequestedOutput(name)], request_id="7"
        )
        got = answer.as_numpy(name)
        good = same(got, expected) and answer.get_response().id == "7"
        report.check(f"infer {name} {list(got.shape)} {got.dtype}", good)
    requested = [triton.InferRequestedOutput(name) for name in wanted]
    answer = client.infer(model, [ids_tensor(ids, np.int32)], outputs=requested)
    good = all(same(answer.as_numpy(name), expected) for name, expected in wanted.items())
    report.check(f"infer {' + '.join(wanted)} at once, INT32", good)
    answer = client.infer(model, [ids_tensor(ids)])
    first = next(iter(outputs))
    report.check(f"infer without outputs gives {first}", same(answer.as_numpy(first), wanted[first]))
    if "logits" in outputs:
        labels = native.facts.labels
        named = client.infer(
            model, [ids_tensor(ids)], outputs=[triton.InferRequestedOutput("logits", class_count=2)]
        ).as_numpy("logits")
        first = named[0, 0].decode().split(":")
        best = int(wanted["logits"][0].argmax())
        good = named.shape == (3, 2) and np.float32(first[0]) == wanted["logits"][0, best]
        good = good and first[1:] == [str(best), labels[best]]
        report.check("infer logits with class_count=2", good, named[0, 0].decode())
    return ids, wanted


def infer_every_input(report, client, model, native):
    files = [path.read_bytes() for path in FILES]
    expected = native.tokens([pb.Image(encoded=file) for file in files])
    for array, form in ((np.array(files, object), "[-1]"), (np.array([[f] for f in files], object), "[-1, 1]")):
        answer = client.infer(
            model, [tensor("image", array, "BYTES")], outputs=[triton.InferRequestedOutput("tokens")]
        )
        report.check(f"infer image BYTES {form}", same(answer.as_numpy("tokens"), expected))
    pixels = np.random.default_rng(2).integers(0, 256, (2, 19, 23, 3)).astype(np.uint8)
    raws = [pb.RawImage(width=23, height=19, pixels=image.tobytes()) for image in pixels]
    fit = pb.Preprocess(fit=pb.FIT_CENTER_CROP)
    request = pb.TokenizeRequest(images=[pb.Image(rgb8=raw) for raw in raws], preprocess=fit)
    expected = np.array([r.tokens.ids for r in native.stub.Tokenize(request).results], np.int32)
    answer = client.infer(
        model,
        [tensor("pixels", pixels, "UINT8")],
        outputs=[triton.InferRequestedOutput("tokens")],
        parameters={"fit": "center_crop", "nobody_knows": "this"},
        priority=2,
        timeout=30_000_000,
        client_timeout=30,
    )
    report.check("infer pixels, fit, priority, timeout", same(answer.as_numpy("tokens"), expected))


def infer_options(report, client, model, native, outputs):
    ids = tokens_of(native, 3, 2)
    images = native_images(ids)
    if "embedding" in outputs:
        answer = client.infer(
            model,
            [ids_tensor(ids)],
            parameters={"dtype": "FP16", "context": "sos_shifted", "normalize": True},
        )
        expected = native.embed(
            images, dtype=pb.DATA_TYPE_F16, context=pb.CONTEXT_SOS_SHIFTED, normalize=True
        )
        report.check("infer FP16, context, normalize", same(answer.as_numpy("embedding"), expected))
        for layer in native.facts.layers_served:
            answer = client.infer(model, [ids_tensor(ids)], parameters={"layer": layer})
            expected = native.embed(images, layers=[layer])
            report.check(f"infer layer {layer}", same(answer.as_numpy("embedding"), expected))
    broken = ids.copy()
    broken[1, 0] = 60_000
    answer = client.infer(
        model,
        [ids_tensor(broken)],
        outputs=[triton.InferRequestedOutput("tokens")],
        parameters={"partial": True},
    )
    status = answer.as_numpy("status")
    good = status[0] == b"" and status[1].startswith(b"INVALID_ARGUMENT") and not answer.as_numpy("tokens")[1].any()
    report.check("infer partial", good, status[1].decode())
    for algorithm in ("gzip", "deflate"):
        answer = client.infer(model, [ids_tensor(ids)], compression_algorithm=algorithm,
                              outputs=[triton.InferRequestedOutput("tokens")])
        report.check(f"infer with {algorithm}", same(answer.as_numpy("tokens"), ids.astype(np.int32)))


def refusals(report, client, model, native):
    ids = tokens_of(native, 4, 2)
    good = [ids_tensor(ids)]
    refused = report.refused
    refused("unknown model", lambda: client.infer("other", good), "NOT_FOUND", "other")
    refused("unknown version", lambda: client.infer(model, good, "2"), "NOT_FOUND", "version 2")
    refused("version that is none", lambda: client.infer(model, good, "v1"), "INVALID_ARGUMENT", "v1")
    refused("metadata of another", lambda: client.get_model_metadata("other"), "NOT_FOUND", "other")
    refused("config of another", lambda: client.get_model_config("other"), "NOT_FOUND", "other")
    refused("statistics of another", lambda: client.get_inference_statistics("other"), "NOT_FOUND", "other")
    floats = tensor("input_ids", ids.astype(np.float32), "FP32")
    refused("wrong dtype", lambda: client.infer(model, [floats]), "INVALID_ARGUMENT", "FP32")
    short = ids_tensor(ids[:, :-1])
    refused("wrong shape", lambda: client.infer(model, [short]), "INVALID_ARGUMENT", "its shape is")
    named = tensor("pixel_values", ids, "INT64")
    refused("wrong input", lambda: client.infer(model, [named]), "INVALID_ARGUMENT", "pixel_values")
    scores = [triton.InferRequestedOutput("scores")]
    refused("wrong output", lambda: client.infer(model, good, outputs=scores), "INVALID_ARGUMENT", "scores")
    cut = ids_tensor(ids)
    cut._raw_content = cut._raw_content[:-1]
    refused("truncated raw contents", lambda: client.infer(model, [cut]), "INVALID_ARGUMENT", "raw contents have")
    fit = {"fit": "stretch"}
    refused("bad parameter", lambda: client.infer(model, good, parameters=fit), "INVALID_ARGUMENT", "fit")
    broken = ids.copy()
    broken[1, 0] = 60_000
    refused("bad image", lambda: client.infer(model, [ids_tensor(broken)]), "INVALID_ARGUMENT", "image 1")


def stream(report, client, model, ids, wanted):
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    name = next(iter(wanted))
    for idx in range(32):
        given = ids_tensor(ids) if idx % 4 else tensor("input_ids", ids.astype(np.float32), "FP32")
        client.async_stream_infer(
            model,
            [given],
            request_id=str(idx),
            outputs=[triton.InferRequestedOutput(name)],
            enable_empty_final_response=True,
        )
    good = True
    for idx in range(32):
        result, error = answers.get(timeout=60)
        if idx % 4 == 0:
            good &= error is not None and "FP32" in error.message()
            continue
        good &= error is None and result.get_response().id == str(idx)
        good &= same(result.as_numpy(name), wanted[name])
        good &= result.get_response().parameters["triton_final_response"].bool_param
    client.stop_stream()
    report.check("stream: 32 requests, 8 of them wrong, answered in order", good)


def asynchronous(report, client, model, ids, wanted):
    answers = queue.Queue()
    for idx in range(8):
        client.async_infer(
            model, [ids_tensor(ids)], lambda result, error: answers.put((result, error)), request_id=str(idx)
        )
    got = [answers.get(timeout=60) for _ in range(8)]
    ids_back = sorted(int(result.get_response().id) for result, error in got if error is None)
    report.check("async_infer", ids_back == list(range(8)))


async def asyncio_client(report, endpoint, model, ids, wanted):
    name = next(iter(wanted))
    outputs = [triton.InferRequestedOutput(name)]
    async with triton_aio.InferenceServerClient(endpoint) as client:
        live = await client.is_server_live() and await client.is_model_ready(model)
        report.check("aio is_server_live, is_model_ready", live)
        calls = [client.infer(model, [ids_tensor(ids)], outputs=outputs) for _ in range(16)]
        answers = await asyncio.gather(*calls)
        good = all(same(answer.as_numpy(name), wanted[name]) for answer in answers)
        report.check("aio infer, 16 at once", good)

        async def requests():
            for idx in range(16):
                yield {"model_name": model, "inputs": [ids_tensor(ids)], "outputs": outputs, "request_id": str(idx)}

        good, n_answers = True, 0
        async for result, error in client.stream_infer(requests()):
            good &= error is None and result.get_response().id == str(n_answers)
            good &= same(result.as_numpy(name), wanted[name])
            n_answers += 1
        report.check("aio stream_infer", good and n_answers == 16)
        statistics = await client.get_inference_statistics(model)
        report.check("aio get_inference_statistics", len(statistics.model_stats) == 1)


def statistics(report, client, model):
    stats = client.get_inference_statistics(model).model_stats[0]
    sums = stats.inference_stats
    counts = {s.count for s in (sums.queue, sums.compute_input, sums.compute_infer, sums.compute_output)}
    detail = (
        f"images {stats.inference_count} runs {stats.execution_count} calls {sums.success.count}"
        f" failed {sums.fail.count}"
    )
    report.check("statistics agree", counts == {stats.inference_count} and stats.execution_count > 0, detail)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--model", required=True)
    arguments = parser.parse_args()
    report, native = Refusals(), Native(arguments.endpoint)
    client = triton.InferenceServerClient(arguments.endpoint)
    model = arguments.model
    outputs = describe(report, client, model, native)
    ids, wanted = infer_every_output(report, client, model, native, outputs)
    first = next(iter(outputs))
    wanted = {first: wanted[first]}
    infer_every_input(report, client, model, native)
    infer_options(report, client, model, native, outputs)
    refusals(report, client, model, native)
    stream(report, client, model, ids, wanted)
    asynchronous(report, client, model, ids, wanted)
    asyncio.run(asyncio_client(report, arguments.endpoint, model, ids, wanted))
    statistics(report, client, model)
    client.close()
    report.end()


if __name__ == "__main__":
    main()
