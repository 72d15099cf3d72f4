"""Calls a running worker through KServe's client.

    python tests/interop/kserve_client.py --endpoint 127.0.0.1:50051 --model micro

Apart from the others, because its copy of the protocol and tritonclient's cannot
be in one process. Prints a row a check; exits 1 when one failed.
"""

import argparse
import asyncio
import logging
import sys
from pathlib import Path

import grpc
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest

sys.path.insert(0, str(Path(__file__).parent))
from common import Report, contract, same  # noqa: E402

pb, pb_grpc = contract()
# It logs each refusal with its stack, which is what is tested.
logging.disable()


async def checks(report, endpoint, model):
    stub = pb_grpc.ImageGptServiceStub(grpc.insecure_channel(endpoint))
    facts = stub.GetModel(pb.GetModelRequest())
    ids = np.random.default_rng(9).integers(0, len(facts.palette_rgb8) // 3, (2, facts.positions))
    images = [pb.Image(tokens=pb.Tokens(ids=row)) for row in ids.tolist()]
    results = stub.Embed(pb.EmbedRequest(images=images)).results
    expected = np.stack([np.frombuffer(r.embedding.data, np.float32) for r in results])
    client = InferenceGRPCClient(url=endpoint)
    report.check("kserve is_server_live", await client.is_server_live())
    report.check("kserve is_server_ready", await client.is_server_ready())
    report.check("kserve is_model_ready", await client.is_model_ready(model))
    for form in ("raw", "typed"):
        given = InferInput("input_ids", list(ids.shape), "INT64")
        given.set_data_from_numpy(ids.astype(np.int64), binary_data=form == "raw")
        request = InferRequest(model_name=model, infer_inputs=[given], request_id="k")
        answer = await client.infer(request)
        got = answer.outputs[0].as_numpy()
        report.check(f"kserve infer, {form}", same(got, expected) and answer.id == "k")
    for name, change, words in (
        ("unknown model", {"model_name": "other"}, "other"),
        ("wrong dtype", {"infer_inputs": [InferInput("input_ids", [2, 64], "FP32", data=[1.0] * 128)]}, "FP32"),
    ):
        request = InferRequest(**{"model_name": model, "infer_inputs": [given], **change})
        try:
            await client.infer(request)
        except grpc.RpcError as error:
            report.check(f"kserve {name}", words in error.details(), f"{error.code().name} {error.details()}")
        else:
            report.check(f"kserve {name}", False, "it was answered")
    await client.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--model", required=True)
    arguments = parser.parse_args()
    report = Report()
    asyncio.run(checks(report, arguments.endpoint, arguments.model))
    report.end()


if __name__ == "__main__":
    main()
