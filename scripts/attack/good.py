"""A well-behaved client in a process of its own, so that it measures the worker and not the attacker's Python.

usage: good.py PORT IMAGE(file, or - for tokens) INTERVAL TIMEOUT METHOD(Embed or Tokenize). Each line on standard input
prints the calls since the last line, as a line of JSON.
"""

import collections
import json
import sys
import threading
import time

import grpc
from imagegpt.v1 import imagegpt_pb2 as pb
from imagegpt.v1 import imagegpt_pb2_grpc as rpc

N_TOKENS = 1024


def main():
    port, picture, interval, timeout, method = sys.argv[1:]
    interval, timeout = float(interval), float(timeout)
    if picture == "-":
        image = pb.Image(tokens=pb.Tokens(ids=[1] * N_TOKENS))
    else:
        with open(picture, "rb") as file:
            image = pb.Image(encoded=file.read())
    request = {"Embed": pb.EmbedRequest, "Tokenize": pb.TokenizeRequest}[method](images=[image])
    # A client whose connection was refused reconnects soon, so that it counts as many calls as a served client.
    options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200)]
    call = getattr(rpc.ImageGptServiceStub(grpc.insecure_channel(f"127.0.0.1:{port}", options)), method)
    lock, seen = threading.Lock(), []

    def run():
        while True:
            began = time.perf_counter()
            try:
                answer = call(request, timeout=timeout)
                code = "IMAGE_REFUSED" if answer.results[0].WhichOneof("outcome") == "error" else "OK"
            except grpc.RpcError as error:
                code = error.code().name
            taken = time.perf_counter() - began
            with lock:
                seen.append((taken, code))
            time.sleep(max(0.0, interval - taken))

    threading.Thread(target=run, daemon=True).start()
    for line in sys.stdin:
        with lock:
            calls, seen[:] = seen[:], []
        times = sorted(taken for taken, _ in calls)
        codes = collections.Counter(code for _, code in calls if code != "OK")
        p99 = times[min(len(times) - 1, int(0.99 * len(times)))] if times else None
        print(json.dumps({"calls": len(calls), "p99": p99, "errors": codes}), flush=True)


main()
